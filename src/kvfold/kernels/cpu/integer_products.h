// The product `across` (products.h) in integers: C[m, n] += Σ_k A[m, k] codes[k, n], for codes of 8, 4 or 2 bits as they lie.
//
// Four lines of codes are interleaved in registers, so that one instruction (vpdpbusd) multiplies four codes of 16 columns with
// four signed bytes of A. A is rounded to integers times a step for each vector: for 8-bit codes to 16 bits, as two bytes
// (n = 256 high + low), for 4- and 2-bit codes to one byte. Codes are centred for this: x = s (c - middle) + centre, and what n
// Σ middle comes to is taken away again with the n that was really used, so that the error of a product is that of
//
//     Σ_k e_k (c_k - middle),  |e_k| <= step / 2,  step = max |A s| / 127, or max |A s| / 32639 with two bytes.
//
// The codes' own rounding is up to half a step of each *code*, that is Σ_k A_k s_k r_k with |r_k| <= 1/2.
#pragma once
#include "products.h"

namespace kvfold {
namespace {

// Vectors in integers. Rows are [group][vector][byte], high bytes first.
struct Rounded {
  int8_t* rows;
  int ld;
  float *step, *offset;  // [groups, vectors]; offset: what is the same for all columns of a group
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

// Whether integers are faster. Without VNNI two products of a byte are added in 16 bits, which 8-bit codes would overflow.
constexpr bool integers_pay(Kind kind) {
#if defined(__AVX2__)
  return kind == Kind::I4 || kind == Kind::I2 || (kind == Kind::I8 && kHasDot);
#else
  return false;
#endif
}

template <Kind K>
constexpr int bytes_of_vector() {
  return K == Kind::I8 ? 2 : 1;
}

inline vi round_to_int(vf x) {
#if defined(__AVX512F__)
  return bits<vi>(_mm512_cvtps_epi32(bits<__m512>(x)));
#elif defined(__AVX2__)
  return bits<vi>(_mm256_cvtps_epi32(bits<__m256>(x)));
#else
  return __builtin_convertvector(x, vi);
#endif
}

// The lowest byte of each element.
inline void store_low_bytes(int8_t* to, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256(bits<__m256i>(x), _mm256_set1_epi32(255));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < W; i++) to[i] = int8_t(x[i]);
#endif
}

// N vectors of integers as bytes: one each (-127 … 127), or two (n = 256 high + low), the low ones `ld` after the high ones.
template <int BYTES, int N>
inline void store_bytes(int8_t* to, int ld, const vi* n) {
#if defined(__AVX512F__)
  if constexpr (N == 8) {
    store_bytes<BYTES, 4>(to, ld, n);
    store_bytes<BYTES, 4>(to + 4 * W, ld, n + 4);
    return;
  }
  if constexpr (N == 4) {  // words, then bytes, come lane by lane
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i a = _mm512_packs_epi32(bits<__m512i>(n[0]), bits<__m512i>(n[1]));
    const __m512i b = _mm512_packs_epi32(bits<__m512i>(n[2]), bits<__m512i>(n[3]));
    if constexpr (BYTES == 1) {
      _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b)));
    } else {
      const __m512i half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
      const __m512i high_a = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8), high_b = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
      const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
      _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(high_a, high_b)));
      _mm512_storeu_si512(to + ld, _mm512_permutexvar_epi32(order, lows));
    }
    return;
  }
#endif
  for (int j = 0; j < N; j++) {
    if (BYTES == 2) store_low_bytes(to + j * W, (n[j] + 128) >> 8);
    store_low_bytes(to + (BYTES - 1) * ld + j * W, n[j]);
  }
}

