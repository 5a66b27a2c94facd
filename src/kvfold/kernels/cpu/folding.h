// Where a task keeps its numbers, and what is folded into vectors: scales, zeros and rotations. The formulas are in
// kvfold/store/affine.py.
#pragma once
#include "integer_products.h"

namespace kvfold {
namespace {

// Blocks that are taken together, stage by stage, so that the processor has independent work while it waits for the results
// of a stage. With many vectors a block alone is enough.
constexpr int kBatch = 4;
inline int batch_of(int vectors) { return vectors <= kDirectVectors ? kBatch : 1; }

// Where a task keeps its numbers; all sizes in floats.
struct Workspace {
  int head_dim, ld_d, ld_t;  // ld: padded, ld_t the block
  float *q, *folded, *scores, *totals, *scale, *zero, *sums, *scratch, *line, *levels;
  Rounded rounded;
  int64_t size, scores_each, rows_each, steps_each;  // `each`: of one block of a batch
  int64_t q_each, totals_each;                       // of one row

  Workspace(const Shape& shape, const Part& part, int vectors, int num_rows, float* at) {
    const Side &k = part.segment->k, &v = part.segment->v;
    head_dim = shape.head_dim;
    ld_d = rounded_up(head_dim, W);
    ld_t = rounded_up(part.segment->block, W);
    const int64_t longest = ld_d > ld_t ? ld_d : ld_t, groups = k.groups > v.groups ? k.groups : v.groups;
    float* p = at;
    auto take = [&p](int64_t n) {
      float* taken = p;
      p += (n + 15) / 16 * 16;  // whole cache lines
      return taken;
    };
    q_each = int64_t(vectors) * ld_d;
    q = take(q_each * num_rows);
    folded = take(kDirectVectors * longest * groups);
    const int batch = batch_of(vectors);
    scores_each = int64_t(vectors) * ld_t;
    scores = take(scores_each * batch);
    totals_each = int64_t(vectors) * W;
    totals = take(totals_each * num_rows);
    scale = take(longest * groups);
    zero = take(longest * groups);
    sums = take(kDirectVectors * groups);
    scratch = take(int64_t(ld_d) * ld_t);
    line = take(longest);
    levels = take(kLevels);
    rounded.ld = int(longest);
    rows_each = kDirectVectors * longest * groups / 2;  // two bytes each
    steps_each = kDirectVectors * groups;
    rounded.rows = reinterpret_cast<int8_t*>(take(rows_each * batch));
    rounded.step = take(steps_each * batch);
    rounded.offset = take(steps_each * batch);
    size = p - at;
  }

