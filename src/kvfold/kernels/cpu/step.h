// A decoder layer around its attention, for a few tokens: what Python, the schedule and the kernels agree on. Plain data only:
// this header is compiled for several instruction sets into one library, so nothing in it may emit code.
#pragma once
#include <cstdint>

namespace kvfold {

enum class Number : int { F32, BF16, F16 };

// How a matrix of weights is held. The first three are rows of numbers, as torch has them. I4 and I8 are tiles of 16 rows by
// 32 columns, all columns of a tile after each other, so that a thread reads one stream:
//   I4, 320 bytes: 4 times 16 words of 32 bits, a word having 8 columns of a row, the first in the lowest bits;
//       then 16 scales and 16 minima in half precision: x = scale * code + minimum
//   I8, 544 bytes: 32 times 16 signed codes, a column each; then 16 scales: x = scale * code
// Numbers are those of GGUF's Q4_1 and Q8_0. Rows that fill up the last tile are zero.
enum class Form : int { F32, BF16, F16, I4, I8 };

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kI4Bytes = 320, kI8Bytes = 544;
constexpr int kMostVectors = 8;  // tokens that a step takes

struct Weight {
  Form form;
  const uint8_t* data;
  int rows, columns;
  const float* bias;  // or null
};

// y = x / sqrt(mean(x^2) + eps) * weight; no norm where weight is null.
struct Norm {
  const float* weight;
  float eps;
};

enum class Activation : int { SILU, GELU_TANH };

// h = x + after_attention(o(attention(...))), y = h + after_mlp(down(act(gate(n)) * up(n))) with n = before_mlp(h); norms that a
// family does not have are null.
struct DecoderLayer {
  Number number;  // of the hidden states, keys and values
  Activation activation;
  int hidden, inner, num_query_heads, num_kv_heads, head_dim;
  Weight q, k, v, o, gate, up, down;
  Norm before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
};

// One build of the kernels for one instruction set.
struct StepKernels {
  const char* name;
  void (*load)(Number, const void* from, int64_t count, float* to);
  void (*save)(Number, const float* from, int64_t count, void* to);
  void (*normalize)(const Norm&, const float* x, int count, float* y);
  void (*group_sums)(const float* x, int count, float* sums);
  // y [vectors, ld_y] = x [vectors, columns] · weightᵀ + bias, rows [first, end) of the weight, `first` a tile's; sums [vectors,
  // columns / 32] of x, for I4 only.
  void (*multiply)(const Weight&, const float* x, const float* sums, int vectors, int first, int end, float* y, int64_t ld_y);
  // gate = act(gate) * up
  void (*gated)(Activation, float* gate, const float* up, int count);
  // Pairs channel i with i + size / 2; cos and sin have `size` numbers.
  void (*turn)(float* x, const float* cos, const float* sin, int size);
  // Rows [first, end) of I4 or I8 as numbers, [end - first, columns], `first` a tile's.
  void (*unpack)(const Weight&, int first, int end, Number, void* to);
};

extern const StepKernels kPortableStep;
#ifdef KVFOLD_X86
extern const StepKernels kAvx2Step;
extern const StepKernels kAvxVnniStep;  // defined where the compiler knows it: KVFOLD_AVX_VNNI
extern const StepKernels kAvx512Step;
extern const StepKernels kAvx512Bf16Step;  // as well: KVFOLD_AVX512_BF16
#endif

}  // namespace kvfold
