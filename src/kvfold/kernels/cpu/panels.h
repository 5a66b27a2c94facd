// Many vectors, as those of a prompt, meet a block in tiles: its K and V become numbers once, and panels of vectors that fit into
// the first cache beside them go through scores, softmax and sums before the next panel does.
//
// Numbers are floats; or, where the machine multiplies bfloat16 (vdpbf16ps) and the queries come from a model of that type, pairs
// of bfloat16 with sums in float32, as flash attention does it: q, k, p and v are each rounded to the nearest, by 2^-8 of itself
// at most. A pair is two neighbours of the sum: channels of q and K, tokens of p and V. Keys and values that were cached in
// bfloat16 lie so already, and are not rounded at all.
#pragma once
#include "restore.h"

namespace kvfold {
namespace {

constexpr int kPanel = 48;  // vectors: with tiles of 64 tokens and a head dim of 64 some 40 KB of pairs and floats

#if defined(__AVX512BF16__)

// x [count] to bfloat16, two a word; count a multiple of W.
inline void round_pairs(const float* x, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += W) {
    const __m256bh rounded = _mm512_cvtneps_pbh(bits<__m512>(load(x + i)));
    memcpy(to + i / 2, &rounded, sizeof(rounded));
  }
}

// Lines of floats x [count, ld] to pairs of lines, [(count + 1) / 2, ld]; behind the last of an odd number are zeros.
inline void pair_lines(const float* x, int count, int ld, uint32_t* to) {
  const __m512i first = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  for (int l = 0; l < count; l += 2) {
    const float* line = x + int64_t(l) * ld;
    for (int n = 0; n < ld; n += W) {
      const __m512 low = bits<__m512>(load(line + n));
      const __m512 high = l + 1 < count ? bits<__m512>(load(line + ld + n)) : _mm512_setzero_ps();
      const __m512i both = bits<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      _mm512_storeu_si512(to + int64_t(l / 2) * ld + n, _mm512_permutexvar_epi16(first, both));
    }
  }
}

// The same of tokens that lie in bfloat16; columns a multiple of W.
inline void pair_tokens(const uint8_t* x, int64_t line_bytes, int count, int columns, int ld, uint32_t* to) {
  for (int t = 0; t < count; t += 2, x += 2 * line_bytes) {
    for (int n = 0; n < columns; n += W) {
      vu pairs = load_words(x + 2 * n);
      if (t + 1 < count) pairs |= load_words(x + line_bytes + 2 * n) << 16;
      memcpy(to + int64_t(t / 2) * ld + n, &pairs, sizeof(pairs));
    }
  }
}

// to [16 words, ld] = the transposed of 16 lines of 16 words.
inline void transpose_words(const uint8_t* const* lines, int64_t offset, uint32_t* to, int ld) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) b[i] = _mm512_loadu_si512(lines[i] + offset);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(b[i], b[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // lane n of b[i + j]: word 4 n + j of lines i to i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i even = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88), odd2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
    _mm512_storeu_si512(to + int64_t(j) * ld, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_storeu_si512(to + int64_t(j + 4) * ld, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(to + int64_t(j + 8) * ld, _mm512_shuffle_i32x4(even, even2, 0xdd));
    _mm512_storeu_si512(to + int64_t(j + 12) * ld, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

// Tokens of bfloat16 to pairs of channels, [columns / 2, ld]; columns a multiple of 32. Places after `count` repeat its last token.
inline void pair_channels(const uint8_t* x, int64_t line_bytes, int count, int columns, int ld, uint32_t* to) {
  for (int t = 0; t < ld && t < count; t += 16) {
    const uint8_t* lines[16];
    for (int i = 0; i < 16; i++) lines[i] = x + (t + i < count ? t + i : count - 1) * line_bytes;
    for (int n = 0; n < columns; n += 32) transpose_words(lines, 2 * n, to + int64_t(n / 2) * ld + t, ld);
  }
}

template <int MR, int N>
inline void pair_tile(const uint32_t* a, int lda, const uint32_t* b, int ldb, int num_pairs, float* c, int ldc, bool add) {
  __m512 acc[MR][N];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) acc[m][j] = add ? bits<__m512>(load(c + int64_t(m) * ldc + j * W)) : _mm512_setzero_ps();
  }
  for (int k = 0; k < num_pairs; k++, b += ldb) {
    __m512bh x[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) x[j] = bits<__m512bh>(_mm512_loadu_si512(b + j * W));
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const __m512bh pair = bits<__m512bh>(_mm512_set1_epi32(int(a[int64_t(m) * lda + k])));
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], pair, x[j]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(c + int64_t(m) * ldc + j * W, bits<vf>(acc[m][j]));
  }
}

template <int MR>
void pair_strip(const uint32_t* a, int lda, const uint32_t* b, int ldb, int num_pairs, float* c, int ldc, int columns, bool add) {
  int n = 0;
  for (; n + 4 * W <= columns; n += 4 * W) pair_tile<MR, 4>(a, lda, b + n, ldb, num_pairs, c + n, ldc, add);
  for (; n < columns; n += W) pair_tile<MR, 1>(a, lda, b + n, ldb, num_pairs, c + n, ldc, add);
}

// C [vectors, columns] = A [vectors, pairs] · B [pairs, columns], or added to C; columns a multiple of W.
void pair_product(const uint32_t* a, int vectors, int lda, const uint32_t* b, int ldb, int num_pairs, float* c, int ldc, int columns,
                  bool add) {
  int m = 0;
  for (; m + 6 <= vectors; m += 6) {
    pair_strip<6>(a + int64_t(m) * lda, lda, b, ldb, num_pairs, c + int64_t(m) * ldc, ldc, columns, add);
  }
  for (; m < vectors; m++) pair_strip<1>(a + int64_t(m) * lda, lda, b, ldb, num_pairs, c + int64_t(m) * ldc, ldc, columns, add);
}

// 2^x for |x| <= 1/2, to 8e-5 of it: rounding to bfloat16 adds up to 4e-3.
inline vf exp2_coarse(vf x) {
  vf y = all(5.517166397e-2f);
  y = y * x + 2.426111218e-1f;
  y = y * x + 6.932609864e-1f;
  return y * x + 9.999280736e-1f;
}

// A panel's scores [vectors, T] become probabilities, relative to the largest score so far, in pairs at the beginning of their own
// line; what was added up before shrinks with it. N vectors of W at a time.
template <int N>
void soften_pairs(const Task& task, const Workspace& w) {
  constexpr float log2e = 1.44269504088896341f;
  for (int m = 0; m < task.end - task.first; m++) {
    float *totals = w.totals + int64_t(m) * W, *scores = w.scores + int64_t(m) * w.ld_t;
    vf tops = load(scores);
    for (int t = W; t < w.ld_t; t += W) tops = larger(tops, load(scores + t));
    if (any_larger(tops, task.top[m])) {
      const float top = largest(tops), shrink = exp_negative(all(task.top[m] - top))[0];
      float* out = task.out + int64_t(m) * w.ld_d;
      for (int d = 0; d < w.ld_d; d += W) store(out + d, load(out + d) * shrink);
      store(totals, load(totals) * shrink);
      task.top[m] = top;
    }
    const vf least = all((task.top[m] < -1e38f ? -1e38f : task.top[m]) * log2e);
    vf total = load(totals);
    for (int t = 0; t < w.ld_t; t += N * W) {
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        const __m512 x = bits<__m512>(load(scores + t + j * W) * log2e - least);
        const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
        const __mmask16 stays = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.5f), _CMP_NLT_UQ);  // NaN stays
        const __m512 fraction = bits<__m512>(exp2_coarse(bits<vf>(_mm512_sub_ps(x, whole))));
        const __m512 p = _mm512_maskz_scalef_ps(stays, fraction, whole);
        total += bits<vf>(p);
        const __m256bh rounded = _mm512_cvtneps_pbh(p);
        memcpy(scores + (t + j * W) / 2, &rounded, sizeof(rounded));
      }
    }
    store(totals, total);
  }
}

