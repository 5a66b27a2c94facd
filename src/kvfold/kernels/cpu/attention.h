// What the Python side, the scheduler and the kernels agree on. Plain data only: this header is compiled for several
// instruction sets into one library, so nothing in it may emit code.
#pragma once
#include <cstdint>

namespace kvfold {

enum class Kind : int { F32, BF16, F16, E4M3, E5M2, I8, I4, I2 };
enum class ScaleKind : int { NONE, HALF, LOG8 };

// K or V of a segment. A line is a token (its channels side by side) or, where scales are per channel, a channel of a block
// (its tokens side by side). Codes of less than a byte are packed along the line in 8 / bits equal runs: code j of run i is in
// bits i * bits ... of byte j.
struct Side {
  Kind kind;
  bool by_channel;
  ScaleKind scale_kind;
  const uint8_t* codes;
  int64_t block_bytes;  // from one block of the pool to the next
  int64_t row_bytes;    // from one row of a run to the next
  int64_t line_bytes;
  const uint8_t* scale;  // [P, T, groups] per token, [P, groups, D] per channel: halves, or codes of a logarithmic grid
  const uint16_t* zero;  // halves, of the scale's shape; null: symmetric, or no integers
  const uint16_t* base;  // [P] halves: the largest scale of a block, for LOG8 per channel
  int groups;            // numbers of scales a line
  float middle;          // symmetric integers: x = s (c - middle)
  const float* rotation; // [D, D] float32, what vectors were multiplied with; or null
};

// Tokens of all rows, either in blocks of a pool (`table`) or as a dense run.
struct Segment {
  Side k, v;
  int rows, columns, block, head_dim;
  int width;              // places a row
  const int64_t* table;   // [rows, columns], -1: no block; null: a run
  const int32_t* slots;   // [P, T] or [rows, width], -1: no token; null: rows are contiguous
  bool causal;            // whether tokens may be younger than queries
};

// A segment with the queries that look at it.
struct Part {
  const Segment* segment;
  const float* q;                // [R, M, D], scaled
  const int64_t* first_visible;  // [R, Q] or null
  const int64_t* starts;         // [R], the slot of the first token; for contiguous rows
  const int64_t* lengths;        // [R]
};

struct Shape {
  int rows, groups, queries, head_dim;  // M = groups * queries, the group's heads first
  const int64_t* query_slots;           // [Q]
  float softcap;                        // 0: none
};

// Columns [first_column, end_column) of `num_rows` rows from `row` on, for the vectors [first, end) of M.
struct Task {
  const Part* part;
  int row, num_rows, first_column, end_column, first, end;
  float *out, *top, *total;  // [num_rows, end - first, padded D] not normalised, [num_rows, end - first] twice
};

struct Encoding;  // encoding.h
struct Encoded;

// One build of the kernels for one instruction set.
struct Kernels {
  const char* name;
  int width;  // floats a vector
  int64_t (*workspace)(const Shape&, const Part&, int vectors);  // floats that a task needs
  void (*attend)(const Shape&, const Task&, float* workspace);
  // Adds up what tasks found for one of their rows and the same vectors, in the order of their parts, into out [m, D] and lse [m].
  void (*merge)(const Shape&, const Task* tasks, int count, int row, float* out, float* lse, float* workspace);
  // mass [R, G, width] += sum over queries of exp(score - lse), for a task's columns and all vectors; lse [R, M].
  void (*mass)(const Shape&, const Task&, const float* lse, float* mass, float* workspace);
  void (*encode)(const Encoding&, const uint8_t* x, int tokens, int head_dim, const Encoded& to, float* floats);
};

extern const Kernels kPortable;
#ifdef KVFOLD_X86
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;  // defined where the compiler knows it: KVFOLD_AVXVNNI
extern const Kernels kAvx512;
#endif

constexpr int kStrip = 192;       // vectors that a task takes at once
constexpr int kRows = 8;          // rows that a task of few vectors takes at once: neighbours in a pool, as their tokens come together
constexpr int kDirectVectors = 8; // up to so many, codes are converted in registers; beyond, once for all vectors

constexpr int rows_together(int vectors) { return vectors <= kDirectVectors ? kRows : 1; }

inline int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace kvfold
