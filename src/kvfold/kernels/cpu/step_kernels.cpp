// The arithmetic of a decoder layer for a few tokens, compiled once for each instruction set. Activations are float32
// throughout; codes become floats in registers.
#include <cmath>
#include <cstring>

#include "step.h"
#include "vectors.h"

namespace kvfold {
namespace {

constexpr int kParts = kTileRows / W;  // vectors that the rows of a tile fill
constexpr int kAhead = 4096;           // bytes from what is multiplied to what is asked for: the processor's own prefetching ends at a page

inline vf number_at(Number number, const void* from, int64_t i) {
  const uint8_t* p = static_cast<const uint8_t*>(from);
  switch (number) {
    case Number::F32: return load(reinterpret_cast<const float*>(p) + i);
    case Number::BF16: return bits<vf>(load_words(p + 2 * i) << 16);
    default: return load_half(p + 2 * i);
  }
}

inline float one_number(Number number, const void* from, int64_t i) {
  if (number == Number::F32) return static_cast<const float*>(from)[i];
  const uint16_t word = static_cast<const uint16_t*>(from)[i];
  return number == Number::BF16 ? bits<float>(uint32_t(word) << 16) : half_at(&word);
}

// To the nearest, ties to even, as torch rounds.
inline uint16_t to_bf16(float x) {
  const uint32_t b = bits<uint32_t>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

inline uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t b = bits<uint32_t>(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {                                  // below 2^-14: adding 2^-1 leaves multiples of 2^-24
    const float shifted = bits<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bits<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

inline void put_number(Number number, float x, void* to, int64_t i) {
  if (number == Number::F32) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<uint16_t*>(to)[i] = number == Number::BF16 ? to_bf16(x) : to_half(x);
  }
}

void load_numbers(Number number, const void* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, number_at(number, from, i));
  for (; i < count; i++) to[i] = one_number(number, from, i);
}

typedef uint16_t words_of_vector __attribute__((vector_size(W * 2)));

inline words_of_vector to_bf16(vf x) {
  const vu b = bits<vu>(x), rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const vu is_nan = bits<vu>((b & 0x7fffffffu) > vu{} + 0x7f800000u);
  return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), words_of_vector);
}

inline words_of_vector to_half(vf x) {
#if defined(__AVX512F__)
  return bits<words_of_vector>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits<words_of_vector>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  words_of_vector words;
  for (int i = 0; i < W; i++) words[i] = to_half(x[i]);
  return words;
#endif
}

void save_numbers(Number number, const float* from, int64_t count, void* to) {
  if (number == Number::F32) {
    memcpy(to, from, sizeof(float) * count);
    return;
  }
  const int64_t whole = count - count % W;
  for (int64_t i = 0; i < whole; i += W) {
    const words_of_vector words = number == Number::BF16 ? to_bf16(load(from + i)) : to_half(load(from + i));
    memcpy(static_cast<uint16_t*>(to) + i, &words, sizeof(words));
  }
  for (int64_t i = whole; i < count; i++) put_number(number, from[i], to, i);
}

void normalize(const Norm& norm, const float* x, int count, float* y) {
  vf squares = {};
  int i = 0;
  for (; i + W <= count; i += W) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < count; i++) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / float(count) + norm.eps);
  for (i = 0; i + W <= count; i += W) store(y + i, load(x + i) * factor * load(norm.weight + i));
  for (; i < count; i++) y[i] = x[i] * factor * norm.weight[i];
}

void group_sums(const float* x, int count, float* sums_out) {
  for (int g = 0; g < count / kGroup; g++) {
    vf total = {};
    for (int i = 0; i < kGroup; i += W) total += load(x + g * kGroup + i);
    sums_out[g] = sum(total);
  }
}

// -- products ----------------------------------------------------------------------------------------------------------------

// The lowest four bits of each element as a float.
inline vf nibble(vu x) {
#if defined(__AVX512F__)
  const __m512 all16 = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return bits<vf>(_mm512_permutexvar_ps(bits<__m512i>(x), all16));
#else
  return to_float(x & 15u);
#endif
}

inline vf signed_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return bits<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return bits<vf>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  return __builtin_convertvector(bits<vi>(load_bytes(p) << 24) >> 24, vf);
#endif
}

