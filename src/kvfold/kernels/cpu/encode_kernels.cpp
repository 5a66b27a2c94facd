// Quantizing and packing, in the very order of operations of kvfold/store/affine.py and fp8.py, so that codes and scales are the same bit
// for bit. Compiled without contraction: a fused multiply-add rounds once where torch rounds twice.
#include <cmath>

#include "encoding.h"
#include "packing.h"

namespace kvfold {
namespace {

constexpr float kTiny = 5.9604644775390625e-8f;                 // 2^-24, the smallest positive half
constexpr float kRound = float(1.001 * 0.00048828125);          // a little more than a half's rounding
constexpr float kAbove = float(1 + 1.001 * 0.00048828125);
constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestTokenStep = 4096.0f;

// To the nearest half, ties to even; |x| <= 65504.
uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t all = bits<uint32_t>(x), sign = all >> 16 & 0x8000, magnitude = all & 0x7fffffff;
  if (magnitude < 0x38800000) {  // subnormal: adding 1/2 brings its lowest bit, 2^-24, to a float's lowest place
    const float shifted = bits<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bits<uint32_t>(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
#endif
}

uint16_t half_within(float x) { return to_half(x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x); }

uint16_t half_above(float step) {
  const float x = step * kAbove + kTiny / 2;
  return half_within(x < kTiny ? kTiny : x);
}

// How many of the bounds the ratio is not below. They rise by equal ratios, so that a rough logarithm finds the place nearly.
uint8_t log_code(const Encoding& e, float largest, float step) {
  const float least = kTiny / 256, ratio = largest / (step < least ? least : step);
  const float per_octave = e.by_channel ? 24.0f : 8.0f;
  const uint32_t all = bits<uint32_t>(ratio);
  const float octaves = float(int(all >> 23) - 127) + float(all & 0x7fffff) * 0x1p-23f;
  int code = octaves > 32 ? 255 : octaves < 0 ? 0 : int(octaves * per_octave);
  code = code > 255 ? 255 : code;
  while (code < 255 && ratio >= e.bounds[code]) code++;
  while (code > 0 && ratio < e.bounds[code - 1]) code--;
  return uint8_t(code);
}

template <Kind K>
void to_floats(const uint8_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf y;
    load_codes<K>(x + i * bytes_each<K>(), 0, &y);
    store(out + i, y);
  }
  if (i == n) return;
  uint8_t rest[4 * W] = {};
  memcpy(rest, x + i * bytes_each<K>(), (n - i) * bytes_each<K>());
  float last[W];
  vf y;
  load_codes<K>(rest, 0, &y);
  store(last, y);
  memcpy(out + i, last, (n - i) * sizeof(float));
}

void read_floats(const Encoding& e, const uint8_t* x, int64_t n, float* out) {
  switch (e.input) {
    case Kind::BF16: to_floats<Kind::BF16>(x, n, out); break;
    case Kind::F16: to_floats<Kind::F16>(x, n, out); break;
    default: to_floats<Kind::F32>(x, n, out); break;
  }
}

// What lines that have a scale each need: their range, and what becomes of it.
struct Lines {
  float *low, *high, *step, *start;
};

float first_step(const Encoding& e, float low, float high, float levels, uint16_t& zero) {
  if (e.symmetric) return 2 * (high > -low ? high : -low) / levels;
  zero = half_within(low - std::fabs(low) * kRound - kTiny);
  return (high - half_at(&zero)) / levels;
}

// Stores the scales and zeros of n lines from place `at` on; `step` and `start` are then what was really stored.
void finish_scales(const Encoding& e, const Lines& lines, int n, float levels, float largest, int64_t at, const Encoded& to) {
  const float middle = levels / 2;
  for (int l = 0; l < n; l++, at++) {
    if (e.scale_kind == ScaleKind::HALF) {
      const uint16_t half = half_above(lines.step[l]);
      memcpy(to.scale + 2 * at, &half, 2);
      lines.step[l] = half_at(&half);
    } else {
      const uint8_t code = log_code(e, largest, lines.step[l]);
      to.scale[at] = code;
      lines.step[l] = e.grid[code] * largest;
    }
    if (e.symmetric) {
      lines.start[l] = -middle * lines.step[l];
    } else {
      const uint16_t zero = uint16_t(bits<uint32_t>(lines.start[l]));
      memcpy(to.zero + at, &zero, 2);
      lines.start[l] = half_at(&zero);
    }
  }
}

// Steps before they are rounded into `step`; zeros (as bits) into `start`.
void begin_scales(const Encoding& e, const Lines& lines, int n, float levels) {
  for (int l = 0; l < n; l++) {
    uint16_t zero = 0;
    lines.step[l] = first_step(e, lines.low[l], lines.high[l], levels, zero);
    lines.start[l] = bits<float>(uint32_t(zero));
  }
}

inline vf clamped(vf x, float levels) {
  const vf low = x > vf{} ? x : vf{};
  return low < all(levels) ? low : all(levels);
}

// Codes of a line, n of them, with a start and a step for each; `n` may be any number, memory is there up to whole vectors.
inline void quantize(const float* x, const float* start, const float* step, int n, float levels, uint8_t* codes) {
  const float magic = 8388608.0f;  // 2^23: adding it rounds to the nearest integer, ties to even
  for (int i = 0; i < n; i += W) {
    const vf y = clamped((load(x + i) - load(start + i)) / load(step + i), levels) + magic;
    store_codes(bits<vu>(y), n - i, codes + i);
  }
}

void by_channel(const Encoding& e, const float* x, int tokens, int head_dim, const Encoded& to, uint8_t* codes, float* memory) {
  const int per = e.kind == Kind::I4 ? 2 : e.kind == Kind::I2 ? 4 : 1, groups = tokens / e.group;
  const float levels = float((1 << (8 / per)) - 1);
  const int64_t ld = rounded_up(head_dim, W), all_lines = ld * groups;
  const Lines whole = {memory, memory + all_lines, memory + 2 * all_lines, memory + 3 * all_lines};
  auto group_of = [&](int g) {
    return Lines{whole.low + g * ld, whole.high + g * ld, whole.step + g * ld, whole.start + g * ld};
  };
  float largest = 0;
  for (int g = 0; g < groups; g++) {
    const Lines lines = group_of(g);
    const float* rows = x + int64_t(g) * e.group * head_dim;
    memcpy(lines.low, rows, sizeof(float) * head_dim);
    memcpy(lines.high, rows, sizeof(float) * head_dim);
    for (int t = 1; t < e.group; t++) {
      const float* row = rows + int64_t(t) * head_dim;
      for (int d = 0; d < head_dim; d++) {
        lines.low[d] = row[d] < lines.low[d] ? row[d] : lines.low[d];
        lines.high[d] = row[d] > lines.high[d] ? row[d] : lines.high[d];
      }
    }
    begin_scales(e, lines, head_dim, levels);
    for (int d = 0; d < head_dim; d++) largest = lines.step[d] > largest ? lines.step[d] : largest;
  }
  if (e.scale_kind == ScaleKind::LOG8) {
    const uint16_t base = half_above(largest);
    memcpy(to.base, &base, 2);
    largest = half_at(&base);
  }
  for (int g = 0; g < groups; g++) finish_scales(e, group_of(g), head_dim, levels, largest, int64_t(g) * head_dim, to);
  for (int t = 0; t < tokens; t++) {
    const Lines lines = group_of(t / e.group);
    quantize(x + int64_t(t) * head_dim, lines.start, lines.step, head_dim, levels, codes + int64_t(t) * head_dim);
  }
  const int run = tokens / per * head_dim;  // tokens of one run lie together
  uint8_t* packed = codes + int64_t(tokens) * head_dim;
  pack(codes, run, run, per, packed);
  transpose(packed, tokens / per, head_dim, to.codes);
}

void by_token(const Encoding& e, const float* x, int tokens, int head_dim, const Encoded& to, uint8_t* codes, float* memory) {
  const int per = e.kind == Kind::I4 ? 2 : e.kind == Kind::I2 ? 4 : 1, groups = head_dim / e.group;
  const float levels = float((1 << (8 / per)) - 1);
  float low, high, step, start_of;
  const Lines lines = {&low, &high, &step, &start_of};
  const int64_t ld = rounded_up(head_dim, W);
  float *steps = memory, *starts = memory + ld;
  for (int t = 0; t < tokens; t++) {
    const float* row = x + int64_t(t) * head_dim;
    for (int g = 0; g < groups; g++) {
      const float* from = row + g * e.group;
      low = high = from[0];
      int d = 0;
      if (e.group >= W) {
        vf lowest = load(from), highest = lowest;
        for (; d + W <= e.group; d += W) {
          const vf y = load(from + d);
          lowest = y < lowest ? y : lowest;
          highest = larger(highest, y);
        }
        low = -largest(-lowest);
        high = largest(highest);
      }
      for (; d < e.group; d++) {
        low = from[d] < low ? from[d] : low;
        high = from[d] > high ? from[d] : high;
      }
      begin_scales(e, lines, 1, levels);
      finish_scales(e, lines, 1, levels, kLargestTokenStep, int64_t(t) * groups + g, to);
      for (int i = g * e.group; i < (g + 1) * e.group; i++) {
        steps[i] = step;
        starts[i] = start_of;
      }
    }
    quantize(row, starts, steps, head_dim, levels, codes);
    pack(codes, head_dim / per, head_dim / per, per, to.codes + int64_t(t) * head_dim / per);
  }
}

typedef uint8_t vb __attribute__((vector_size(W)));

// In 8 bits, |x| <= the format's largest: kM bits of mantissa, to the nearest, ties to even.
template <int kM, int kBias>
vu to_float8(vf x) {
  constexpr uint32_t least = uint32_t(128 - kBias) << 23;             // the smallest number that is not subnormal
  constexpr uint32_t shifter = uint32_t(127 + 24 - kBias - kM) << 23;  // adding it brings a subnormal's lowest bit to a float's lowest place
  const vu all_bits = bits<vu>(x), magnitude = all_bits & 0x7fffffffu;
  const vu normal = (magnitude - (uint32_t(127 - kBias) << 23) + ((1u << (22 - kM)) - 1) + (magnitude >> (23 - kM) & 1u)) >> (23 - kM);
  const vu subnormal = bits<vu>(bits<vf>(magnitude) + bits<float>(shifter)) - shifter;
  const vi small = bits<vi>(magnitude) < int32_t(least);
  return (bits<vu>(small) & subnormal) | (~bits<vu>(small) & normal) | (all_bits >> 24 & 0x80u);
}

// kvfold/store/fp8.py: a scale a token, or none. Tokens may be read beyond their end: memory is padded.
template <int kM, int kBias>
void to_floats8(const Encoding& e, const float* x, int tokens, int head_dim, float most, const Encoded& to) {
  for (int t = 0; t < tokens; t++, x += head_dim) {
    float divisor = 1;
    if (e.scale_kind == ScaleKind::HALF) {
      vf highest = {};
      int d = 0;
      for (; d + W <= head_dim; d += W) highest = larger(highest, bits<vf>(bits<vu>(load(x + d)) & 0x7fffffffu));
      float most_here = largest(highest);
      for (; d < head_dim; d++) most_here = std::fabs(x[d]) > most_here ? std::fabs(x[d]) : most_here;
      const float step = most_here / most * 1.0009765625f + kTiny / 2;
      const uint16_t scale = half_within(step < kTiny ? kTiny : step);
      memcpy(to.scale + 2 * t, &scale, 2);
      divisor = half_at(&scale);
    }
    uint8_t* codes = to.codes + int64_t(t) * head_dim;
    for (int d = 0; d < head_dim; d += W) {
      vf y = load(x + d) / divisor;
      y = y > all(most) ? all(most) : y < all(-most) ? all(-most) : y;
      const vb code = __builtin_convertvector((to_float8<kM, kBias>(y)), vb);
      memcpy(codes + d, &code, head_dim - d < W ? head_dim - d : W);
    }
  }
}

}  // namespace

void KVFOLD_ENCODE(const Encoding& e, const uint8_t* x, int tokens, int head_dim, const Encoded& to, float* memory) {
  const int64_t size = int64_t(tokens) * head_dim, padded = (size + 2 * W - 1) / W * W;
  read_floats(e, x, size, memory);
  if (e.kind == Kind::E4M3) return to_floats8<3, 7>(e, memory, tokens, head_dim, 448.0f, to);
  if (e.kind == Kind::E5M2) return to_floats8<2, 15>(e, memory, tokens, head_dim, 57344.0f, to);
  uint8_t* codes = reinterpret_cast<uint8_t*>(memory + padded);
  float* lines = memory + padded + (2 * size + 3) / 4 + W;
  (e.by_channel ? by_channel : by_token)(e, memory, tokens, head_dim, to, codes, lines);
}

}  // namespace kvfold
