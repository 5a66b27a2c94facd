// What the scheduler and the kernels that quantize agree on. Plain data only, as in attention.h.
#pragma once
#include "attention.h"

namespace kvfold {

// How a block of tokens becomes integers or small floats; kvfold/store/affine.py and fp8.py are the definition, bit for bit.
struct Encoding {
  Kind kind;   // I8, I4 or I2; E4M3 or E5M2 by token, with no scale or a half
  Kind input;  // F32, BF16 or F16
  bool by_channel, symmetric;
  ScaleKind scale_kind;
  int group;            // numbers that share a scale: tokens of a channel, or channels of a token
  const float* grid;    // [256] for LOG8: what a code's scale is of the largest
  const float* bounds;  // [255]: the code of `largest / step` is how many of these it is not below
};

// How numbers become codes of a table, given their scales; kvfold/store/table.py is the definition, bit for bit.
struct Naming {
  Kind kind;  // T4, T3 or T2
  bool by_channel;
  int group;
  const float* scale;  // [T, D / group] for each block, by channel [T / group, D]
  const float* zero;   // of the same shape, or null
  float middles[kLevels];  // between neighbouring levels, the last one repeated
};

// Where a block's fields go.
struct Encoded {
  uint8_t *codes, *scale;
  uint16_t *zero, *base;  // null where there are none
};

// x [tokens, head_dim], contiguous; by channel, tokens are a multiple of the group and of the codes a byte, by token the head
// dim is. `Kernels::encode` needs memory for so many floats:
inline int64_t encode_floats(int tokens, int head_dim, int groups) {
  return 2 * int64_t(tokens) * head_dim + 4 * int64_t(head_dim + 16) * groups + 128;
}

// x [tokens, head_dim] to codes; the same of `Kernels::name_levels`.
inline int64_t naming_floats(int tokens, int head_dim) { return int64_t(tokens) * head_dim / 2 + 3 * int64_t(head_dim + 16) + 64; }

}  // namespace kvfold