inline void ask(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// One part of a tile's rows times M vectors.
template <int M>
inline void tile4(const uint8_t* tile, int groups, int part, const float* x, int64_t ld_x, const float* sums_of, vf* total) {
  for (int g = 0; g < groups; g++, tile += kI4Bytes) {
    if (part == 0) ask(tile + kAhead, kI4Bytes);
    vf even[M] = {}, odd[M] = {};
    const float* xg = x + g * kGroup;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      vu word;
      memcpy(&word, tile + 64 * j + sizeof(vu) * part, sizeof(word));
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const vf code = nibble(word >> (4 * i));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) (i % 2 ? odd : even)[m] += code * xg[m * ld_x + 8 * j + i];
      }
    }
    const vf scale = load_half(tile + 256 + 2 * W * part), least = load_half(tile + 288 + 2 * W * part);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[m] += scale * (even[m] + odd[m]) + least * sums_of[m * groups + g];
  }
}

template <int M>
inline void tile8(const uint8_t* tile, int groups, int part, const float* x, int64_t ld_x, const float*, vf* total) {
  for (int g = 0; g < groups; g++, tile += kI8Bytes) {
    if (part == 0) ask(tile + kAhead, kI8Bytes);
    vf even[M] = {}, odd[M] = {};
    const float* xg = x + g * kGroup;
#pragma GCC unroll 32
    for (int i = 0; i < kGroup; i++) {
      const vf code = signed_bytes(tile + kTileRows * i + W * part);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) (i % 2 ? odd : even)[m] += code * xg[m * ld_x + i];
    }
    const vf scale = load_half(tile + 512 + 2 * W * part);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[m] += scale * (even[m] + odd[m]);
  }
}

template <int M, bool FOUR>
void multiply_tiles(const Weight& w, const float* x, const float* sums_of, int first, int end, float* y, int64_t ld_y) {
  const int groups = w.columns / kGroup;
  const int64_t bytes = int64_t(groups) * (FOUR ? kI4Bytes : kI8Bytes);
  for (int row = first; row < end; row += kTileRows) {
    const uint8_t* tile = w.data + row / kTileRows * bytes;
    float out[M][kTileRows];
    for (int part = 0; part < kParts; part++) {
      vf total[M] = {};
      if constexpr (FOUR) {
        tile4<M>(tile, groups, part, x, w.columns, sums_of, total);
      } else {
        tile8<M>(tile, groups, part, x, w.columns, sums_of, total);
      }
      for (int m = 0; m < M; m++) store(out[m] + part * W, total[m]);
    }
    const int count = end - row < kTileRows ? end - row : kTileRows;
    for (int m = 0; m < M; m++) memcpy(y + m * ld_y + row, out[m], sizeof(float) * count);
  }
}

// Rows of numbers, four at a time.
template <int M, Number NUMBER>
void multiply_rows(const Weight& w, const float* x, const float*, int first, int end, float* y, int64_t ld_y) {
  constexpr int rows = 4, size = NUMBER == Number::F32 ? 4 : 2;
  const int64_t line = int64_t(w.columns) * size;
  for (int row = first; row < end; row += rows) {
    const uint8_t* lines[rows];
    for (int r = 0; r < rows; r++) lines[r] = w.data + (row + r < end ? row + r : end - 1) * line;
    vf acc[M][rows] = {};
    int i = 0;
    for (; i + W <= w.columns; i += W) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        if (i * size % 64 == 0) __builtin_prefetch(lines[r] + i * size + kAhead);
        const vf weight = number_at(NUMBER, lines[r], i);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[m][r] += weight * load(x + int64_t(m) * w.columns + i);
      }
    }
    for (int r = 0; r < rows && row + r < end; r++) {
      for (int m = 0; m < M; m++) {
        float total = sum(acc[m][r]);
        for (int rest = i; rest < w.columns; rest++) total += one_number(NUMBER, lines[r], rest) * x[int64_t(m) * w.columns + rest];
        y[m * ld_y + row + r] = total;
      }
    }
  }
}

