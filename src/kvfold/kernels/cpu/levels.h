// Codes that name the levels of a table: a table of up to 16 floats fits into one AVX-512 register, or two of AVX2, so that a
// lookup is one permutation or two; larger ones take more.
#pragma once
#include "vectors.h"

namespace kvfold {
namespace {

constexpr bool in_table(Kind kind) { return kind >= Kind::T4 && kind <= Kind::T6; }

// a where the bit of `code` is set, else b.
template <int BIT>
inline vf choose(vu code, vf a, vf b) {
#if defined(__AVX512F__)
  const __mmask16 set = _mm512_test_epi32_mask(bits<__m512i>(code), _mm512_set1_epi32(BIT));
  return bits<vf>(_mm512_mask_blend_ps(set, bits<__m512>(b), bits<__m512>(a)));
#else
  return (code & uint32_t(BIT)) != vu{} ? a : b;
#endif
}

// The levels that the lowest bits of each element name, as many as COUNT levels need; up to 16 levels are repeated to fill 16
// places, and higher bits then don't matter.
template <int COUNT>
inline vf lookup(const float* levels, vu code) {
#if defined(__AVX512F__)
  constexpr int most = 32;
  if constexpr (COUNT <= 16) return bits<vf>(_mm512_permutexvar_ps(bits<__m512i>(code), _mm512_loadu_ps(levels)));
  if constexpr (COUNT == most) {
    return bits<vf>(_mm512_permutex2var_ps(_mm512_loadu_ps(levels), bits<__m512i>(code), _mm512_loadu_ps(levels + 16)));
  }
#elif defined(__AVX2__)
  constexpr int most = 8;
  if constexpr (COUNT <= most) return bits<vf>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), bits<__m256i>(code)));
#else
  constexpr int most = COUNT;
  vf x;
  for (int i = 0; i < W; i++) x[i] = levels[code[i] % COUNT];
  return x;
#endif
  if constexpr (COUNT > most) {
    return choose<COUNT / 2>(code, lookup<COUNT / 2>(levels + COUNT / 2, code), lookup<COUNT / 2>(levels, code));
  }
}

// BIT in every element whose bit is set in a plane of single bits, from place n on, a multiple of W.
template <int BIT>
inline vu bits_of_plane(const uint8_t* plane, int n) {
#if defined(__AVX512F__)
  uint16_t mask;
  memcpy(&mask, plane + n / 8, 2);
  return bits<vu>(_mm512_maskz_set1_epi32(mask, BIT));
#else
  const uint32_t byte = plane[n / 8] >> n % 8;  // W is 8, or 4 and a half of a byte
  vu each;
  for (int i = 0; i < W; i++) each[i] = 1u << i;
  return bits<vu>((each & byte) != vu{}) & uint32_t(BIT);
#endif
}

// The bits that stand above those of the first plane, from place n of the line on, a multiple of W; `plane` is the second one.
template <Kind K>
inline vu high_bits(const uint8_t* plane, int n, int columns) {
  if constexpr (K == Kind::T3) return bits_of_plane<4>(plane, n);
  if constexpr (K == Kind::T5) return bits_of_plane<16>(plane, n);
  const int run = columns / 4;
  return (load_bytes(plane + n % run) >> uint32_t(n / run * 2) & 3u) << 4;
}

// W numbers of every run of a line, from place n of the runs on: per_byte vectors. The line has `columns` of them; 6 bits want
// quarters of it to be whole vectors.
template <Kind K>
inline void load_line(const uint8_t* line, int n, int columns, const float* levels, vf* out) {
  if constexpr (!in_table(K)) {
    load_codes<K>(line, n, out);
  } else if constexpr (K == Kind::T1) {
    *out = lookup<2>(levels, bits_of_plane<1>(line, n));
  } else {
    constexpr int per = per_byte<K>(), width = 8 / per;
    const vu x = load_bytes(line + n);
    for (int i = 0; i < per; i++) {
      const vu code = x >> (i * width);
      if constexpr (K == Kind::T3 || K == Kind::T5 || K == Kind::T6) {
        constexpr int count = K == Kind::T3 ? 8 : K == Kind::T5 ? 32 : 64;
        const vu high = high_bits<K>(line + columns / per, n + i * (columns / per), columns);
        out[i] = lookup<count>(levels, (code & ((1u << width) - 1)) | high);
      } else {
        out[i] = lookup<1 << width>(levels, code);
      }
    }
  }
}

// The code at place n of a line of `columns`.
inline int table_code(Kind kind, const uint8_t* line, int n, int columns) {
  auto packed = [&](const uint8_t* plane, int width) {
    const int run = columns * width / 8;
    return plane[n % run] >> (n / run * width) & ((1 << width) - 1);
  };
  auto bit = [&](const uint8_t* plane) { return plane[n / 8] >> n % 8 & 1; };
  switch (kind) {
    case Kind::T1: return bit(line);
    case Kind::T2: return packed(line, 2);
    case Kind::T3: return packed(line, 2) | bit(line + columns / 4) << 2;
    case Kind::T4: return packed(line, 4);
    case Kind::T5: return packed(line, 4) | bit(line + columns / 2) << 4;
    default: return packed(line, 4) | packed(line + columns / 2, 2) << 4;
  }
}

}  // namespace
}  // namespace kvfold
