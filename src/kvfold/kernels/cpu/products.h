// The two products that attention over codes is made of. `codes` is a matrix of lines, converted to float in registers:
//
//   across   C[m, n] += Σ_k A[g(n)][m, k] codes[k, n]          scores of K per channel, output of V per token
//   along    C[m, l]  = Σ_n X[m, n] scale[g(n)][l] codes[l, n] scores of K per token, output of V per channel
//
// g(n) is the group of scales that column n is in.
#pragma once
#include "levels.h"

namespace kvfold {
namespace {

constexpr int kTile = W == 16 ? 4 : 2;  // vectors of C across, at least a byte's worth of runs

struct Matrix {
  const uint8_t* codes;
  int64_t line_bytes;
  int lines, columns;  // columns: a multiple of W * per_byte, and a group a multiple of W, or it goes through scratch
  int groups;
  int64_t ahead = 0;  // from here to the codes that will be read next: they are asked for line by line meanwhile
  const float* levels = nullptr;  // of tables
};

// Where the vectors of a tile lie: byte vectors n0 ... of every run.
template <Kind K, int BYTES, int MR, bool GROUPED>
inline void across_tile(const Matrix& b, int k_end, const float* a, int lda, int64_t group_stride, float* c, int ldc, int n0) {
  constexpr int per = per_byte<K>();
  const int run = b.columns / per, group_width = b.columns / b.groups;
  vf acc[MR][BYTES * per];
  const float* rows[BYTES * per];
  int at[BYTES * per];
  for (int i = 0; i < BYTES; i++) {
    for (int p = 0; p < per; p++) {
      at[i * per + p] = n0 + i * W + p * run;
      rows[i * per + p] = a + (GROUPED ? at[i * per + p] / group_width * group_stride : 0);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
    for (int j = 0; j < BYTES * per; j++) acc[m][j] = load(c + int64_t(m) * ldc + at[j]);
  }
  const uint8_t* line = b.codes;
  for (int k = 0; k < k_end; k++, line += b.line_bytes) {
    vf x[BYTES * per];
    for (int i = 0; i < BYTES * W * bytes_each<K>(); i += 64) __builtin_prefetch(line + n0 * bytes_each<K>() + i + b.ahead);
#pragma GCC unroll 16
    for (int i = 0; i < BYTES; i++) load_line<K>(line, n0 + i * W, b.columns, b.levels, x + i * per);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      if constexpr (GROUPED) {
#pragma GCC unroll 16
        for (int j = 0; j < BYTES * per; j++) acc[m][j] += all(rows[j][int64_t(m) * lda + k]) * x[j];
      } else {
        const vf factor = all(a[int64_t(m) * lda + k]);
#pragma GCC unroll 16
        for (int j = 0; j < BYTES * per; j++) acc[m][j] += factor * x[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
    for (int j = 0; j < BYTES * per; j++) store(c + int64_t(m) * ldc + at[j], acc[m][j]);
  }
}

template <Kind K, int MR, bool GROUPED>
void across_strip(const Matrix& b, int k_end, const float* a, int lda, int64_t group_stride, float* c, int ldc) {
  constexpr int per = per_byte<K>(), bytes = per >= kTile ? 1 : kTile / per;
  const int run = b.columns / per;
  int n = 0;
  for (; n + bytes * W <= run; n += bytes * W) {
    across_tile<K, bytes, MR, GROUPED>(b, k_end, a, lda, group_stride, c, ldc, n);
  }
  for (; n < run; n += W) across_tile<K, 1, MR, GROUPED>(b, k_end, a, lda, group_stride, c, ldc, n);
}

template <Kind K, bool GROUPED>
void across_of(const Matrix& b, int k_end, const float* a, int vectors, int lda, int64_t group_stride, float* c, int ldc) {
  constexpr int most = W < 16 && per_byte<K>() > 2 ? 2 : 4;  // accumulators must fit into registers
  int m = 0;
  for (; m + most <= vectors; m += most) {
    across_strip<K, most, GROUPED>(b, k_end, a + int64_t(m) * lda, lda, group_stride, c + int64_t(m) * ldc, ldc);
  }
  const float* rest_a = a + int64_t(m) * lda;
  float* rest_c = c + int64_t(m) * ldc;
  switch (vectors - m) {
    case 3: across_strip<K, 3, GROUPED>(b, k_end, rest_a, lda, group_stride, rest_c, ldc); break;
    case 2: across_strip<K, 2, GROUPED>(b, k_end, rest_a, lda, group_stride, rest_c, ldc); break;
    case 1: across_strip<K, 1, GROUPED>(b, k_end, rest_a, lda, group_stride, rest_c, ldc); break;
    default: break;
  }
}

template <Kind K, int MR, bool GROUPED>
void along_strip(const Matrix& b, const float* x, int ldx, const float* scale, int ld_scale, float* c, int ldc, bool add) {
  constexpr int per = per_byte<K>();
  const int run = b.columns / per, group_width = b.columns / b.groups;
  for (int l0 = 0; l0 < b.lines; l0 += W) {
    vf partial[MR][W];
    for (int i = 0; i < W; i++) {
      const int l = l0 + i < b.lines ? l0 + i : b.lines - 1;
      const uint8_t* line = b.codes + l * b.line_bytes;
      for (int n = 0; n < b.line_bytes; n += 64) __builtin_prefetch(line + n + b.ahead);
      vf acc[MR] = {};
      for (int n = 0; n < run; n += W) {
        vf codes[per];
        load_line<K>(line, n, b.columns, b.levels, codes);
#pragma GCC unroll 4
        for (int p = 0; p < per; p++) {
          const int column = n + p * run;
          if constexpr (GROUPED) codes[p] *= all(scale[column / group_width * ld_scale + l]);
#pragma GCC unroll 4
          for (int m = 0; m < MR; m++) acc[m] += load(x + int64_t(m) * ldx + column) * codes[p];
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) partial[m][i] = acc[m];
    }
    for (int m = 0; m < MR; m++) {
      vf total = sums(partial[m]);
      if (!GROUPED && scale) total *= load(scale + l0);
      float* to = c + int64_t(m) * ldc + l0;
      store(to, add ? load(to) + total : total);
    }
  }
}

template <Kind K, bool GROUPED>
void along_of(const Matrix& b, const float* x, int vectors, int ldx, const float* scale, int ld_scale, float* c, int ldc, bool add) {
  int m = 0;
  for (; m + 4 <= vectors; m += 4) {
    along_strip<K, 4, GROUPED>(b, x + int64_t(m) * ldx, ldx, scale, ld_scale, c + int64_t(m) * ldc, ldc, add);
  }
  const float* rest_x = x + int64_t(m) * ldx;
  float* rest_c = c + int64_t(m) * ldc;
  switch (vectors - m) {
    case 3: along_strip<K, 3, GROUPED>(b, rest_x, ldx, scale, ld_scale, rest_c, ldc, add); break;
    case 2: along_strip<K, 2, GROUPED>(b, rest_x, ldx, scale, ld_scale, rest_c, ldc, add); break;
    case 1: along_strip<K, 1, GROUPED>(b, rest_x, ldx, scale, ld_scale, rest_c, ldc, add); break;
    default: break;
  }
}

#define KVFOLD_FOR_KIND(kind, call)                  \
  switch (kind) {                                    \
    case Kind::F32: call(Kind::F32); break;          \
    case Kind::BF16: call(Kind::BF16); break;        \
    case Kind::F16: call(Kind::F16); break;          \
    case Kind::E4M3: call(Kind::E4M3); break;        \
    case Kind::E5M2: call(Kind::E5M2); break;        \
    case Kind::I8: call(Kind::I8); break;            \
    case Kind::I4: call(Kind::I4); break;            \
    case Kind::I2: call(Kind::I2); break;            \
    case Kind::T4: call(Kind::T4); break;            \
    case Kind::T3: call(Kind::T3); break;            \
    case Kind::T2: call(Kind::T2); break;            \
    case Kind::T1: call(Kind::T1); break;            \
    case Kind::T5: call(Kind::T5); break;            \
    case Kind::T6: call(Kind::T6); break;            \
  }

// A: [groups][vectors, lda], `group_stride` floats from one group to the next; the first `k_end` lines are used.
void across(Kind kind, const Matrix& b, int k_end, const float* a, int vectors, int lda, int64_t group_stride, float* c, int ldc) {
#define KVFOLD_CALL(K)                                                                                \
  b.groups > 1 ? across_of<K, true>(b, k_end, a, vectors, lda, group_stride, c, ldc)                  \
               : across_of<K, false>(b, k_end, a, vectors, lda, group_stride, c, ldc)
  KVFOLD_FOR_KIND(kind, KVFOLD_CALL)
#undef KVFOLD_CALL
}

// scale: [groups, ld_scale] or null; C is written for lines rounded up to W.
void along(Kind kind, const Matrix& b, const float* x, int vectors, int ldx, const float* scale, int ld_scale, float* c, int ldc,
           bool add) {
#define KVFOLD_CALL(K)                                                                                \
  b.groups > 1 ? along_of<K, true>(b, x, vectors, ldx, scale, ld_scale, c, ldc, add)                  \
               : along_of<K, false>(b, x, vectors, ldx, scale, ld_scale, c, ldc, add)
  KVFOLD_FOR_KIND(kind, KVFOLD_CALL)
#undef KVFOLD_CALL
}

inline int per_byte_of(Kind kind) {
#define KVFOLD_CALL(K) return per_byte<K>()
  KVFOLD_FOR_KIND(kind, KVFOLD_CALL)
#undef KVFOLD_CALL
  return 1;
}

// Whether whole vectors of codes share a group of scales, in every run of the packing.
inline bool aligned(Kind kind, int columns, int groups) {
  return columns % (W * per_byte_of(kind)) == 0 && columns / groups % W == 0;
}

inline float code_at(Kind kind, const uint8_t* line, int n, int columns, const float* levels) {
  uint8_t padded[4 * W] = {};
  vf x[4];
  if (in_table(kind)) return levels[table_code(kind, line, n, columns)];
  const int per = per_byte_of(kind);
  if (per > 1) {
    const int run = columns / per, width = 8 / per;
    return float(line[n % run] >> (n / run * width) & ((1 << width) - 1));
  }
  switch (kind) {
    case Kind::F32: memcpy(padded, line + 4 * n, 4); load_codes<Kind::F32>(padded, 0, x); break;
    case Kind::BF16: memcpy(padded, line + 2 * n, 2); load_codes<Kind::BF16>(padded, 0, x); break;
    case Kind::F16: memcpy(padded, line + 2 * n, 2); load_codes<Kind::F16>(padded, 0, x); break;
    case Kind::E4M3: padded[0] = line[n]; load_codes<Kind::E4M3>(padded, 0, x); break;
    case Kind::E5M2: padded[0] = line[n]; load_codes<Kind::E5M2>(padded, 0, x); break;
    default: return float(line[n]);
  }
  return x[0][0];
}

template <Kind K>
void convert_of(const uint8_t* line, int columns, const float* levels, float* out) {
  constexpr int per = per_byte<K>();
  const int run = columns / per;
  for (int n = 0; n < run; n += W) {
    vf x[per];
    load_line<K>(line, n, columns, levels, x);
    for (int p = 0; p < per; p++) store(out + n + p * run, x[p]);
  }
}

// The codes of a line as floats; those of tables as their levels.
void convert(Kind kind, const uint8_t* line, int columns, const float* levels, float* out) {
  if (columns % (W * per_byte_of(kind))) {
    for (int n = 0; n < columns; n++) out[n] = code_at(kind, line, n, columns, levels);
    return;
  }
#define KVFOLD_CALL(K) convert_of<K>(line, columns, levels, out)
  KVFOLD_FOR_KIND(kind, KVFOLD_CALL)
#undef KVFOLD_CALL
}

}  // namespace
}  // namespace kvfold
