// What is between the products of a decoder layer for many tokens. The products are torch's, and so are the threads; a token's
// numbers are float32 from where they are read to where they are written.
#include <algorithm>
#include <vector>

#include "schedule.h"
#include "thread_pool.h"

namespace kvfold {
namespace {

constexpr int kPiecesPerThread = 4;  // so that threads of unequal speed end together
constexpr int64_t kWorthSharing = 32768;  // numbers: with fewer, as in torch, the others are not asked

int64_t bytes_of(Number number) { return number == Number::F32 ? 4 : 2; }

const uint8_t* at(const void* x, Number number, int64_t i) { return static_cast<const uint8_t*>(x) + i * bytes_of(number); }
uint8_t* at(void* x, Number number, int64_t i) { return static_cast<uint8_t*>(x) + i * bytes_of(number); }

// Calls work(token, memory) for every token, with `floats` of memory.
template <typename Work>
void for_tokens(int64_t count, int64_t floats, int num_threads, const Work& work) {
  const int64_t piece = std::max<int64_t>(1, (count + num_threads * kPiecesPerThread - 1) / (num_threads * kPiecesPerThread));
  const auto work_piece = [&](int i) {
    thread_local std::vector<float> memory;
    if (int64_t(memory.size()) < floats) memory.resize(floats);
    for (int64_t m = i * piece; m < std::min(count, (i + 1) * piece); m++) work(m, memory.data());
  };
  const int worth = count * floats >= kWorthSharing ? num_threads : 1;
  parallel_for(int((count + piece - 1) / piece), worth, work_piece, Team::TORCH);
}

}  // namespace

void normalize_tokens(const Norm& norm, Number number, const void* x, int64_t count, int size, void* y, int num_threads) {
  const StepKernels& k = step_kernels();
  for_tokens(count, size, num_threads, [&](int64_t m, float* line) {
    k.load(number, at(x, number, m * size), size, line);
    k.normalize(norm, line, size, line);
    k.save(number, line, size, at(y, number, m * size));
  });
}

void place_heads(const Heads& heads, Number number, const void* x, int batch, int length, const Positions* positions, void* y,
                 int num_threads) {
  const StepKernels& k = step_kernels();
  const int d = heads.head_dim, rotary = positions ? positions->size : 0;
  for_tokens(int64_t(batch) * length, int64_t(heads.count) * d + 2 * rotary, num_threads, [&](int64_t m, float* line) {
    const int64_t sequence = m / length, token = m % length, all = int64_t(heads.count) * d;
    float *cos = line + all, *sin = cos + rotary;
    if (positions) {
      k.load(positions->number, at(positions->cos, positions->number, m * rotary), rotary, cos);
      k.load(positions->number, at(positions->sin, positions->number, m * rotary), rotary, sin);
    }
    k.load(number, at(x, number, m * all), all, line);
    for (int h = 0; h < heads.count; h++, line += d) {
      if (heads.norm.weight) k.normalize(heads.norm, line, d, line);
      if (positions) k.turn(line, cos, sin, rotary);
      k.save(number, line, d, at(y, number, ((sequence * heads.count + h) * length + token) * d));
    }
  });
}

void add_tokens(const Norm& of_x, const Norm& of_sum, Number number, const void* hidden, const void* x, int64_t count, int size,
                void* sum, void* normed, int num_threads) {
  const StepKernels& k = step_kernels();
  for_tokens(count, 2 * int64_t(size), num_threads, [&](int64_t m, float* line) {
    float* old = line + size;
    k.load(number, at(x, number, m * size), size, line);
    if (of_x.weight) k.normalize(of_x, line, size, line);
    k.load(number, at(hidden, number, m * size), size, old);
    for (int i = 0; i < size; i++) line[i] += old[i];
    k.save(number, line, size, at(sum, number, m * size));
    if (!normed) return;
    k.normalize(of_sum, line, size, line);
    k.save(number, line, size, at(normed, number, m * size));
  });
}

void gate_tokens(Activation activation, Number number, void* gate, const void* up, int64_t count, int size, int num_threads) {
  const StepKernels& k = step_kernels();
  for_tokens(count, 2 * int64_t(size), num_threads, [&](int64_t m, float* line) {
    k.load(number, at(gate, number, m * size), size, line);
    k.load(number, at(up, number, m * size), size, line + size);
    k.gated(activation, line, line + size, size);
    k.save(number, line, size, at(gate, number, m * size));
  });
}

}  // namespace kvfold
