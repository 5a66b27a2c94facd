// Attention of a few vectors over blocks of codes, with an online softmax. Compiled once for each instruction set;
// KVFOLD_KERNELS names what comes out. The formulas of the folding are in kvfold/store/affine.py.
#include <cfloat>
#include <cmath>

#include "products.h"
#include "visible.h"

namespace kvfold {
namespace {

constexpr float kLowest = -FLT_MAX;

// Where a task keeps its numbers; all sizes in floats.
struct Workspace {
  int ld_d, ld_t;  // padded head dim and block
  float *q, *folded, *scores, *weighted, *scale, *zero, *sums, *scratch, *line;
  int64_t size;

  Workspace(const Shape& shape, const Part& part, int vectors, float* at) {
    const Side &k = part.segment->k, &v = part.segment->v;
    ld_d = rounded_up(shape.head_dim, W);
    ld_t = rounded_up(part.segment->block, W);
    const int64_t longest = ld_d > ld_t ? ld_d : ld_t, groups = k.groups > v.groups ? k.groups : v.groups;
    float* p = at;
    auto take = [&p](int64_t n) {
      float* taken = p;
      p += n;
      return taken;
    };
    q = take(int64_t(vectors) * ld_d);
    folded = take(int64_t(vectors) * ld_d * groups);
    scores = take(int64_t(vectors) * ld_t);
    weighted = take(int64_t(vectors) * longest * groups);
    scale = take(longest * groups);
    zero = take(longest * groups);
    sums = take(int64_t(vectors) * (groups + 4));
    scratch = take(int64_t(ld_d) * ld_t);
    line = take(longest);
    size = p - at;
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
void restore_line(const Side& side, const uint8_t* line, int l, int columns, int ld_lines, const Workspace& w, bool has_zero,
                  float* out) {
  convert(side.kind, line, columns, out);
  if (side.scale_kind == ScaleKind::NONE) return;
  const int width = columns / side.groups;
  for (int g = 0; g < side.groups; g++) {
    const float scale = w.scale[int64_t(g) * ld_lines + l], zero = has_zero ? w.zero[int64_t(g) * ld_lines + l] : 0.0f;
    for (int n = g * width; n < (g + 1) * width; n++) out[n] = out[n] * scale + zero;
  }
}

// A block's numbers into scratch, [lines of the product, columns]: K by channel, V by token.
void restore_block(const Side& side, const uint8_t* codes, int count, int head_dim, int block, bool lines_are_tokens, bool has_zero,
                   const Workspace& w) {
  const int ld = lines_are_tokens ? w.ld_d : w.ld_t;
  const int ld_lines = side.by_channel ? w.ld_d : w.ld_t;
  const int lines = side.by_channel ? head_dim : count, columns = side.by_channel ? block : head_dim;
  const bool direct = side.by_channel != lines_are_tokens;
  for (int l = 0; l < lines; l++) {
    float* line = direct ? w.scratch + int64_t(l) * ld : w.line;
    restore_line(side, codes + l * side.line_bytes, l, columns, ld_lines, w, has_zero, line);
    if (direct) continue;
    const int end = side.by_channel ? count : head_dim;
    for (int n = 0; n < end; n++) w.scratch[int64_t(n) * ld + l] = line[n];
  }
}

bool in_registers(const Side& side, int columns, int vectors) {
  return vectors <= kDirectVectors && aligned(side.kind, columns, side.groups);
}

void cap(float softcap, int vectors, int ld, float* scores) {
  for (int64_t i = 0; i < int64_t(vectors) * ld; i += W) store(scores + i, tanh_of(load(scores + i) / softcap) * softcap);
}

// scores [vectors, T] = q · k_t, with -inf for what is not seen.
void score(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const Side& k = s.k;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const int lines = k.by_channel ? d : s.block;
  const bool scaled = k.scale_kind != ScaleKind::NONE;
  const bool has_zero = scaled && read_scales(k, block.id, lines, k.by_channel ? w.ld_d : w.ld_t, w.scale, w.zero);
  if (k.by_channel && in_registers(k, s.block, vectors)) {
    fold(k, w.q, vectors, d, w.ld_d, w, has_zero, w.folded);
    const int width = s.block / k.groups;
    for (int m = 0; m < vectors; m++) {
      for (int t = 0; t < s.block; t += W) store(w.scores + int64_t(m) * w.ld_t + t, all(w.sums[t / width * vectors + m]));
    }
    const Matrix codes = {block.k, k.line_bytes, d, s.block, k.groups, block.ahead * k.block_bytes};
    across(k.kind, codes, d, w.folded, vectors, w.ld_d, int64_t(vectors) * w.ld_d, w.scores, w.ld_t);
  } else if (!k.by_channel && in_registers(k, d, vectors)) {
    const Matrix codes = {block.k, k.line_bytes, block.count, d, k.groups, block.ahead * k.block_bytes};
    along(k.kind, codes, w.q, vectors, w.ld_d, scaled ? w.scale : nullptr, w.ld_t, w.scores, w.ld_t, false);
    if (has_zero) add_zeros(k, w.q, vectors, d, w.ld_d, w.zero, block.count, w.ld_t, w.scores, w.ld_t);
  } else {
    restore_block(k, block.k, block.count, d, s.block, false, has_zero, w);
    memset(w.scores, 0, sizeof(float) * vectors * w.ld_t);
    const Matrix numbers = {reinterpret_cast<uint8_t*>(w.scratch), int64_t(sizeof(float)) * w.ld_t, d, w.ld_t, 1};
    across(Kind::F32, numbers, d, w.q, vectors, w.ld_d, 0, w.scores, w.ld_t);
  }
  if (shape.softcap > 0) cap(shape.softcap, vectors, w.ld_t, w.scores);
  hide(shape, task, block, w.scores, w.ld_t);
}

// Scores become probabilities, relative to the largest score so far; what was added up before shrinks with it.
void soften(const Task& task, const Workspace& w) {
  for (int m = 0; m < task.end - task.first; m++) {
    float* scores = w.scores + int64_t(m) * w.ld_t;
    vf tops = load(scores);
    for (int t = W; t < w.ld_t; t += W) tops = larger(tops, load(scores + t));
    const float top = largest(tops);
    if (top > task.top[m]) {
      const float shrink = exp_negative(all(task.top[m] - top))[0];
      float* out = task.out + int64_t(m) * w.ld_d;
      for (int d = 0; d < w.ld_d; d += W) store(out + d, load(out + d) * shrink);
      task.total[m] *= shrink;
      task.top[m] = top;
    }
    vf total = {};
    for (int t = 0; t < w.ld_t; t += W) {
      const vf p = exp_negative(load(scores + t) - task.top[m]);
      store(scores + t, p);
      total += p;
    }
    task.total[m] += sum(total);
  }
}

// out [vectors, D] += Σ_t p_t v_t
void combine(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const Side& v = s.v;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const int lines = v.by_channel ? d : s.block;
  const bool scaled = v.scale_kind != ScaleKind::NONE;
  const bool has_zero = scaled && read_scales(v, block.id, lines, v.by_channel ? w.ld_d : w.ld_t, w.scale, w.zero);
  if (!v.by_channel && in_registers(v, d, vectors)) {
    const float* p = w.scores;
    if (scaled) {
      fold(v, w.scores, vectors, w.ld_t, w.ld_t, w, has_zero, w.weighted);
      p = w.weighted;
      const int width = d / v.groups;
      for (int m = 0; has_zero && m < vectors; m++) {
        float* out = task.out + int64_t(m) * w.ld_d;
        for (int i = 0; i < d; i += W) store(out + i, load(out + i) + w.sums[i / width * vectors + m]);
      }
    }
    const Matrix codes = {block.v, v.line_bytes, block.count, d, v.groups, block.ahead * v.block_bytes};
    across(v.kind, codes, block.count, p, vectors, w.ld_t, int64_t(vectors) * w.ld_t, task.out, w.ld_d);
  } else if (v.by_channel && in_registers(v, s.block, vectors)) {
    const Matrix codes = {block.v, v.line_bytes, d, s.block, v.groups, block.ahead * v.block_bytes};
    along(v.kind, codes, w.scores, vectors, w.ld_t, scaled ? w.scale : nullptr, w.ld_d, task.out, w.ld_d, true);
    if (has_zero) add_zeros(v, w.scores, vectors, s.block, w.ld_t, w.zero, d, w.ld_d, task.out, w.ld_d);
  } else {
    restore_block(v, block.v, block.count, d, s.block, true, has_zero, w);
    const Matrix numbers = {reinterpret_cast<uint8_t*>(w.scratch), int64_t(sizeof(float)) * w.ld_d, block.count, w.ld_d, 1};
    across(Kind::F32, numbers, block.count, w.scores, vectors, w.ld_t, 0, task.out, w.ld_d);
  }
}

// to [vectors, D] = from · matrix, or · its transpose
void rotate(const float* from, int ld_from, const float* matrix, bool transposed, int vectors, int d, float* to, int ld_to) {
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

void load_queries(const Shape& shape, const Task& task, const Workspace& w) {
  const int vectors = task.end - task.first, d = shape.head_dim;
  const float* q = task.part->q + (int64_t(task.row) * shape.groups * shape.queries + task.first) * d;
  memset(w.q, 0, sizeof(float) * vectors * w.ld_d);
  if (const float* matrix = task.part->segment->k.rotation) {
    rotate(q, d, matrix, false, vectors, d, w.q, w.ld_d);
    return;
  }
  for (int m = 0; m < vectors; m++) memcpy(w.q + int64_t(m) * w.ld_d, q + int64_t(m) * d, sizeof(float) * d);
}

void attend(const Shape& shape, const Task& task, float* workspace) {
  const int vectors = task.end - task.first;
  const Workspace w(shape, *task.part, vectors, workspace);
  memset(task.out, 0, sizeof(float) * vectors * w.ld_d);
  for (int m = 0; m < vectors; m++) {
    task.top[m] = kLowest;
    task.total[m] = 0;
  }
  load_queries(shape, task, w);
  for (int column = task.first_column; column < task.end_column; column++) {
    Block block;
    if (!find_block(*task.part, task.row, column, block) || nothing_seen(shape, task, block)) continue;
    block.ahead = next_block(task, column, block);
    score(shape, task, block, w);
    soften(task, w);
    combine(shape, task, block, w);
  }
}

// Sums relative to `top`, one of them in the merge.
struct Sum {
  float *out, *top, *total;
};

void add(const Sum& to, const float* out, const float* top, const float* total, int vectors, int ld) {
  for (int m = 0; m < vectors; m++) {
    if (total[m] == 0) continue;
    const float highest = top[m] > to.top[m] ? top[m] : to.top[m];
    const float old = exp_negative(all(to.top[m] - highest))[0], fresh = exp_negative(all(top[m] - highest))[0];
    float* a = to.out + int64_t(m) * ld;
    const float* b = out + int64_t(m) * ld;
    for (int d = 0; d < ld; d += W) store(a + d, load(a + d) * old + load(b + d) * fresh);
    to.total[m] = to.total[m] * old + total[m] * fresh;
    to.top[m] = highest;
  }
}

void clear(const Sum& s, int vectors, int ld) {
  memset(s.out, 0, sizeof(float) * vectors * ld);
  for (int m = 0; m < vectors; m++) {
    s.top[m] = kLowest;
    s.total[m] = 0;
  }
}

void merge(const Shape& shape, const Task* tasks, const int* which, int count, float* out, float* lse, float* workspace) {
  const int vectors = tasks[which[0]].end - tasks[which[0]].first, d = shape.head_dim, ld = rounded_up(d, W);
  const int64_t size = int64_t(vectors) * ld;
  const Sum whole = {workspace, workspace + 3 * size, workspace + 3 * size + vectors};
  const Sum turned = {workspace + size, workspace + 3 * size + 2 * vectors, workspace + 3 * size + 3 * vectors};
  clear(whole, vectors, ld);
  for (int i = 0; i < count; i++) {
    const Task& task = tasks[which[i]];
    const float* matrix = task.part->segment->v.rotation;
    if (!matrix) {
      add(whole, task.out, task.top, task.total, vectors, ld);
      continue;
    }
    const bool first = i == 0 || tasks[which[i - 1]].part != task.part;
    const bool last = i + 1 == count || tasks[which[i + 1]].part != task.part;
    if (first) clear(turned, vectors, ld);
    add(turned, task.out, task.top, task.total, vectors, ld);
    if (last) {
      float* back = workspace + 2 * size;
      memset(back, 0, sizeof(float) * size);
      rotate(turned.out, ld, matrix, true, vectors, d, back, ld);
      add(whole, back, turned.top, turned.total, vectors, ld);
    }
  }
  for (int m = 0; m < vectors; m++) {
    const float total = whole.total[m], inverse = total > 0 ? 1.0f / total : total == 0 ? 0.0f : NAN;
    for (int i = 0; i < d; i++) out[int64_t(m) * d + i] = whole.out[m * int64_t(ld) + i] * inverse;
    lse[m] = total == 0 ? -INFINITY : whole.top[m] + logf(total);
  }
}

void mass(const Shape& shape, const Task& whole, const float* lse, float* received, float* workspace) {
  const Segment& s = *whole.part->segment;
  Task task = whole;
  const int num_vectors = shape.groups * shape.queries;
  for (task.first = 0; task.first < num_vectors; task.first += kStrip) {
    task.end = task.first + kStrip < num_vectors ? task.first + kStrip : num_vectors;
    const Workspace w(shape, *task.part, task.end - task.first, workspace);
    load_queries(shape, task, w);
    for (int column = task.first_column; column < task.end_column; column++) {
      Block block;
      if (!find_block(*task.part, task.row, column, block) || nothing_seen(shape, task, block)) continue;
      score(shape, task, block, w);
      for (int m = task.first; m < task.end; m++) {
        const float norm = lse[int64_t(task.row) * num_vectors + m];
        float* scores = w.scores + int64_t(m - task.first) * w.ld_t;
        for (int t = 0; t < w.ld_t; t += W) store(scores + t, exp_negative(load(scores + t) - (norm > kLowest ? norm : kLowest)));
        float* to = received + (int64_t(task.row) * shape.groups + m / shape.queries) * s.width + int64_t(column) * s.block;
        for (int t = 0; t < block.count; t++) to[t] += scores[t];
      }
    }
  }
}

int64_t workspace(const Shape& shape, const Part& part, int vectors) {
  const int64_t merging = int64_t(vectors) * (3 * rounded_up(shape.head_dim, W) + 4);
  const int64_t attending = Workspace(shape, part, vectors, nullptr).size;
  return attending > merging ? attending : merging;
}

}  // namespace

extern const Kernels KVFOLD_KERNELS = {KVFOLD_NAME, W, workspace, attend, merge, mass};

}  // namespace kvfold
