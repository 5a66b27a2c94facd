// How codes of less than a byte come to lie in bytes; kvfold/store/pack.py is the definition.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "vectors.h"

namespace kvfold {
namespace {

// W codes to memory, a byte each, `count` of them if these are fewer.
inline void store_codes(vu code, int count, uint8_t* to) {
  uint8_t out[W];
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(bits<__m512i>(code)));
#else
  for (int j = 0; j < W; j++) out[j] = uint8_t(code[j]);
#endif
  memcpy(to, out, count < W ? count : W);
}

// Packs `per` runs of `run` bytes, `stride` apart, into one.
inline void pack(const uint8_t* codes, int64_t stride, int run, int per, uint8_t* out) {
  const int width = 8 / per;
  memcpy(out, codes, run);
  for (int p = 1; p < per; p++) {
    const uint8_t* from = codes + p * stride;
    for (int i = 0; i < run; i++) out[i] |= uint8_t(from[i] << (p * width));
  }
}

// Planes of codes of 3 bits, apart: their low bits in place, and the third ones in `out`, bit i of byte n that of the code at
// n * next + i * stride.
inline void split_high(uint8_t* codes, int64_t stride, int64_t next, int count, uint8_t* out) {
  int n = 0;
#if defined(__SSE2__)
  for (; stride == 1 && next == 8 && n + 2 <= count; n += 2) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8 * n));
    const int high = _mm_movemask_epi8(_mm_slli_epi16(x, 5));
    out[n] = uint8_t(high);
    out[n + 1] = uint8_t(high >> 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 8 * n), _mm_and_si128(x, _mm_set1_epi8(3)));
  }
#endif
  if (n == count) return;
  memset(out + n, 0, count - n);
  for (int i = 0; i < 8; i++) {
    for (int j = n; j < count; j++) {
      uint8_t& code = codes[j * next + i * stride];
      out[j] |= uint8_t(code >> 2 << i);
      code &= 3;
    }
  }
}

// to [columns, rows] = from [rows, columns]
inline void transpose(const uint8_t* from, int rows, int columns, uint8_t* to) {
  int r = 0;
#if defined(__SSE2__)
  for (; r + 16 <= rows; r += 16) {
    for (int c = 0; c + 16 <= columns; c += 16) {
      __m128i a[16], b[16];
      for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + int64_t(r + i) * columns + c));
      for (int round = 0; round < 4; round++) {  // each pairs row i with row i + 8
        for (int i = 0; i < 8; i++) {
          b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
          b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        memcpy(a, b, sizeof(a));
      }
      for (int i = 0; i < 16; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + int64_t(c + i) * rows + r), a[i]);
    }
    for (int c = columns / 16 * 16; c < columns; c++) {
      for (int i = 0; i < 16; i++) to[int64_t(c) * rows + r + i] = from[int64_t(r + i) * columns + c];
    }
  }
#endif
  for (; r < rows; r++) {
    for (int c = 0; c < columns; c++) to[int64_t(c) * rows + r] = from[int64_t(r) * columns + c];
  }
}

}  // namespace
}  // namespace kvfold
