#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "thread_pool.h"

namespace kvfold {
namespace {

constexpr int kTasksPerThread = 2;  // so that threads of unequal speed end together; each begins with codes that nobody asked for
constexpr int kTokensPerPiece = 64; // of encoding
constexpr int kManyTokens = 1024;   // of all rows: more than blocks that a step has filled

// A prompt's work comes between torch's operations, that of a step mostly between kvfold's own.
Team team_of(bool many) { return many ? Team::TORCH : Team::OWN; }

// Blocks a task, below which sharing costs more than it gives.
constexpr int least_blocks(int vectors) { return vectors <= kDirectVectors ? 12 : 4; }

const Kernels*& chosen() {
  static const Kernels* current = nullptr;
  return current;
}

const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#ifdef KVFOLD_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
#ifdef KVFOLD_AVX512_BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16);
#endif
    if (avx512) found.push_back(&kAvx512);
#ifdef KVFOLD_AVX_VNNI
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&kAvxVnni);
#endif
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
  }();
  return all;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Memory that a thread keeps from call to call; grows only.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
    std::memset(memory.get(), 0, bytes);
    size = floats;
  }
  return memory.get();
}

int64_t most_scratch(const Shape& shape, const std::vector<Part>& parts, int vectors) {
  int64_t most = 0;
  for (const Part& part : parts) most = std::max(most, kernels().workspace(shape, part, vectors));
  return most;
}

int columns_per_task(int64_t all_columns, int num_threads, int least) {
  if (num_threads == 1) return 1 << 30;
  const int64_t share = (all_columns + num_threads * kTasksPerThread - 1) / (num_threads * kTasksPerThread);
  return int(std::max<int64_t>(share, least));
}

}  // namespace

const Kernels& kernels() {
  if (!chosen()) chosen() = runnable().front();
  return *chosen();
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.emplace_back(k->name);
  return names;
}

void choose(const std::string& name) {
  for (const Kernels* k : runnable()) {
    if (name == k->name) {
      chosen() = k;
      return;
    }
  }
  throw std::invalid_argument("this machine or build has no kernels '" + name + "'");
}

void attend(const Shape& shape, const std::vector<Part>& parts, float* out, float* lse, int num_threads) {
  const Kernels& k = kernels();
  const int num_vectors = shape.groups * shape.queries, num_strips = (num_vectors + kStrip - 1) / kStrip;
  const int strip = (num_vectors + num_strips - 1) / num_strips;
  int64_t all_columns = 0;
  for (const Part& part : parts) all_columns += int64_t(part.segment->columns) * shape.rows * num_strips;
  const int least = least_blocks(num_vectors), span = columns_per_task(all_columns, num_threads, least);

  // In the order of (rows, strip), then part: what is merged together lies together.
  const int rows_each = rows_together(num_vectors);
  std::vector<Task> tasks;
  std::vector<int> ends;
  for (int row = 0; row < shape.rows; row += rows_each) {
    const int num_rows = std::min(rows_each, shape.rows - row);
    for (int first = 0; first < num_vectors; first += strip) {
      for (const Part& part : parts) {
        const int columns = part.segment->columns, step = std::min(std::max(span / num_rows, 1), columns);
        for (int column = 0; column < columns; column += step) {
          tasks.push_back({&part, row, num_rows, column, std::min(column + step, columns), first, std::min(first + strip, num_vectors),
                           nullptr, nullptr, nullptr});
        }
      }
      ends.push_back(int(tasks.size()));
    }
  }

  if (tasks.empty()) {
    std::fill_n(out, int64_t(shape.rows) * num_vectors * shape.head_dim, 0.0f);
    std::fill_n(lse, int64_t(shape.rows) * num_vectors, -std::numeric_limits<float>::infinity());
    return;
  }

  const int64_t padded = rounded_up(shape.head_dim, k.width), vectors_each = int64_t(strip) * std::min(rows_each, shape.rows);
  const int64_t each = vectors_each * (padded + 2);
  thread_local std::vector<float> partial;
  partial.resize(tasks.size() * each);
  for (size_t i = 0; i < tasks.size(); i++) {
    tasks[i].out = partial.data() + i * each;
    tasks[i].top = tasks[i].out + vectors_each * padded;
    tasks[i].total = tasks[i].top + vectors_each;
  }
  const int64_t needed = most_scratch(shape, parts, strip);
  const int worth = all_columns >= 2 * least ? num_threads : 1;
  const Team team = team_of(num_vectors > kDirectVectors);
  parallel_for(int(tasks.size()), worth, [&](int i) { k.attend(shape, tasks[i], scratch(needed)); }, team);

  const bool small = int64_t(shape.rows) * num_vectors * tasks.size() < 4096;
  const auto merge = [&](int i) {
    const int begin = i ? ends[i - 1] : 0;
    const Task* found = tasks.data() + begin;
    for (int row = found->row; row < found->row + found->num_rows; row++) {
      const int64_t at = int64_t(row) * num_vectors + found->first;
      k.merge(shape, found, ends[i] - begin, row, out + at * shape.head_dim, lse + at, scratch(needed));
    }
  };
  parallel_for(int(ends.size()), small ? 1 : num_threads, merge, team);
}

