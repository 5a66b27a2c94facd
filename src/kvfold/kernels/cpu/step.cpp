#include "step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "schedule.h"
#include "thread_pool.h"

namespace kvfold {
namespace {

constexpr int kTasksPerThread = 4;  // so that threads of unequal speed end together

// Rows [first, end) of one of several matrices that are multiplied with the same vectors.
struct Piece {
  int which, first, end;
};

std::vector<Piece> pieces(std::initializer_list<int> rows, int num_threads) {
  int all = 0;
  for (int n : rows) all += n;
  const int share = all / (num_threads * kTasksPerThread) / kTileRows * kTileRows;
  std::vector<Piece> found;
  int which = 0;
  for (int n : rows) {
    const int step = num_threads == 1 ? std::max(n, 1) : std::max(share, kTileRows);
    for (int first = 0; first < n; first += step) found.push_back({which, first, std::min(first + step, n)});
    which++;
  }
  return found;
}

// Vectors and the sums of their groups.
struct Vectors {
  std::vector<float> x, sums;
  void resize(int count, int columns) {
    x.resize(int64_t(count) * columns);
    sums.resize(int64_t(count) * (columns / kGroup + 1));
  }
  void sum_groups(const StepKernels& k, int count, int columns) {
    for (int m = 0; m < count; m++) k.group_sums(x.data() + int64_t(m) * columns, columns, sums.data() + m * (columns / kGroup));
  }
};

struct Memory {
  Vectors normed, attended, inner;
  std::vector<float> hidden, k, v, up, out, cos, sin, attention, lse;
  Newest next;
};

Memory& memory() {
  thread_local Memory m;
  return m;
}

void normalize_all(const StepKernels& k, const Norm& norm, const float* x, int count, int size, float* y) {
  for (int m = 0; m < count; m++) {
    if (norm.weight) {
      k.normalize(norm, x + int64_t(m) * size, size, y + int64_t(m) * size);
    } else if (y != x) {
      std::memcpy(y + int64_t(m) * size, x + int64_t(m) * size, sizeof(float) * size);
    }
  }
}

}  // namespace

const StepKernels& step_kernels() {
  const std::string name = kernels().name;
#ifdef KVFOLD_X86
  if (name == kAvx512Step.name) return kAvx512Step;
  if (name == kAvx2Step.name) return kAvx2Step;
#ifdef KVFOLD_AVX512_BF16
  if (name == kAvx512Bf16Step.name) return kAvx512Bf16Step;
#endif
#ifdef KVFOLD_AVX_VNNI
  if (name == kAvxVnniStep.name) return kAvxVnniStep;
#endif
#endif
  return kPortableStep;
}

void linear(const Weight& w, Number number, const void* x, int count, void* y, int num_threads) {
  const StepKernels& k = step_kernels();
  Memory& mem = memory();
  mem.normed.resize(count, w.columns);
  mem.out.resize(int64_t(count) * w.rows);
  k.load(number, x, int64_t(count) * w.columns, mem.normed.x.data());
  if (w.form == Form::I4) mem.normed.sum_groups(k, count, w.columns);
  const std::vector<Piece> work = pieces({w.rows}, num_threads);
  float* out = number == Number::F32 ? static_cast<float*>(y) : mem.out.data();
  const float *from = mem.normed.x.data(), *sums = mem.normed.sums.data();
  parallel_for(int(work.size()), num_threads, [&](int i) {
    k.multiply(w, from, sums, count, work[i].first, work[i].end, out, w.rows);
  });
  if (number != Number::F32) k.save(number, out, int64_t(count) * w.rows, y);
}

void unpack(const Weight& w, Number number, void* to, int num_threads) {
  const StepKernels& k = step_kernels();
  const int64_t line = int64_t(w.columns) * (number == Number::F32 ? 4 : 2);
  const std::vector<Piece> work = pieces({w.rows}, num_threads);
  const auto unpack_piece = [&](int i) {
    k.unpack(w, work[i].first, work[i].end, number, static_cast<uint8_t*>(to) + work[i].first * line);
  };
  parallel_for(int(work.size()), num_threads, unpack_piece, Team::TORCH);  // for torch's product
}

void before_attention(const DecoderLayer& layer, const void* hidden, int count, const Positions& positions, float* q, void* keys,
                      void* values, int num_threads) {
  const StepKernels& k = step_kernels();
  Memory& mem = memory();
  const int size = layer.hidden, d = layer.head_dim, kv = layer.num_kv_heads * d, rotary = positions.size;
  mem.hidden.resize(int64_t(count) * size);
  mem.normed.resize(count, size);
  mem.k.resize(int64_t(count) * kv);
  mem.v.resize(int64_t(count) * kv);
  k.load(layer.number, hidden, int64_t(count) * size, mem.hidden.data());
  normalize_all(k, layer.before_attention, mem.hidden.data(), count, size, mem.normed.x.data());
  mem.normed.sum_groups(k, count, size);

  const Weight* weights[] = {&layer.q, &layer.k, &layer.v};
  float* outputs[] = {q, mem.k.data(), mem.v.data()};
  const std::vector<Piece> work = pieces({layer.q.rows, layer.k.rows, layer.v.rows}, num_threads);
  const float *from = mem.normed.x.data(), *sums = mem.normed.sums.data();
  parallel_for(int(work.size()), num_threads, [&](int i) {
    const Weight& w = *weights[work[i].which];
    k.multiply(w, from, sums, count, work[i].first, work[i].end, outputs[work[i].which], w.rows);
  });

  mem.cos.resize(rotary);
  mem.sin.resize(rotary);
  for (int m = 0; m < count; m++) {
    const int64_t at = positions.same ? 0 : int64_t(m) * rotary;
    const int64_t bytes = at * (positions.number == Number::F32 ? 4 : 2);
    k.load(positions.number, static_cast<const uint8_t*>(positions.cos) + bytes, rotary, mem.cos.data());
    k.load(positions.number, static_cast<const uint8_t*>(positions.sin) + bytes, rotary, mem.sin.data());
    const auto finish = [&](float* x, int heads, const Norm& norm) {
      for (int h = 0; h < heads; h++, x += d) {
        if (norm.weight) k.normalize(norm, x, d, x);
        k.turn(x, mem.cos.data(), mem.sin.data(), rotary);
      }
    };
    finish(q + int64_t(m) * layer.num_query_heads * d, layer.num_query_heads, layer.q_norm);
    finish(mem.k.data() + int64_t(m) * kv, layer.num_kv_heads, layer.k_norm);
  }
  k.save(layer.number, mem.k.data(), int64_t(count) * kv, keys);
  k.save(layer.number, mem.v.data(), int64_t(count) * kv, values);
}

void after_attention(const DecoderLayer& layer, const void* hidden, const float* attended, int count, void* out, int num_threads) {
  const StepKernels& k = step_kernels();
  Memory& mem = memory();
  const int size = layer.hidden, inner = layer.inner, wide = layer.num_query_heads * layer.head_dim;
  mem.hidden.resize(int64_t(count) * size);
  mem.attended.resize(count, wide);
  mem.normed.resize(count, size);
  mem.inner.resize(count, inner);
  mem.up.resize(int64_t(count) * inner);
  mem.out.resize(int64_t(count) * size);
  k.load(layer.number, hidden, int64_t(count) * size, mem.hidden.data());
  std::memcpy(mem.attended.x.data(), attended, sizeof(float) * count * wide);
  mem.attended.sum_groups(k, count, wide);

  const auto multiply_all = [&](const Weight& w, const Vectors& from, float* to) {
    const std::vector<Piece> work = pieces({w.rows}, num_threads);
    parallel_for(int(work.size()), num_threads, [&](int i) {
      k.multiply(w, from.x.data(), from.sums.data(), count, work[i].first, work[i].end, to, w.rows);
    });
  };
  const auto add = [&](const Norm& norm) {
    normalize_all(k, norm, mem.out.data(), count, size, mem.out.data());
    for (int64_t i = 0; i < int64_t(count) * size; i++) mem.hidden[i] += mem.out[i];
  };

  multiply_all(layer.o, mem.attended, mem.out.data());
  add(layer.after_attention);
  normalize_all(k, layer.before_mlp, mem.hidden.data(), count, size, mem.normed.x.data());
  mem.normed.sum_groups(k, count, size);
  float *gate = mem.inner.x.data(), *up = mem.up.data();
  const std::vector<Piece> work = pieces({inner}, num_threads);
  const float *from = mem.normed.x.data(), *sums = mem.normed.sums.data();
  parallel_for(int(work.size()), num_threads, [&](int i) {
    const Piece& p = work[i];
    k.multiply(layer.gate, from, sums, count, p.first, p.end, gate, inner);
    k.multiply(layer.up, from, sums, count, p.first, p.end, up, inner);
    for (int m = 0; m < count; m++) {
      const int64_t at = int64_t(m) * inner + p.first;
      k.gated(layer.activation, gate + at, up + at, p.end - p.first);
    }
  });
  mem.inner.sum_groups(k, count, inner);
  multiply_all(layer.down, mem.inner, mem.out.data());
  add(layer.after_mlp);
  k.save(layer.number, mem.hidden.data(), int64_t(count) * size, out);
}

uint8_t* place_in(const Segment& s, const Side& side, int row, int64_t place) {
  const uint8_t* at = side.codes + row * side.row_bytes + place * side.line_bytes;
  if (s.table) {
    const int64_t block = s.table[int64_t(row) * s.columns + place / s.block];
    at = side.codes + block * side.block_bytes + place % s.block * side.line_bytes;
  }
  return const_cast<uint8_t*>(at);
}

void put(const Segment& s, int row, int64_t place, Number number, const void* k, const void* v) {
  for (const auto& [side, x] : {std::pair(&s.k, k), std::pair(&s.v, v)}) {
    uint8_t* codes = place_in(s, *side, row, place);
    if (side->kind != Kind::E4M3 && side->kind != Kind::E5M2) {
      std::memcpy(codes, x, s.head_dim * (number == Number::F32 ? 4 : 2));
      continue;
    }
    const Kind input = number == Number::F32 ? Kind::F32 : number == Number::BF16 ? Kind::BF16 : Kind::F16;
    const Encoding encoding = {side->kind, input, false, true, side->scale_kind, s.head_dim, nullptr, nullptr};
    const int64_t token = s.table[int64_t(row) * s.columns + place / s.block] * s.block + place % s.block;
    uint8_t* scale = side->scale ? const_cast<uint8_t*>(side->scale) + 2 * token : nullptr;
    encode(encoding, static_cast<const uint8_t*>(x), 1, 1, s.head_dim, {codes, scale, nullptr, nullptr}, 1);
  }
}

void project(const DecoderLayer& layer, const void* hidden, int count, const Positions& positions, float scaling, int num_threads,
             Newest& to) {
  to.rows = count * layer.num_kv_heads;
  to.groups = layer.num_query_heads / layer.num_kv_heads;
  to.bytes = layer.head_dim * (layer.number == Number::F32 ? 4 : 2);
  to.q.resize(int64_t(to.rows) * to.groups * layer.head_dim);
  to.keys.resize(to.rows * to.bytes);
  to.values.resize(to.rows * to.bytes);
  before_attention(layer, hidden, count, positions, to.q.data(), to.keys.data(), to.values.data(), num_threads);
  for (float& x : to.q) x *= scaling;
}

void step(const DecoderLayer& layer, Tail& tail, const void* hidden, int count, const Positions& positions, float scaling, float softcap,
          void* out, int num_threads) {
  Memory& mem = memory();
  Newest& next = mem.next;
  project(layer, hidden, count, positions, scaling, num_threads, next);
  const int rows = next.rows, groups = next.groups, d = layer.head_dim;

  const size_t home_of_tokens = tail.segments.size() - (tail.apart ? 2 : 1);
  const Segment &home = tail.segments[home_of_tokens], &last = tail.segments.back();
  std::vector<int64_t>& lengths = tail.lengths[home_of_tokens];
  const int64_t slot = tail.starts[home_of_tokens][0] + lengths[0];
  for (int row = 0; row < rows; row++) {
    const int64_t place = tail.apart ? 0 : lengths[row]++;
    put(last, row, place, layer.number, next.keys.data() + row * next.bytes, next.values.data() + row * next.bytes);
    if (tail.apart) tail.starts.back()[row] = slot;
  }

  std::vector<Part> parts;
  for (size_t i = 0; i < tail.segments.size(); i++) {
    Part part = {};
    part.segment = &tail.segments[i];
    part.q = next.q.data();
    part.starts = tail.starts[i].data();
    part.lengths = tail.lengths[i].data();
    parts.push_back(part);
  }
  mem.attention.resize(int64_t(rows) * groups * d);
  mem.lse.resize(rows * groups);
  attend({rows, groups, 1, d, &slot, softcap}, parts, mem.attention.data(), mem.lse.data(), num_threads);
  for (int row = 0; tail.apart && row < rows; row++) {
    put(home, row, lengths[row]++, layer.number, next.keys.data() + row * next.bytes, next.values.data() + row * next.bytes);
  }
  after_attention(layer, hidden, mem.attention.data(), count, out, num_threads);
}

}  // namespace kvfold
