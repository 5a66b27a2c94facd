// Vectors of floats in GCC's and Clang's own notation, as wide as the instruction set that this is compiled for, and how codes
// become floats. Only what the notation can't say well is written with intrinsics.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention.h"

namespace kvfold {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
inline vf all(float x) { return x - vf{}; }

inline vu load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return bits<vu>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bits<vu>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vu x;
  for (int i = 0; i < W; i++) x[i] = p[i];
  return x;
#endif
}

inline vu load_words(const uint8_t* p) {
#if defined(__AVX512F__)
  return bits<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bits<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  uint16_t words[W];
  memcpy(words, p, sizeof(words));
  vu x;
  for (int i = 0; i < W; i++) x[i] = words[i];
  return x;
#endif
}

// Small integers to floats; conversion from signed ones is one instruction everywhere.
inline vf to_float(vu x) { return __builtin_convertvector(bits<vi>(x), vf); }

// Floats of fewer exponent bits: shift them into place and correct the bias by a product, which is right for subnormals too.
inline vf rebias(vu magnitude, vu sign, uint32_t scale_bits) {
  vf x = bits<vf>(magnitude) * all(bits<float>(scale_bits));
  return bits<vf>(bits<vu>(x) | sign);
}

inline vf half_to_float(vu x) {
  vu magnitude = (x & 0x7fffu) << 13;
  vf y = rebias(magnitude, (x & 0x8000u) << 16, 0x77800000u);            // 2^112
  vu special = bits<vu>((x & 0x7c00u) == vu{} + 0x7c00u) & 0x7f800000u;  // infinities and NaN
  return bits<vf>(bits<vu>(y) | special);
}

inline vf load_half(const uint8_t* p) {
#if defined(__AVX512F__)
  return bits<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bits<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return half_to_float(load_words(p));
#endif
}

inline float half_at(const uint16_t* p) {
#if defined(__F16C__)
  return _cvtsh_ss(*p);
#else
  return half_to_float(vu{} + *p)[0];
#endif
}

template <Kind K>
constexpr int per_byte() {  // of the first plane
  if (K == Kind::I4 || K == Kind::T4 || K == Kind::T5 || K == Kind::T6) return 2;
  return K == Kind::I2 || K == Kind::T2 || K == Kind::T3 ? 4 : 1;
}

template <Kind K>
constexpr int bytes_each() {  // of codes that are not packed
  return K == Kind::F32 ? 4 : K == Kind::BF16 || K == Kind::F16 ? 2 : 1;
}

// W codes of every run of a line, from place n of the runs on: per_byte vectors.
template <Kind K>
inline void load_codes(const uint8_t* line, int n, vf* out) {
  if constexpr (K == Kind::F32) {
    memcpy(out, line + 4 * n, sizeof(vf));
  } else if constexpr (K == Kind::BF16) {
    *out = bits<vf>(load_words(line + 2 * n) << 16);
  } else if constexpr (K == Kind::F16) {
    *out = load_half(line + 2 * n);
  } else if constexpr (K == Kind::E4M3) {  // NaN reads as 480: encoders never write it
    vu x = load_bytes(line + n);
    *out = rebias((x & 0x7fu) << 20, (x & 0x80u) << 24, 0x7b800000u);  // 2^120
  } else if constexpr (K == Kind::E5M2) {
    vu x = load_bytes(line + n);
    *out = rebias((x & 0x7fu) << 21, (x & 0x80u) << 24, 0x77800000u);
  } else {
    constexpr int per = per_byte<K>(), width = 8 / per;
    vu x = load_bytes(line + n);
    for (int i = 0; i < per; i++) {
      vu code = x >> (i * width);
      out[i] = to_float(i + 1 < per ? code & ((1u << width) - 1) : code);
    }
  }
}

// Element i is the sum of vector i; `v` is used up.
inline vf sums(vf* v) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int n = W / 2; n; n /= 2) {
    for (int i = 0; i < n; i++) {
      __m512 a = bits<__m512>(v[2 * i]), b = bits<__m512>(v[2 * i + 1]);
      v[i] = bits<vf>(_mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)));
    }
  }
  return v[0];
#elif defined(__AVX2__)
  __m256 half[2];
  for (int i = 0; i < 2; i++) {
    vf* x = v + 4 * i;
    half[i] = _mm256_hadd_ps(_mm256_hadd_ps(bits<__m256>(x[0]), bits<__m256>(x[1])),
                             _mm256_hadd_ps(bits<__m256>(x[2]), bits<__m256>(x[3])));
  }
  return bits<vf>(_mm256_add_ps(_mm256_permute2f128_ps(half[0], half[1], 0x20), _mm256_permute2f128_ps(half[0], half[1], 0x31)));
#else
  vf low = {v[0][0] + v[0][2], v[1][0] + v[1][2], v[2][0] + v[2][2], v[3][0] + v[3][2]};
  vf high = {v[0][1] + v[0][3], v[1][1] + v[1][3], v[2][1] + v[2][3], v[3][1] + v[3][3]};
  return low + high;
#endif
}

// Four floats or integers: what is found for four vectors at once.
typedef float quad __attribute__((vector_size(16)));
typedef int32_t int_quad __attribute__((vector_size(16)));