// VECTORS rows of `a` in one group, from vector m0 on: x [vectors, ld] ∘ scale [ld], and the zeros' share of the offset. With N,
// ld is N * W and stays in registers; with N = 0 it is any multiple of W.
template <int BYTES, int N, int VECTORS, bool CENTRED>
void round_by(const float* x, int m0, int vectors, int ld, const float* scale, const float* zero, float middle, const Rounded& a,
              int group) {
  constexpr float most = BYTES == 2 ? 127 * 256 + 127 : 127;
  constexpr int STEP = N ? N : 1;
  const int length = N ? N * W : ld, at = group * vectors + m0;
  const float* from = x + int64_t(m0) * ld;
  vi magnitude[4] = {};
  vf offset[4] = {}, scaled[VECTORS][STEP];
  const auto scale_at = [&](int i) {
#pragma GCC unroll 8
    for (int j = 0; j < STEP; j++) {
      const vf s = load(scale + i + j * W);
#pragma GCC unroll 4
      for (int m = 0; m < VECTORS; m++) scaled[m][j] = load(from + m * ld + i + j * W) * s;
    }
  };
  for (int i = 0; i < length; i += STEP * W) {
    scale_at(i);
#pragma GCC unroll 8
    for (int j = 0; j < STEP; j++) {
      const vf centre = CENTRED ? load(zero + i + j * W) + load(scale + i + j * W) * middle : vf{};
#pragma GCC unroll 4
      for (int m = 0; m < VECTORS; m++) {
        const vi each = bits<vi>(scaled[m][j]) & 0x7fffffff;  // compared as integers, so that a NaN is larger than all
        magnitude[m] = magnitude[m] > each ? magnitude[m] : each;
        if constexpr (CENTRED) offset[m] += load(from + m * ld + i + j * W) * centre;
      }
    }
  }
  const quad top = bits<quad>(each_of<int_quad>(magnitude, [](auto p, auto q) { return p > q ? p : q; }));
  const quad step = top * (1 / most), inverse = top > quad{} + 1e-30f ? most / top : quad{};
  vi total[VECTORS] = {};
  for (int i = 0; i < length; i += STEP * W) {
    if (!N) scale_at(i);
#pragma GCC unroll 4
    for (int m = 0; m < VECTORS; m++) {
      vi n[STEP];
#pragma GCC unroll 8
      for (int j = 0; j < STEP; j++) {
        n[j] = round_to_int(scaled[m][j] * inverse[m]);
        total[m] += n[j];
      }
      store_bytes<BYTES, STEP>(a.rows + int64_t(at + m) * BYTES * a.ld + i, a.ld, n);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < VECTORS; m++) offset[m] += __builtin_convertvector(total[m], vf) * (-middle * step[m]);
  const quad offsets = each_of<quad>(offset, [](auto p, auto q) { return p + q; });
  memcpy(a.step + at, &step, VECTORS * sizeof(float));
  memcpy(a.offset + at, &offsets, VECTORS * sizeof(float));
}

template <int BYTES, int N, bool CENTRED>
void round_all(const float* x, int vectors, int ld, const float* scale, const float* zero, float middle, const Rounded& a, int group) {
  constexpr int most = W == 16 && N == 4 ? 3 : 1;  // what registers hold
  int m = 0;
  for (; m + most <= vectors; m += most) round_by<BYTES, N, most, CENTRED>(x, m, vectors, ld, scale, zero, middle, a, group);
  for (; m < vectors; m++) round_by<BYTES, N, 1, CENTRED>(x, m, vectors, ld, scale, zero, middle, a, group);
}

// One group's rows of `a`. `zero` [ld]: what a code of 0 stands for, or null where codes are symmetric.
template <int BYTES, bool CENTRED>
void round_vectors(const float* x, int vectors, int ld, const float* scale, const float* zero, float middle, const Rounded& a,
                   int group) {
  const auto round = ld == 4 * W ? round_all<BYTES, 4, CENTRED> : ld == 8 * W ? round_all<BYTES, 8, CENTRED> : round_all<BYTES, 0, CENTRED>;
  round(x, vectors, ld, scale, zero, middle, a, group);
}

#if defined(__AVX2__)

// acc[i] + Σ_j codes[4 i + j] a[j], codes as unsigned bytes, a the four signed bytes at `four`.
inline vi dot4(vi acc, vu codes, const int8_t* four) {
  int32_t a;
  memcpy(&a, four, 4);
#if defined(__AVX512VNNI__)
  return bits<vi>(_mm512_dpbusd_epi32(bits<__m512i>(acc), bits<__m512i>(codes), _mm512_set1_epi32(a)));
#elif defined(__AVXVNNI__)
  return bits<vi>(_mm256_dpbusd_avx_epi32(bits<__m256i>(acc), bits<__m256i>(codes), _mm256_set1_epi32(a)));
#else
  const __m256i pairs = _mm256_maddubs_epi16(bits<__m256i>(codes), _mm256_set1_epi32(a));
  return acc + bits<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// Of packed bytes, the codes of run p; with VNNI still in their place within the byte, which `weight` makes up for.
template <Kind K>
inline vu piece(vu packed, int p) {
  constexpr int width = 8 / per_byte<K>();
  constexpr uint32_t mask = ((1u << width) - 1) * 0x01010101u;
  if constexpr (K == Kind::I8) return packed;
  return kHasDot ? packed & (mask << (p * width)) : (packed >> (p * width)) & mask;
}

template <Kind K>
constexpr float weight(int p) {
  return kHasDot ? 1.0f / float(1 << (p * 8 / per_byte<K>())) : 1.0f;
}

// CHUNKS * W bytes of each of four lines, as CHUNKS vectors whose elements hold one byte of every line. With 4 chunks columns
// come in an order that `in_order` undoes.
template <int CHUNKS>
inline void interleave(const uint8_t* line, int64_t next, vu* out) {
#if defined(__AVX512F__)
  const __m512i by_column = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  if constexpr (CHUNKS == 4) {
    const __m512i a = _mm512_loadu_si512(line), b = _mm512_loadu_si512(line + next);
    const __m512i c = _mm512_loadu_si512(line + 2 * next), d = _mm512_loadu_si512(line + 3 * next);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
    const __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
    out[0] = bits<vu>(_mm512_unpacklo_epi16(ab, cd));
    out[1] = bits<vu>(_mm512_unpackhi_epi16(ab, cd));
    out[2] = bits<vu>(_mm512_unpacklo_epi16(ab2, cd2));
    out[3] = bits<vu>(_mm512_unpackhi_epi16(ab2, cd2));
  } else if constexpr (CHUNKS == 2) {
    auto two = [&](const uint8_t* at) {
      if (next == 2 * W) return _mm512_loadu_si512(at);
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + next)), 1);
    };
    const __m512i ab = two(line), cd = two(line + 2 * next);
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i later = _mm512_add_epi32(lanes, _mm512_set1_epi32(4));
    out[0] = bits<vu>(_mm512_shuffle_epi8(_mm512_permutex2var_epi32(ab, lanes, cd), by_column));
    out[1] = bits<vu>(_mm512_shuffle_epi8(_mm512_permutex2var_epi32(ab, later, cd), by_column));
  } else {
    auto one = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + i * next)); };
    __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(one(0)), one(1), 1);
    x = next == W ? _mm512_loadu_si512(line) : _mm512_inserti32x4(_mm512_inserti32x4(x, one(2), 2), one(3), 3);
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    out[0] = bits<vu>(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, x), by_column));
  }
