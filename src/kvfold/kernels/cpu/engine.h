// Cuts attention into tasks, runs them on threads and merges what comes out.
#pragma once
#include <string>
#include <vector>

#include "attention.h"
#include "encoding.h"

namespace kvfold {

// The kernels in use; `choose` takes a name of `available`, or throws std::invalid_argument.
const Kernels& kernels();
void choose(const std::string& name);
std::vector<std::string> available();  // best first

// out [R, M, D] and lse [R, M] of attention over all parts together.
void attend(const Shape& shape, const std::vector<Part>& parts, float* out, float* lse, int num_threads);

// mass [R, G, width], given lse [R, M] of the whole.
void mass(const Shape& shape, const Part& part, const float* lse, float* received, int num_threads);

// Encodes x [blocks, tokens, head_dim] into fields that lie one block after another.
void encode(const Encoding& encoding, const uint8_t* x, int64_t blocks, int tokens, int head_dim, const Encoded& to, int num_threads);

// Codes of x [blocks, tokens, head_dim] in tables, given scales.
void name_levels(const Naming& naming, const float* x, int64_t blocks, int tokens, int head_dim, uint8_t* codes, int num_threads);

}  // namespace kvfold
