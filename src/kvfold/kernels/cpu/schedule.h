// The parts of a decoder layer before and after its attention, and single matrices, on threads.
#pragma once
#include <vector>

#include "attention.h"
#include "step.h"

namespace kvfold {

// The segments of a layer's cache, oldest first; all rows hold the same slots. Tokens are put behind the last segment, a run or
// dense blocks, for which it must have room.
struct Tail {
  std::vector<Segment> segments;
  std::vector<std::vector<int64_t>> starts, lengths;  // by segment and row; empty where a segment has slots
};

// Cosines and sines by token, [count, size], or [1, size] where all tokens have the same position.
struct Positions {
  Number number;
  const void *cos, *sin;
  int size;
  bool same;
};

// y [count, rows] = x [count, columns] · weightᵀ + bias; count up to kMostVectors.
void linear(const Weight&, Number, const void* x, int count, void* y, int num_threads);

// The whole of an I4 or I8 weight as numbers, [rows, columns].
void unpack(const Weight&, Number, void* to, int num_threads);

// hidden [count, H] to q [count, Hq * D] float32, keys and values [count, Hkv * D] in the layer's numbers, positions applied.
void before_attention(const DecoderLayer&, const void* hidden, int count, const Positions&, float* q, void* keys, void* values,
                      int num_threads);

// The layer's output [count, H], given its input and the attention's output [count, Hq * D].
void after_attention(const DecoderLayer&, const void* hidden, const float* attended, int count, void* out, int num_threads);

// The whole layer for the next token of every sequence: `hidden [count, H]` to `out [count, H]`; its keys and values go to the tail.
void step(const DecoderLayer&, Tail&, const void* hidden, int count, const Positions&, float scaling, float softcap, void* out,
          int num_threads);

}  // namespace kvfold