#else
  if constexpr (CHUNKS == 4) {
    auto one = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + i * next)); };
    const __m256i ab = _mm256_unpacklo_epi8(one(0), one(1)), ab2 = _mm256_unpackhi_epi8(one(0), one(1));
    const __m256i cd = _mm256_unpacklo_epi8(one(2), one(3)), cd2 = _mm256_unpackhi_epi8(one(2), one(3));
    out[0] = bits<vu>(_mm256_unpacklo_epi16(ab, cd));
    out[1] = bits<vu>(_mm256_unpackhi_epi16(ab, cd));
    out[2] = bits<vu>(_mm256_unpacklo_epi16(ab2, cd2));
    out[3] = bits<vu>(_mm256_unpackhi_epi16(ab2, cd2));
  } else {
    auto one = [&](int i) {
      const __m128i* at = reinterpret_cast<const __m128i*>(line + i * next);
      return CHUNKS == 2 ? _mm_loadu_si128(at) : _mm_loadl_epi64(at);
    };
    const __m128i a = one(0), b = one(1), c = one(2), d = one(3);
    auto four = [](__m128i ab, __m128i cd) {
      return bits<vu>(_mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)));
    };
    out[0] = four(_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
    if constexpr (CHUNKS == 2) out[1] = four(_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
  }
#endif
}

// From the order of columns that `interleave<4>` leaves to that of memory.
inline void in_order(vf* x) {
#if defined(__AVX512F__)
  __m512 v[4];
  for (int i = 0; i < 4; i++) v[i] = bits<__m512>(x[i]);
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  x[0] = bits<vf>(_mm512_shuffle_f32x4(a, b, 0x88));
  x[1] = bits<vf>(_mm512_shuffle_f32x4(a, b, 0xdd));
  x[2] = bits<vf>(_mm512_shuffle_f32x4(c, d, 0x88));
  x[3] = bits<vf>(_mm512_shuffle_f32x4(c, d, 0xdd));
#else
  __m256 v[4];
  for (int i = 0; i < 4; i++) v[i] = bits<__m256>(x[i]);
  for (int i = 0; i < 2; i++) {
    x[i] = bits<vf>(_mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x20));
    x[i + 2] = bits<vf>(_mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x31));
  }
#endif
}

