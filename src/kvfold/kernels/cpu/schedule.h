// The parts of a decoder layer before and after its attention, and single matrices, on threads.
#pragma once
#include "step.h"

namespace kvfold {

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

}  // namespace kvfold