template <int M>
void multiply_of(const Weight& w, const float* x, const float* sums_of, int first, int end, float* y, int64_t ld_y) {
  switch (w.form) {
    case Form::F32: multiply_rows<M, Number::F32>(w, x, sums_of, first, end, y, ld_y); break;
    case Form::BF16: multiply_rows<M, Number::BF16>(w, x, sums_of, first, end, y, ld_y); break;
    case Form::F16: multiply_rows<M, Number::F16>(w, x, sums_of, first, end, y, ld_y); break;
    case Form::I4: multiply_tiles<M, true>(w, x, sums_of, first, end, y, ld_y); break;
    case Form::I8: multiply_tiles<M, false>(w, x, sums_of, first, end, y, ld_y); break;
  }
}

void multiply(const Weight& w, const float* x, const float* sums_of, int vectors, int first, int end, float* y, int64_t ld_y) {
  const int groups = w.columns / kGroup;
  for (int m = 0; m < vectors;) {
    const float* xm = x + int64_t(m) * w.columns;
    const float* sm = sums_of + m * groups;
    float* ym = y + m * ld_y;
    const int left = vectors - m;
    if (left >= 4) {
      multiply_of<4>(w, xm, sm, first, end, ym, ld_y), m += 4;
    } else if (left >= 2) {
      multiply_of<2>(w, xm, sm, first, end, ym, ld_y), m += 2;
    } else {
      multiply_of<1>(w, xm, sm, first, end, ym, ld_y), m += 1;
    }
  }
  if (!w.bias) return;
  for (int m = 0; m < vectors; m++) {
    for (int row = first; row < end; row++) y[m * ld_y + row] += w.bias[row];
  }
}

// -- small operations --------------------------------------------------------------------------------------------------------

inline vf sigmoid(vf x) {
  vf a = x < vf{} ? x : -x;
  vf e = exp_negative(a);
  vf y = 1.0f / (1.0f + e);
  return x < vf{} ? e * y : y;
}

inline vf activate(Activation activation, vf x) {
  if (activation == Activation::SILU) return x * sigmoid(x);
  return 0.5f * x * (1.0f + tanh_of(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

void gated(Activation activation, float* gate, const float* up, int count) {
  int i = 0;
  for (; i + W <= count; i += W) store(gate + i, activate(activation, load(gate + i)) * load(up + i));
  for (; i < count; i++) gate[i] = activate(activation, all(gate[i]))[0] * up[i];
}

void turn(float* x, const float* cos, const float* sin, int size) {
  const int half = size / 2;
  int i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(x + i), b = load(x + i + half);
    store(x + i, a * load(cos + i) - b * load(sin + i));
    store(x + i + half, b * load(cos + i + half) + a * load(sin + i + half));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

void unpack(const Weight& w, int first, int end, Number number, void* to) {
  const int groups = w.columns / kGroup;
  const bool four = w.form == Form::I4;
  const int64_t bytes = four ? kI4Bytes : kI8Bytes;
  for (int row = first; row < end; row += kTileRows) {
    const int count = end - row < kTileRows ? end - row : kTileRows;
    for (int g = 0; g < groups; g++) {
      const uint8_t* tile = w.data + (int64_t(row / kTileRows) * groups + g) * bytes;
      float column[kGroup][kTileRows];
      for (int part = 0; part < kParts; part++) {
        const vf scale = load_half(tile + (four ? 256 : 512) + 2 * W * part);
        const vf least = four ? load_half(tile + 288 + 2 * W * part) : vf{};
        for (int i = 0; i < kGroup; i++) {
          vf code;
          if (four) {
            vu word;
            memcpy(&word, tile + 64 * (i / 8) + sizeof(vu) * part, sizeof(word));
            code = nibble(word >> (4 * (i % 8)));
          } else {
            code = signed_bytes(tile + kTileRows * i + W * part);
          }
          store(column[i] + W * part, scale * code + least);
        }
      }
      for (int r = 0; r < count; r++) {
        float line[kGroup];
        for (int i = 0; i < kGroup; i++) line[i] = column[i][r];
        const int64_t at = int64_t(row - first + r) * w.columns + g * kGroup;
        if (number == Number::F32) {
          memcpy(static_cast<float*>(to) + at, line, sizeof(line));
        } else {
          save_numbers(number, line, kGroup, static_cast<uint16_t*>(to) + at);
        }
      }
    }
  }
}

}  // namespace

extern const StepKernels KVFOLD_STEP = {KVFOLD_NAME, load_numbers, save_numbers, normalize, group_sums,
                                        multiply,    gated,        turn,         unpack};

}  // namespace kvfold
