// The parts of a decoder layer before and after its attention, and single matrices, on threads.
#pragma once
#include <vector>

#include "attention.h"
#include "step.h"

namespace kvfold {

// The segments of a layer's cache, oldest first; rows may begin at different slots and end at the same. Tokens are put behind the last segment, a run or
// dense blocks, for which it must have room. With `apart`, the last segment is a run for a single token, the one that comes: once
// it has been attended to, it goes behind the segment before, into blocks of a codec that takes tokens one by one.
struct Tail {
  std::vector<Segment> segments;
  std::vector<std::vector<int64_t>> starts, lengths;  // by segment and row; empty where a segment has slots
  bool apart;
};

// The segments of a layer's cache under a keep policy: sinks, if it has any, then blocks, if it has any, then a run, in whose next
// place tokens come. All but sinks may go. With `moves` the run has one place, and a token that has been attended to goes from
// there into the blocks, to the place of the one that goes.
struct Turnover {
  std::vector<Segment> segments;
  bool has_sinks, has_blocks, moves;
  int places;  // of blocks and run: those of a row
};

// Cosines and sines by token, [count, size], or [1, size] where all tokens have the same position.
struct Positions {
  Number number;
  const void *cos, *sin;
  int size;
  bool same;
};

// Those of the instruction set that is chosen.
const StepKernels& step_kernels();

// y [count, rows] = x [count, columns] · weightᵀ + bias; count up to kMostVectors.
void linear(const Weight&, Number, const void* x, int count, void* y, int num_threads);

// The whole of an I4 or I8 weight as numbers, [rows, columns].
void unpack(const Weight&, Number, void* to, int num_threads);

// hidden [count, H] to q [count, Hq * D] float32, keys and values [count, Hkv * D] in the layer's numbers, positions applied.
void before_attention(const DecoderLayer&, const void* hidden, int count, const Positions&, float* q, void* keys, void* values,
                      int num_threads);

// The layer's output [count, H], given its input and the attention's output [count, Hq * D].
void after_attention(const DecoderLayer&, const void* hidden, const float* attended, int count, void* out, int num_threads);

// The next token of every sequence: q [rows, groups, D], scaled; keys and values [rows, D] in the layer's numbers.
struct Newest {
  int rows, groups;
  int64_t bytes;  // of a key
  std::vector<float> q;
  std::vector<uint8_t> keys, values;
};

void project(const DecoderLayer&, const void* hidden, int count, const Positions&, float scaling, int num_threads, Newest&);

// Writes a token of a row to a place of its blocks: K and V, `number` each, in the codes of a codec that takes tokens one by one,
// which are dense, of that number, or 8-bit floats.
void put(const Segment&, int row, int64_t place, Number, const void* k, const void* v);

// Where a place of a row lies, in K or V of a segment.
uint8_t* place_in(const Segment&, const Side&, int row, int64_t place);

// What sinks are looked at with: q moved by some positions (kvfold/rope.py), or q itself where inv_freq is null.
struct Shift {
  const float* inv_freq;  // [half]
  int half;
  int64_t positions;
};

// The first part of a layer for the next token of every sequence, up to its attention: keys and values go to `place` of the run
// with that `slot`; attended [count, Hq * D]; and where `mass [rows, places]` is not null, what tokens received, over a group's
// query heads the largest or the mean. `score [rows, places]` is the policy's number of a token, or null;
// `queries [count, Hq * D]` get what was asked, scaled, where it is not null.
void come(const DecoderLayer&, Turnover&, const void* hidden, int count, const Positions&, const Shift& of_sinks, float scaling,
          float softcap, int place, int64_t slot, bool by_largest, float* score, float* mass, float* queries, float* attended,
          int num_threads);

// Of each row the token of the lowest `rank [rows, places]` goes (null: the oldest), of equals the oldest; those in slots from
// `first_recent` on only before what ranks as infinite, and none where that is negative. With `moves` the one that came takes its
// place.
void go(Turnover&, Number, const float* rank, const std::vector<int64_t>& first_recent, float* score);

// With `moves`: where none has to go, the token that came takes the first free place of its blocks, if there is one.
void settle(Turnover&, Number, float* score);

// -- many tokens: what is between the products of a layer, in chunk.cpp ------------------------------------------------------

// The heads of queries, keys or values.
struct Heads {
  int count, head_dim;
  Norm norm;
};

// y [count, size] = norm(x)
void normalize_tokens(const Norm&, Number, const void* x, int64_t count, int size, void* y, int num_threads);

// x [batch, length, heads * D] to y [batch, heads, length, D], normed where heads are, at their positions where they have any:
// [batch * length, size].
void place_heads(const Heads&, Number, const void* x, int batch, int length, const Positions*, void* y, int num_threads);

// sum [count, size] = hidden + of_x(x), and normed = of_sum(sum) where it is not null.
void add_tokens(const Norm& of_x, const Norm& of_sum, Number, const void* hidden, const void* x, int64_t count, int size, void* sum,
                void* normed, int num_threads);

// gate [count, size] = act(gate) * up
void gate_tokens(Activation, Number, void* gate, const void* up, int64_t count, int size, int num_threads);

// ----------------------------------------------------------------------------------------------------------------------------

// The whole layer for the next token of every sequence: `hidden [count, H]` to `out [count, H]`; its keys and values go to the tail.
void step(const DecoderLayer&, Tail&, const void* hidden, int count, const Positions&, float scaling, float softcap, void* out,
          int num_threads);

}  // namespace kvfold
