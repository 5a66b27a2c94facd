// The nearest levels of tables, and packing, in the order of operations of kvfold/store/table.py, so that codes are the same bit for
// bit. Compiled without contraction, as encode_kernels.cpp is.
#include "encoding.h"
#include "levels.h"
#include "packing.h"

namespace kvfold {
namespace {

// How many of the middles are below x: a binary search, all numbers at once.
template <int COUNT>
inline vu nearest(const float* middles, vf x) {
  vu code = {};
#pragma GCC unroll 4
  for (int step = COUNT / 2; step; step /= 2) {
    const vf middle = lookup<COUNT>(middles, code + uint32_t(step - 1));
    code += bits<vu>(x > middle) & uint32_t(step);
  }
  return code;
}

// Codes of n numbers with a scale and a zero for each; memory is there up to whole vectors.
template <int COUNT>
void name(const float* middles, const float* x, const float* scale, const float* zero, int n, uint8_t* codes) {
  for (int i = 0; i < n; i += W) {
    const vf centred = zero ? load(x + i) - load(zero + i) : load(x + i);
    store_codes(nearest<COUNT>(middles, centred / load(scale + i)), n - i, codes + i);
  }
}

void name_line(const Naming& e, const float* x, const float* scale, const float* zero, int n, uint8_t* codes) {
  switch (e.kind) {
    case Kind::T4: name<16>(e.middles, x, scale, zero, n, codes); break;
    case Kind::T3: name<8>(e.middles, x, scale, zero, n, codes); break;
    default: name<4>(e.middles, x, scale, zero, n, codes); break;
  }
}

// The last vector of a row reaches beyond it: where that is beyond the block, from a copy.
struct Padded {
  float *x, *scale, *zero;  // [D + W] each
};

void by_channel(const Naming& e, const float* x, int tokens, int head_dim, int per, uint8_t* codes, const Padded& last, uint8_t* to) {
  for (int t = 0; t < tokens; t++) {
    const float *row = x + int64_t(t) * head_dim, *scale = e.scale + int64_t(t / e.group) * head_dim;
    const float* zero = e.zero ? e.zero + int64_t(t / e.group) * head_dim : nullptr;
    if (head_dim % W) {
      memcpy(last.x, row, sizeof(float) * head_dim);
      memcpy(last.scale, scale, sizeof(float) * head_dim);
      if (zero) memcpy(last.zero, zero, sizeof(float) * head_dim);
      row = last.x, scale = last.scale, zero = zero ? last.zero : nullptr;
    }
    name_line(e, row, scale, zero, head_dim, codes + int64_t(t) * head_dim);
  }
  const int run = tokens / per * head_dim;  // tokens of one run lie together
  uint8_t* packed = codes + int64_t(tokens) * head_dim;
  int rows = tokens / per;
  if (e.kind == Kind::T3) {
    for (int j = 0; j < tokens / 8; j++, rows++) {
      split_high(codes + int64_t(j) * 8 * head_dim, head_dim, 1, head_dim, packed + int64_t(rows) * head_dim);
    }
  }
  pack(codes, run, run, per, packed);
  transpose(packed, rows, head_dim, to);
}

void by_token(const Naming& e, const float* x, int tokens, int head_dim, int per, uint8_t* codes, const Padded& line, uint8_t* to) {
  const int groups = head_dim / e.group, run = head_dim / per, line_bytes = run + (e.kind == Kind::T3 ? head_dim / 8 : 0);
  for (int t = 0; t < tokens; t++, to += line_bytes) {
    memcpy(line.x, x + int64_t(t) * head_dim, sizeof(float) * head_dim);
    for (int g = 0; g < groups; g++) {
      const float scale = e.scale[int64_t(t) * groups + g], zero = e.zero ? e.zero[int64_t(t) * groups + g] : 0.0f;
      for (int d = g * e.group; d < (g + 1) * e.group; d++) {
        line.scale[d] = scale;
        line.zero[d] = zero;
      }
    }
    name_line(e, line.x, line.scale, e.zero ? line.zero : nullptr, head_dim, codes);
    if (e.kind == Kind::T3) split_high(codes, 1, 8, head_dim / 8, to + run);
    pack(codes, run, run, per, to);
  }
}

}  // namespace

void KVFOLD_NAME_LEVELS(const Naming& e, const float* x, int tokens, int head_dim, uint8_t* to, float* memory) {
  const int per = e.kind == Kind::T4 ? 2 : 4, padded = head_dim + W;
  const Padded rest = {memory, memory + padded, memory + 2 * padded};
  uint8_t* codes = reinterpret_cast<uint8_t*>(memory + 3 * padded);
  (e.by_channel ? by_channel : by_token)(e, x, tokens, head_dim, per, codes, rest, to);
}

}  // namespace kvfold