constexpr bool kHasPairs = true;

#else

constexpr bool kHasPairs = false;

#endif

// Where a task with many vectors keeps what `Workspace` has no place for: the block's tiles, and vectors in pairs.
struct Panels {
  bool in_pairs;
  float* values;  // [T, ld_d]; K's numbers, [D, ld_t], are in the workspace's scratch
  uint32_t *q, *k, *v;
  int64_t size;  // in floats

  Panels(const Shape& shape, const Workspace& w, int vectors, float* at) : in_pairs(kHasPairs && shape.in_bf16) {
    float* next = at;
    auto take = [&next](int64_t n) {
      float* taken = next;
      next += (n + 15) / 16 * 16;
      return taken;
    };
    auto words = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(in_pairs ? n : 0)); };
    values = take(int64_t(w.ld_t) * w.ld_d);
    q = words(int64_t(vectors) * w.ld_d / 2);
    k = words(int64_t(w.ld_d) / 2 * w.ld_t);
    v = words(int64_t(w.ld_t) / 2 * w.ld_d);
    size = next - at;
  }

  void take_queries([[maybe_unused]] const Workspace& w, [[maybe_unused]] int vectors) const {
#if defined(__AVX512BF16__)
    if (in_pairs) round_pairs(w.q, int64_t(vectors) * w.ld_d, q);
#endif
  }

  void take_keys(const Side& side, int64_t id, const uint8_t* codes, int count, int head_dim, int block, const Workspace& w) const {
#if defined(__AVX512BF16__)
    if (in_pairs && side.kind == Kind::BF16 && !side.repairs.rank && !side.repairs.outliers && head_dim % 32 == 0) {
      pair_channels(codes, side.line_bytes, count, head_dim, w.ld_t, k);
      return;
    }
#endif
    restore(side, id, codes, count, head_dim, block, false, w);
#if defined(__AVX512BF16__)
    if (in_pairs) pair_lines(w.scratch, head_dim, w.ld_t, k);
#endif
  }

  void take_values(const Side& side, int64_t id, const uint8_t* codes, int count, int head_dim, int block, const Workspace& w) const {
#if defined(__AVX512BF16__)
    if (in_pairs && side.kind == Kind::BF16 && !side.repairs.rank && !side.repairs.outliers && head_dim % W == 0) {
      pair_tokens(codes, side.line_bytes, count, head_dim, w.ld_d, v);
      return;
    }
#endif
    Workspace there = w;
    there.scratch = values;
    restore(side, id, codes, count, head_dim, block, true, there);
#if defined(__AVX512BF16__)
    if (in_pairs) pair_lines(values, count, w.ld_d, v);
#endif
  }

  // w.scores [vectors, T] of a panel that begins at vector `first` of the task
  void score(int first, int vectors, int head_dim, const Workspace& w) const {
#if defined(__AVX512BF16__)
    if (in_pairs) {
      pair_product(q + int64_t(first) * w.ld_d / 2, vectors, w.ld_d / 2, k, w.ld_t, (head_dim + 1) / 2, w.scores, w.ld_t, w.ld_t, false);
      return;
    }
#endif
    const Matrix numbers = {reinterpret_cast<uint8_t*>(w.scratch), int64_t(sizeof(float)) * w.ld_t, head_dim, w.ld_t, 1};
    memset(w.scores, 0, sizeof(float) * vectors * w.ld_t);
    across(Kind::F32, numbers, head_dim, w.q + int64_t(first) * w.ld_d, vectors, w.ld_d, 0, w.scores, w.ld_t);
  }

  // Whether scores became probabilities here; else `soften` of the kernels does it.
  bool soften([[maybe_unused]] const Task& panel, [[maybe_unused]] const Workspace& w) const {
#if defined(__AVX512BF16__)
    if (in_pairs) {
      w.ld_t % (4 * W) ? soften_pairs<1>(panel, w) : soften_pairs<4>(panel, w);
      return true;
    }
#endif
    return false;
  }

  // out [vectors, D] += Σ_t p_t v_t
  void combine(int vectors, int count, const Workspace& w, float* out) const {
#if defined(__AVX512BF16__)
    if (in_pairs) {
      const uint32_t* p = reinterpret_cast<const uint32_t*>(w.scores);
      pair_product(p, vectors, w.ld_t, v, w.ld_d, (count + 1) / 2, out, w.ld_d, w.ld_d, true);
      return;
    }
#endif
    const Matrix numbers = {reinterpret_cast<uint8_t*>(values), int64_t(sizeof(float)) * w.ld_d, count, w.ld_d, 1};
    across(Kind::F32, numbers, count, w.scores, vectors, w.ld_t, 0, out, w.ld_d);
  }
};

}  // namespace
}  // namespace kvfold