// Element m of the result is what `both` makes of all elements of x[m], in pairs.
template <typename Quad, typename V, typename Both>
inline Quad each_of(const V (&x)[4], Both both) {
#if defined(__AVX512F__)
  typedef decltype(V()[0] + V()[0]) number;
  typedef number half __attribute__((vector_size(32)));
  const auto low = [](V p, V q) { return bits<V>(_mm512_unpacklo_ps(bits<__m512>(p), bits<__m512>(q))); };
  const auto high = [](V p, V q) { return bits<V>(_mm512_unpackhi_ps(bits<__m512>(p), bits<__m512>(q))); };
  const V ab = both(low(x[0], x[1]), high(x[0], x[1])), cd = both(low(x[2], x[3]), high(x[2], x[3]));
  const __m512d p = bits<__m512d>(ab), q = bits<__m512d>(cd);
  const __m512d lanes = bits<__m512d>(both(bits<V>(_mm512_unpacklo_pd(p, q)), bits<V>(_mm512_unpackhi_pd(p, q))));
  const half y = both(bits<half>(_mm512_castpd512_pd256(lanes)), bits<half>(_mm512_extractf64x4_pd(lanes, 1)));
  return both(bits<Quad>(_mm256_castps256_ps128(bits<__m256>(y))), bits<Quad>(_mm256_extractf128_ps(bits<__m256>(y), 1)));
#elif defined(__AVX2__)
  const auto low = [](V p, V q) { return bits<V>(_mm256_unpacklo_ps(bits<__m256>(p), bits<__m256>(q))); };
  const auto high = [](V p, V q) { return bits<V>(_mm256_unpackhi_ps(bits<__m256>(p), bits<__m256>(q))); };
  const V ab = both(low(x[0], x[1]), high(x[0], x[1])), cd = both(low(x[2], x[3]), high(x[2], x[3]));
  const __m256d p = bits<__m256d>(ab), q = bits<__m256d>(cd);
  const __m256 lanes = bits<__m256>(both(bits<V>(_mm256_unpacklo_pd(p, q)), bits<V>(_mm256_unpackhi_pd(p, q))));
  return both(bits<Quad>(_mm256_castps256_ps128(lanes)), bits<Quad>(_mm256_extractf128_ps(lanes, 1)));
#else
  Quad y = {};
  for (int m = 0; m < 4; m++) y[m] = both(both(x[m][0], x[m][2]), both(x[m][1], x[m][3]));
  return y;
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Over the elements of a vector, by halves.
#if defined(__AVX512F__)
inline float sum(vf x) { return _mm512_reduce_add_ps(bits<__m512>(x)); }
inline float largest(vf x) { return _mm512_reduce_max_ps(bits<__m512>(x)); }
#elif defined(__AVX2__)
inline float sum(vf x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(bits<__m256>(x)), _mm256_extractf128_ps(bits<__m256>(x), 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(vf x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(bits<__m256>(x)), _mm256_extractf128_ps(bits<__m256>(x), 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#else
inline float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
#endif

inline bool any_larger(vf a, float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bits<__m512>(a), _mm512_set1_ps(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(a), _mm256_set1_ps(b), _CMP_GT_OQ));
#else
  return largest(a) > b;
#endif
}

// 2^x for |x| <= 1/2, to 1e-7 of it (fitted to the least relative error).
inline vf exp2_fraction(vf x) {
  vf y = all(1.327647173700e-3f);
  y = y * x + 9.675541540084e-3f;
  y = y * x + 5.550713276095e-2f;
  y = y * x + 2.402211972007e-1f;
  y = y * x + 6.931469670620e-1f;
  return y * x + 1.000000071655f;
}

// 2^x for |x| < 126, to about 1e-7 of it.
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  const __m512 whole = _mm512_roundscale_ps(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  return bits<vf>(_mm512_scalef_ps(bits<__m512>(exp2_fraction(x - bits<vf>(whole))), whole));
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
  vf shifted = x + magic;
  vf y = exp2_fraction(x - (shifted - magic));
  return bits<vf>(bits<vu>(y) + (bits<vu>(shifted) << 23));  // unsigned: x may be anything in places that nobody sees
#endif
}

// e^x for x <= 0, exactly 0 below -87 (and at -inf), so that no number is subnormal; NaN stays.
inline vf exp_negative(vf x) {
#if defined(__AVX512F__)
  const __m512 y = bits<__m512>(x * 1.44269504088896341f);
  const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 stays = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-125.5f), _CMP_NLT_UQ);
  return bits<vf>(_mm512_maskz_scalef_ps(stays, bits<__m512>(exp2_fraction(bits<vf>(_mm512_sub_ps(y, whole)))), whole));
#else
  vi vanishes = x < all(-87.0f);
  vf y = exp2((vanishes ? all(-87.0f) : x) * 1.44269504088896341f);
  return bits<vf>(bits<vi>(y) & ~vanishes);
#endif
}

inline vf tanh_of(vf x) {
  vf a = x < vf{} ? x : -x;  // tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
  vf e = exp_negative(2.0f * a);
  vf y = (1.0f - e) / (1.0f + e);
  return x < vf{} ? -y : y;
}

}  // namespace
}  // namespace kvfold