  // With the scores and the rounded vectors of block b of a batch.
  Workspace of(int b) const {
    Workspace w = *this;
    w.scores += b * scores_each;
    w.rounded.rows += b * rows_each * sizeof(float);
    w.rounded.step += b * steps_each;
    w.rounded.offset += b * steps_each;
    return w;
  }
};

// Scales and zeros of a block, [groups][lines], as floats. Returns whether there are zeros.
bool read_scales(const Side& side, int64_t id, int lines, int ld, float* scale, float* zero) {
  const bool has_zero = side.zero || side.middle != 0;
  const int each = side.scale_kind == ScaleKind::HALF ? 2 : 1;
  const int64_t line_step = side.by_channel ? 1 : side.groups, group_step = side.by_channel ? lines : 1;
  const int64_t first = id * side.groups * lines;
  const float largest = side.base ? half_at(side.base + id) : 4096.0f;
  const float octave = side.by_channel ? -1.0f / 24.0f : -1.0f / 8.0f;
  for (int g = 0; g < side.groups; g++) {
    for (int l = 0; l < lines; l += W) {
      const int64_t at = first + g * group_step + l * line_step;
      uint16_t gathered[W], zeros[W];
      const uint8_t* from = side.scale + at * each;
      const uint16_t* zero_from = side.zero + (side.zero ? at : 0);
      if (line_step != 1 || l + W > lines) {
        memset(gathered, 0, sizeof(gathered));
        memset(zeros, 0, sizeof(zeros));
        for (int i = 0; i < W && l + i < lines; i++) {
          memcpy(reinterpret_cast<uint8_t*>(gathered) + i * each, from + i * line_step * each, each);
          if (side.zero) zeros[i] = zero_from[i * line_step];
        }
        from = reinterpret_cast<uint8_t*>(gathered);
        zero_from = zeros;
      }
      const vf s = each == 2 ? load_half(from) : exp2(to_float(load_bytes(from)) * octave) * largest;
      store(scale + int64_t(g) * ld + l, s);
      if (side.zero) {
        store(zero + int64_t(g) * ld + l, load_half(reinterpret_cast<const uint8_t*>(zero_from)));
      } else if (has_zero) {
        store(zero + int64_t(g) * ld + l, s * -side.middle);
      }
    }
  }
  return has_zero;
}

// The levels of a block's codes.
const float* read_levels(const Side& side, int64_t id, const Workspace& w) {
  if (!side.block_levels) return side.levels;
  const int count = side.kind == Kind::T4 ? 16 : side.kind == Kind::T3 ? 8 : 4;
  for (int i = 0; i < kLevels; i++) w.levels[i] = half_at(side.block_levels + id * count + i % count);
  return w.levels;
}

// The highest code's half: what integers are centred on.
inline float middle_of(Kind kind) { return kind == Kind::I8 ? 127.5f : kind == Kind::I4 ? 7.5f : 1.5f; }

// `vectors` of x [vectors, ld] times the scales of a block, in integers, for every group.
void round_folded(const Side& side, const float* x, int vectors, int ld, const Workspace& w) {
  const auto round = side.kind == Kind::I8 ? side.zero ? round_vectors<2, true> : round_vectors<2, false>
                                           : side.zero ? round_vectors<1, true> : round_vectors<1, false>;
  for (int g = 0; g < side.groups; g++) {
    const float *scale = w.scale + int64_t(g) * ld, *zero = side.zero ? w.zero + int64_t(g) * ld : nullptr;
    round(x, vectors, ld, scale, zero, middle_of(side.kind), w.rounded, g);
  }
}

float dot(const float* a, const float* b, int n) {
  vf total = {};
  int i = 0;
  for (; i + W <= n; i += W) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < n; i++) rest += a[i] * b[i];
  return rest;
}

float sum_of(const float* a, int n) {
  vf total = {};
  int i = 0;
  for (; i + W <= n; i += W) total += load(a + i);
  float rest = sum(total);
  for (; i < n; i++) rest += a[i];
  return rest;
}

// What `across` needs of the vectors x [vectors, n]: times the scale, for each group. Offsets are Σ x z, [groups, vectors].
void fold(const Side& side, const float* x, int vectors, int n, int ld, const Workspace& w, bool has_zero, float* folded) {
  for (int g = 0; g < side.groups; g++) {
    for (int m = 0; m < vectors; m++) {
      const float *from = x + int64_t(m) * ld, *scale = w.scale + int64_t(g) * ld;
      float* to = folded + (int64_t(g) * vectors + m) * ld;
      for (int i = 0; i < n; i += W) store(to + i, load(from + i) * load(scale + i));
      w.sums[g * vectors + m] = has_zero ? dot(from, w.zero + int64_t(g) * ld, n) : 0.0f;
    }
  }
}

// Adds to `c` what zeros contribute to `along`: Σ_g zero[g, l] Σ_n∈g x[n].
void add_zeros(const Side& side, const float* x, int vectors, int columns, int ldx, const float* zero, int lines, int ld_lines,
               float* c, int ldc) {
  const int width = columns / side.groups;
  for (int m = 0; m < vectors; m++) {
    for (int g = 0; g < side.groups; g++) {
      const float total = sum_of(x + int64_t(m) * ldx + g * width, width);
      float* to = c + int64_t(m) * ldc;
      for (int l = 0; l < lines; l += W) store(to + l, load(to + l) + load(zero + int64_t(g) * ld_lines + l) * total);
    }
  }
}

// A line of codes as the numbers that it stands for. `l` counts lines of the block.
void restore_line(const Side& side, const uint8_t* line, const float* levels, int l, int columns, int ld_lines, const Workspace& w,
                  bool has_zero, float* out) {
  convert(side.kind, line, columns, levels, out);
  if (side.scale_kind == ScaleKind::NONE) return;
  const int width = columns / side.groups;
  for (int g = 0; g < side.groups; g++) {
    const float scale = w.scale[int64_t(g) * ld_lines + l], zero = has_zero ? w.zero[int64_t(g) * ld_lines + l] : 0.0f;
    for (int n = g * width; n < (g + 1) * width; n++) out[n] = out[n] * scale + zero;
  }
}

// A block's numbers into scratch, [lines of the product, columns]: K by channel, V by token.
void restore_block(const Side& side, const uint8_t* codes, const float* levels, int count, int head_dim, int block,
                   bool lines_are_tokens, bool has_zero, const Workspace& w) {
  const int ld = lines_are_tokens ? w.ld_d : w.ld_t;
  const int ld_lines = side.by_channel ? w.ld_d : w.ld_t;
  const int lines = side.by_channel ? head_dim : count, columns = side.by_channel ? block : head_dim;
  const bool direct = side.by_channel != lines_are_tokens;
  for (int l = 0; l < lines; l++) {
    float* line = direct ? w.scratch + int64_t(l) * ld : w.line;
    restore_line(side, codes + l * side.line_bytes, levels, l, columns, ld_lines, w, has_zero, line);
    if (direct) continue;
    const int end = side.by_channel ? count : head_dim;
    for (int n = 0; n < end; n++) w.scratch[int64_t(n) * ld + l] = line[n];
  }
}

bool in_registers(const Side& side, int columns, int vectors) {
  return vectors <= kDirectVectors && aligned(side.kind, columns, side.groups);
}

// Whether a side is multiplied in integers: by lines of codes that the vectors' scales were folded into.
bool in_integers(const Side& side, int lines, int columns, int vectors) {
  return integers_pay(side.kind) && lines % 4 == 0 && in_registers(side, columns, vectors);
}

// Floats that `rotate` needs for its transposed matrix.
inline int64_t rotation_floats(int vectors, int d) { return vectors > kDirectVectors ? int64_t(d) * d : 0; }

// to [vectors, D] = from · matrix, or · its transpose, for which many vectors turn the matrix first, into `room`.
void rotate(const float* from, int ld_from, const float* matrix, bool transposed, int vectors, int d, float* to, int ld_to, float* room) {
  if (transposed && room && rotation_floats(vectors, d)) {
    for (int i = 0; i < d; i++) {
      for (int j = 0; j < d; j++) room[i * d + j] = matrix[j * d + i];
    }
    matrix = room;
    transposed = false;
  }
  const Matrix rotation = {reinterpret_cast<const uint8_t*>(matrix), int64_t(sizeof(float)) * d, d, d, 1};
  if (d % W == 0 && transposed) {
    along(Kind::F32, rotation, from, vectors, ld_from, nullptr, 0, to, ld_to, false);
    return;
  }
  for (int m = 0; m < vectors; m++) memset(to + int64_t(m) * ld_to, 0, sizeof(float) * d);
  if (d % W == 0) {
    across(Kind::F32, rotation, d, from, vectors, ld_from, 0, to, ld_to);
    return;
  }
  for (int m = 0; m < vectors; m++) {
    for (int i = 0; i < d; i++) {
      for (int j = 0; j < d; j++) to[int64_t(m) * ld_to + j] += from[int64_t(m) * ld_from + i] * matrix[transposed ? j * d + i : i * d + j];
    }
  }
}

// to [vectors, ld]: the queries of a task of one row.
void load_queries(const Shape& shape, const Task& task, float* to, int ld) {
  const int vectors = task.end - task.first, d = shape.head_dim;
  const float* q = task.part->q + (int64_t(task.row) * shape.groups * shape.queries + task.first) * d;
  memset(to, 0, sizeof(float) * vectors * ld);
  if (const float* matrix = task.part->segment->k.rotation) {
    rotate(q, d, matrix, false, vectors, d, to, ld, nullptr);
    return;
  }
  for (int m = 0; m < vectors; m++) memcpy(to + int64_t(m) * ld, q + int64_t(m) * d, sizeof(float) * d);
}

}  // namespace
}  // namespace kvfold
