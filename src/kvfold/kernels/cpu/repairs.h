// What codes miss and a codec adds to them, folded: two skinny products, and a sparse one.
//
//   low rank   scores += (q B) Zᵀ           out += (p Z) Bᵀ
//   outliers   scores[t] += q_d r           out_d += p_t r       for each number r that stands at token t, channel d
#pragma once
#include "folding.h"

namespace kvfold {
namespace {

// Column c of halves [n, columns], as floats, with zeros up to a whole vector.
void read_column(const uint16_t* from, int n, int columns, int c, float* to) {
  int i = 0;
  for (; i < n; i++) to[i] = half_at(from + int64_t(i) * columns + c);
  for (; i % W; i++) to[i] = 0;
}

// to [vectors, m] += (from [vectors, n] · inward [n, rank]) · outward [m, rank]ᵀ; `column` has room for n and m.
void add_low_rank(const uint16_t* inward, int n, const uint16_t* outward, int m, int rank, int vectors, const float* from, int ld_from,
                  float* to, int ld_to, float* column) {
  float weights[kStrip];
  for (int r = 0; r < rank; r++) {
    read_column(inward, n, rank, r, column);
    for (int v = 0; v < vectors; v++) weights[v] = dot(from + int64_t(v) * ld_from, column, n);
    read_column(outward, m, rank, r, column);
    for (int v = 0; v < vectors; v++) {
      float* sum = to + int64_t(v) * ld_to;
      for (int i = 0; i < m; i += W) store(sum + i, load(sum + i) + load(column + i) * weights[v]);
    }
  }
}

inline int place_at(const Repairs& a, int64_t i) {
  return a.place_bytes == 1 ? a.place[i] : a.place[2 * i] | a.place[2 * i + 1] << 8;
}

// The first `lines` of a block's lines of numbers. scattered: to[place] += from[line] r; otherwise to[line] += from[place] r.
void add_outliers(const Repairs& a, int64_t id, int lines_each, int lines, bool scattered, int vectors, const float* from, int ld_from, float* to,
                  int ld_to) {
  const int64_t first = id * lines_each * a.outliers;
  for (int l = 0; l < lines; l++) {
    for (int i = 0; i < a.outliers; i++) {
      const int64_t at = first + int64_t(l) * a.outliers + i;
      const float value = half_at(a.value + at);
      const int place = place_at(a, at);
      const int target = scattered ? place : l, source = scattered ? l : place;
      for (int v = 0; v < vectors; v++) to[int64_t(v) * ld_to + target] += from[int64_t(v) * ld_from + source] * value;
    }
  }
}

// Of K: from queries to scores; of V: from probabilities to the output. Blocks with directions or channels are written as a whole,
// others only up to their last token, `count`.
void add_repairs(const Repairs& a, int64_t id, int count, int block, int head_dim, bool of_keys, int vectors, const float* from, int ld_from,
                 float* to, int ld_to, const Workspace& w) {
  if (a.rank) {
    const uint16_t *basis = a.basis + id * head_dim * a.rank, *z = a.z + id * block * a.rank;
    const int n = of_keys ? head_dim : block, m = of_keys ? block : head_dim;
    add_low_rank(of_keys ? basis : z, n, of_keys ? z : basis, m, a.rank, vectors, from, ld_from, to, ld_to, w.line);
  }
  if (a.outliers) {
    add_outliers(a, id, a.by_channel ? head_dim : block, a.by_channel ? head_dim : count, a.by_channel == of_keys, vectors, from, ld_from, to, ld_to);
  }
}

}  // namespace
}  // namespace kvfold
