// Codes that name the levels of a table: a table of up to 16 floats fits into one AVX-512 register, or two of AVX2, so that a
// lookup is one permutation or two.
#pragma once
#include "vectors.h"

namespace kvfold {
namespace {

constexpr bool in_table(Kind kind) { return kind == Kind::T4 || kind == Kind::T3 || kind == Kind::T2; }

// The levels that the lowest COUNT's worth of bits of each element name, or more bits: `levels` are repeated to fill 16 places.
template <int COUNT>
inline vf lookup(const float* levels, vu code) {
#if defined(__AVX512F__)
  return bits<vf>(_mm512_permutexvar_ps(bits<__m512i>(code), _mm512_loadu_ps(levels)));
#elif defined(__AVX2__)
  const __m256i which = bits<__m256i>(code);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), which);
  if constexpr (COUNT <= 8) return bits<vf>(low);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), which);
  return bits<vf>(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(which, 28))));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = levels[code[i] % COUNT];
  return x;
#endif
}

// 4 in every element whose bit is set in the plane of single bits, from place n on, a multiple of W.
inline vu high_bits(const uint8_t* plane, int n) {
#if defined(__AVX512F__)
  uint16_t mask;
  memcpy(&mask, plane + n / 8, 2);
  return bits<vu>(_mm512_maskz_set1_epi32(mask, 4));
#else
  const uint32_t byte = plane[n / 8] >> n % 8;  // W is 8, or 4 and a half of a byte
  vu each;
  for (int i = 0; i < W; i++) each[i] = 1u << i;
  return bits<vu>((each & byte) != vu{}) & 4u;
#endif
}

// W numbers of every run of a line, from place n of the runs on: per_byte vectors. The line has `columns` of them.
template <Kind K>
inline void load_line(const uint8_t* line, int n, int columns, const float* levels, vf* out) {
  if constexpr (!in_table(K)) {
    load_codes<K>(line, n, out);
  } else {
    constexpr int per = per_byte<K>(), width = 8 / per;
    const vu x = load_bytes(line + n);
    for (int i = 0; i < per; i++) {
      const vu code = x >> (i * width);
      if constexpr (K == Kind::T3) {
        out[i] = lookup<8>(levels, (code & 3u) | high_bits(line + columns / 4, n + i * (columns / per)));
      } else {
        out[i] = lookup<1 << width>(levels, code);
      }
    }
  }
}

}  // namespace
}  // namespace kvfold