void mass(const Shape& shape, const Part& part, const float* lse, float* received, int num_threads) {
  const Kernels& k = kernels();
  const Segment& s = *part.segment;
  std::memset(received, 0, sizeof(float) * shape.rows * shape.groups * s.width);
  const int64_t all_columns = int64_t(s.columns) * shape.rows;
  const int least = least_blocks(shape.groups * shape.queries), span = columns_per_task(all_columns, num_threads, least);
  std::vector<Task> tasks;
  for (int row = 0; row < shape.rows; row++) {
    for (int column = 0; column < s.columns; column += std::min(span, s.columns)) {
      const int end = int(std::min<int64_t>(int64_t(column) + span, s.columns));
      tasks.push_back({&part, row, 1, column, end, 0, 0, nullptr, nullptr, nullptr});
    }
  }
  const int64_t needed = k.workspace(shape, part, std::min(shape.groups * shape.queries, kStrip));
  const int worth = all_columns >= 2 * least ? num_threads : 1;
  const Team team = team_of(shape.groups * shape.queries > kDirectVectors);
  parallel_for(int(tasks.size()), worth, [&](int i) { k.mass(shape, tasks[i], lse, received, scratch(needed)); }, team);
}

void encode(const Encoding& e, const uint8_t* x, int64_t blocks, int tokens, int head_dim, const Encoded& to, int num_threads) {
  const int bits = e.kind == Kind::I4 ? 4 : e.kind == Kind::I2 ? 2 : 8;
  const int64_t number_bytes = e.input == Kind::F32 ? 4 : 2, scale_bytes = e.scale_kind == ScaleKind::HALF ? 2 : 1;
  // By channel a block is one piece; tokens with scales of their own may be cut anywhere.
  const int64_t all_tokens = blocks * tokens, piece = e.by_channel ? tokens : kTokensPerPiece;
  if (all_tokens == 0) return;
  const int64_t groups = (e.by_channel ? tokens : head_dim) / e.group;
  const int64_t token_scales = e.by_channel ? 0 : groups, block_scales = e.by_channel ? groups * head_dim : 0;
  const auto encode_piece = [&](int64_t i) {
    const int64_t first = i * piece, count = std::min(piece, all_tokens - first);
    const int64_t scales = first * token_scales + i * block_scales;
    const Encoded at = {to.codes + first * head_dim * bits / 8, to.scale ? to.scale + scales * scale_bytes : nullptr,
                        to.zero ? to.zero + scales : nullptr, to.base ? to.base + i : nullptr};
    float* memory = scratch(encode_floats(int(count), head_dim, int(groups)));
    kernels().encode(e, x + first * head_dim * number_bytes, int(count), head_dim, at, memory);
  };
  parallel_for(int((all_tokens + piece - 1) / piece), num_threads, encode_piece, team_of(all_tokens >= kManyTokens));
}

void name_levels(const Naming& naming, const float* x, int64_t blocks, int tokens, int head_dim, uint8_t* codes, int num_threads) {
  const int bits = naming.kind == Kind::T4 ? 4 : naming.kind == Kind::T3 ? 3 : 2;
  const int64_t all_tokens = blocks * tokens, piece = naming.by_channel ? tokens : kTokensPerPiece;
  if (all_tokens == 0) return;
  const auto name_piece = [&](int64_t i) {
    const int64_t first = i * piece, count = std::min(piece, all_tokens - first), scales = first * head_dim / naming.group;
    Naming at = naming;
    at.scale += scales;
    if (at.zero) at.zero += scales;
    float* memory = scratch(naming_floats(int(count), head_dim));
    kernels().name_levels(at, x + first * head_dim, int(count), head_dim, codes + first * head_dim * bits / 8, memory);
  };
  parallel_for(int((all_tokens + piece - 1) / piece), num_threads, name_piece, team_of(all_tokens >= kManyTokens));
}

}  // namespace kvfold