// MR vectors with the columns of CHUNKS * W bytes of every line, from byte n0 on. `fetch`: bytes of four lines to ask for.
template <Kind K, int CHUNKS, int MR, bool GROUPED>
inline void integer_tile(const Matrix& b, int lines, const Rounded& a, int vectors, int m0, float* c, int ldc, bool add, int n0,
                         int64_t fetch) {
  constexpr int per = per_byte<K>(), N = CHUNKS * per, BYTES = bytes_of_vector<K>(), R = MR * BYTES;
  const int run = b.columns / per, group_width = b.columns / b.groups;
  vi acc[R][N] = {};
  int at[N], group[N];
  const int8_t* rows[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) {
    at[j] = n0 + j / per * W + j % per * run;
    group[j] = GROUPED ? at[j] / group_width : 0;
    rows[j] = a.rows + int64_t(group[j] * vectors + m0) * BYTES * a.ld;
  }
  const uint8_t* line = b.codes;
  for (int k = 0; k < lines; k += 4, line += 4 * b.line_bytes) {
    for (int64_t i = 0; i < fetch; i += 64) __builtin_prefetch(line + i + b.ahead);
    vu packed[CHUNKS];
    interleave<CHUNKS>(line + n0, b.line_bytes, packed);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      const vu codes = piece<K>(packed[j / per], j % per);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][j] = dot4(acc[r][j], codes, rows[GROUPED ? j : 0] + r * a.ld + k);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++) {
    vf x[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      const int which = group[j] * vectors + m0 + m;
      x[j] = __builtin_convertvector(acc[m * BYTES][j], vf);
      if (BYTES == 2) x[j] = x[j] * 256.0f + __builtin_convertvector(acc[m * BYTES + BYTES - 1][j], vf);
      x[j] = x[j] * (a.step[which] * weight<K>(j % per)) + a.offset[which];
    }
    if constexpr (CHUNKS == 4) in_order(x);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      float* to = c + int64_t(m0 + m) * ldc + at[j];
      store(to, add ? load(to) + x[j] : x[j]);
    }
  }
}

template <Kind K, int MR, bool GROUPED>
void integer_strip(const Matrix& b, int lines, const Rounded& a, int vectors, int m0, float* c, int ldc, bool add) {
  constexpr int per = per_byte<K>(), chunks = 4 / per;
  const int run = b.columns / per;
  int64_t fetch = b.ahead && m0 == 0 ? 4 * b.line_bytes : 0;
  int n = 0;
  // The columns of four chunks lie out of order, so they must be of one group.
  for (; n + chunks * W <= run && !(GROUPED && chunks == 4); n += chunks * W, fetch = 0) {
    integer_tile<K, chunks, MR, GROUPED>(b, lines, a, vectors, m0, c, ldc, add, n, fetch);
  }
  for (; n < run; n += W, fetch = 0) integer_tile<K, 1, MR, GROUPED>(b, lines, a, vectors, m0, c, ldc, add, n, fetch);
}

template <Kind K, bool GROUPED>
void integer_across_of(const Matrix& b, int lines, const Rounded& a, int vectors, float* c, int ldc, bool add) {
  int m = 0;
  for (; m + 3 <= vectors; m += 3) integer_strip<K, 3, GROUPED>(b, lines, a, vectors, m, c, ldc, add);
  if (vectors - m == 2) integer_strip<K, 2, GROUPED>(b, lines, a, vectors, m, c, ldc, add);
  if (vectors - m == 1) integer_strip<K, 1, GROUPED>(b, lines, a, vectors, m, c, ldc, add);
}

// C [vectors, ldc] (+)= step Σ_k n_k codes_k + offset, over `lines` lines, a multiple of 4.
void integer_across(Kind kind, const Matrix& b, int lines, const Rounded& a, int vectors, float* c, int ldc, bool add) {
  const bool grouped = b.groups > 1;
#define KVFOLD_CALL(K) \
  grouped ? integer_across_of<K, true>(b, lines, a, vectors, c, ldc, add) : integer_across_of<K, false>(b, lines, a, vectors, c, ldc, add)
  switch (kind) {
    case Kind::I4: KVFOLD_CALL(Kind::I4); break;
    case Kind::I2: KVFOLD_CALL(Kind::I2); break;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    case Kind::I8: KVFOLD_CALL(Kind::I8); break;
#endif
    default: break;
  }
#undef KVFOLD_CALL
}

#else
void integer_across(Kind, const Matrix&, int, const Rounded&, int, float*, int, bool) {}
#endif

}  // namespace
}  // namespace kvfold
