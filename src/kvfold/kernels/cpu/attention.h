// What the Python side, the scheduler and the kernels agree on. Plain data only: this header is compiled for several
// instruction sets into one library, so nothing in it may emit code.
#pragma once
#include <cstdint>

namespace kvfold {

// T1 to T6: codes of so many bits that name the levels of a table.
enum class Kind : int { F32, BF16, F16, E4M3, E5M2, I8, I4, I2, T4, T3, T2, T1, T5, T6 };
enum class ScaleKind : int { NONE, HALF, LOG8 };
constexpr int kLevels = 16;

// What is added to codes: few directions, x_t += B z_t (kvfold/store/subspace.py), and single numbers (kvfold/store/outliers.py).
struct Repairs {
  int rank, outliers;           // directions of a block, numbers of a line; 0: none
  const uint16_t *basis, *z;    // [P, D, rank] and [P, T, rank] halves
  bool by_channel;              // whether outliers are those of channels, or of tokens
  const uint16_t* value;        // [P, lines, outliers] halves
  const uint8_t* place;         // of the same shape: where in its line a number belongs, bytes or words
  int place_bytes;
};

// Channels that differ in the bits of their codes (kvfold/store/bands.py): lines from `first` on, `offset` bytes into a block.
struct Band {
  Kind kind;
  int first, lines;
  int64_t offset, line_bytes;
  const float* levels;  // 2^bits, and 16 at least
};

constexpr int kBands = 6;

struct Bands {
  bool used;  // instead of one kind for all lines
  int count, channels;  // of all bands; what is beyond has no codes and is 0
  Band bands[kBands];
  const uint8_t* scale;       // [P, channels]: 2^((c - 128) / 8)
  const int8_t* zero_steps;   // [P, channels], in sixteenths of the scale; or null, and then
  const uint16_t* zero;       // [P, channels] halves
  int entries;                // single numbers of a block that are mended
  const uint16_t* value;      // [P, entries] halves
  const int16_t* place;       // [P, entries]: token * D + channel
};

// K or V of a segment. A line is a token (its channels side by side) or, where scales are per channel, a channel of a block
// (its tokens side by side). Codes of less than a byte are packed along the line in 8 / bits equal runs: code j of run i is in
// bits i * bits ... of byte j; of a single bit, code 8 j + i is in bit i of byte j. Codes of 3, 5 and 6 bits are two planes, one behind
// the other: their low 2 or 4 bits, and the rest.
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
  float levels[kLevels]; // of T4, T3 and T2, repeated to fill it
  const uint16_t* block_levels;  // [P, 2^bits] halves, where each block has levels of its own
  Repairs repairs;
  Bands bands;
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
  bool in_bf16 = false;                 // many vectors may be multiplied in bfloat16: the model's own type
};

// Columns [first_column, end_column) of `num_rows` rows from `row` on, for the vectors [first, end) of M.
struct Task {
  const Part* part;
  int row, num_rows, first_column, end_column, first, end;
  float *out, *top, *total;  // [num_rows, end - first, padded D] not normalised, [num_rows, end - first] twice
};

struct Encoding;  // encoding.h
struct Encoded;
struct Naming;

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
  void (*name_levels)(const Naming&, const float* x, int tokens, int head_dim, uint8_t* codes, float* floats);
};

extern const Kernels kPortable;
#ifdef KVFOLD_X86
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;  // defined where the compiler knows it: KVFOLD_AVX_VNNI
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;  // as well: KVFOLD_AVX512_BF16
#endif

constexpr int kStrip = 384;       // vectors that a task takes at once, at most: a block becomes numbers once for them
constexpr int kRows = 8;          // rows that a task of few vectors takes at once: neighbours in a pool, as their tokens come together
constexpr int kDirectVectors = 8; // up to so many, codes are converted in registers; beyond, once for all vectors

constexpr int rows_together(int vectors) { return vectors <= kDirectVectors ? kRows : 1; }

inline int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace kvfold
