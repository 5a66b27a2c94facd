// Attention of a few vectors over blocks of codes, with an online softmax. Compiled once for each instruction set;
// KVFOLD_KERNELS names what comes out. The formulas of the folding are in kvfold/store/affine.py.
#include <cfloat>
#include <cmath>

#include "encoding.h"
#include "panels.h"
#include "visible.h"

namespace kvfold {

void KVFOLD_ENCODE(const Encoding&, const uint8_t* x, int tokens, int head_dim, const Encoded& to, float* floats);
void KVFOLD_NAME_LEVELS(const Naming&, const float* x, int tokens, int head_dim, uint8_t* codes, float* floats);

namespace {

constexpr float kLowest = -FLT_MAX;

void cap(float softcap, int vectors, int ld, float* scores) {
  for (int64_t i = 0; i < int64_t(vectors) * ld; i += W) store(scores + i, tanh_of(load(scores + i) / softcap) * softcap);
}

bool k_in_integers(const Shape& shape, const Segment& s, int vectors) {
  return s.k.by_channel && in_integers(s.k, shape.head_dim, s.block, vectors);
}

bool v_in_integers(const Shape& shape, const Segment& s, int vectors) {
  return !s.v.by_channel && in_integers(s.v, s.block, shape.head_dim, vectors);
}

// Queries and probabilities in integers, with the scales of a block.
void round_queries(const Segment& s, const Block& block, int vectors, const Workspace& w) {
  read_scales(s.k, block.id, w.head_dim, w.ld_d, w.scale, w.zero);
  round_folded(s.k, w.q, vectors, w.ld_d, w);
}

void round_probabilities(const Segment& s, const Block& block, int vectors, const Workspace& w) {
  read_scales(s.v, block.id, s.block, w.ld_t, w.scale, w.zero);
  round_folded(s.v, w.scores, vectors, w.ld_t, w);
}

// scores [vectors, T] = q · k_t, from codes in registers.
void multiply_keys(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const Side& k = s.k;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const int lines = k.by_channel ? d : s.block;
  const float* levels = read_levels(k, block.id, w);
  const bool integers = k_in_integers(shape, s, vectors), scaled = k.scale_kind != ScaleKind::NONE;
  const bool has_zero = !integers && scaled && read_scales(k, block.id, lines, k.by_channel ? w.ld_d : w.ld_t, w.scale, w.zero);
  if (k.bands.used) {
    score_bands(k, block.k, block.id, block.ahead, s.block, vectors, w);
    mend_entries(k.bands, block.id, d, true, vectors, w.q, w.ld_d, w.scores, w.ld_t);
  } else if (integers) {
    const Matrix codes = {block.k, k.line_bytes, d, s.block, k.groups, block.ahead * k.block_bytes};
    integer_across(k.kind, codes, d, w.rounded, vectors, w.scores, w.ld_t, false);
  } else if (k.by_channel) {
    fold(k, w.q, vectors, d, w.ld_d, w, has_zero, w.folded);
    const int width = s.block / k.groups;
    for (int m = 0; m < vectors; m++) {
      for (int t = 0; t < s.block; t += W) store(w.scores + int64_t(m) * w.ld_t + t, all(w.sums[t / width * vectors + m]));
    }
    const Matrix codes = {block.k, k.line_bytes, d, s.block, k.groups, block.ahead * k.block_bytes, levels};
    across(k.kind, codes, d, w.folded, vectors, w.ld_d, int64_t(vectors) * w.ld_d, w.scores, w.ld_t);
  } else {
    const Matrix codes = {block.k, k.line_bytes, block.count, d, k.groups, block.ahead * k.block_bytes, levels};
    along(k.kind, codes, w.q, vectors, w.ld_d, scaled ? w.scale : nullptr, w.ld_t, w.scores, w.ld_t, false);
    if (has_zero) add_zeros(k, w.q, vectors, d, w.ld_d, w.zero, block.count, w.ld_t, w.scores, w.ld_t);
  }
  add_repairs(k.repairs, block.id, block.count, s.block, d, true, vectors, w.q, w.ld_d, w.scores, w.ld_t, w);
}

// scores [vectors, T] = q · k_t, with -inf for what is not seen.
void score(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const int vectors = task.end - task.first, d = shape.head_dim;
  if (in_registers(s.k, s.k.by_channel ? s.block : d, vectors)) {
    multiply_keys(shape, task, block, w);
  } else {
    restore(s.k, block.id, block.k, block.count, d, s.block, false, w);
    memset(w.scores, 0, sizeof(float) * vectors * w.ld_t);
    const Matrix numbers = {reinterpret_cast<uint8_t*>(w.scratch), int64_t(sizeof(float)) * w.ld_t, d, w.ld_t, 1};
    across(Kind::F32, numbers, d, w.q, vectors, w.ld_d, 0, w.scores, w.ld_t);
  }
  if (shape.softcap > 0) cap(shape.softcap, vectors, w.ld_t, w.scores);
  hide(shape, task, block, w.scores, w.ld_t);
}

// The scores of some blocks become probabilities, relative to the largest score so far; what was added up before shrinks with it.
void soften(const Task& task, const Workspace& w, int num_blocks) {
  for (int m = 0; m < task.end - task.first; m++) {
    float *first = w.scores + int64_t(m) * w.ld_t, *totals = w.totals + int64_t(m) * W;
    vf tops = load(first);
    for (int b = 0; b < num_blocks; b++) {
      for (int t = 0; t < w.ld_t; t += W) tops = larger(tops, load(first + b * w.scores_each + t));
    }
    if (any_larger(tops, task.top[m])) {
      const float top = largest(tops), shrink = exp_negative(all(task.top[m] - top))[0];
      float* out = task.out + int64_t(m) * w.ld_d;
      for (int d = 0; d < w.ld_d; d += W) store(out + d, load(out + d) * shrink);
      store(totals, load(totals) * shrink);
      task.top[m] = top;
    }
    vf total = load(totals);
    for (int b = 0; b < num_blocks; b++) {
      float* scores = first + b * w.scores_each;
      for (int t = 0; t < w.ld_t; t += W) {
        const vf p = exp_negative(load(scores + t) - task.top[m]);
        store(scores + t, p);
        total += p;
      }
    }
    store(totals, total);
  }
}

// out [vectors, D] += Σ_t p_t v_t, from codes in registers.
void multiply_values(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const Side& v = s.v;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const int lines = v.by_channel ? d : s.block;
  const float* levels = read_levels(v, block.id, w);
  const bool integers = v_in_integers(shape, s, vectors), scaled = v.scale_kind != ScaleKind::NONE;
  const bool has_zero = !integers && scaled && read_scales(v, block.id, lines, v.by_channel ? w.ld_d : w.ld_t, w.scale, w.zero);
  if (v.bands.used) {
    combine_bands(v, block.v, block.id, block.ahead, s.block, vectors, task.out, w);
    mend_entries(v.bands, block.id, d, false, vectors, w.scores, w.ld_t, task.out, w.ld_d);
  } else if (integers) {
    const Matrix codes = {block.v, v.line_bytes, s.block, d, v.groups, block.ahead * v.block_bytes};
    integer_across(v.kind, codes, rounded_up(block.count, 4), w.rounded, vectors, task.out, w.ld_d, true);
  } else if (!v.by_channel) {
    const float* p = w.scores;
    if (scaled) {
      fold(v, w.scores, vectors, w.ld_t, w.ld_t, w, has_zero, w.folded);
      p = w.folded;
      const int width = d / v.groups;
      for (int m = 0; has_zero && m < vectors; m++) {
        float* out = task.out + int64_t(m) * w.ld_d;
        for (int i = 0; i < d; i += W) store(out + i, load(out + i) + w.sums[i / width * vectors + m]);
      }
    }
    const Matrix codes = {block.v, v.line_bytes, block.count, d, v.groups, block.ahead * v.block_bytes, levels};
    across(v.kind, codes, block.count, p, vectors, w.ld_t, int64_t(vectors) * w.ld_t, task.out, w.ld_d);
  } else {
    const Matrix codes = {block.v, v.line_bytes, d, s.block, v.groups, block.ahead * v.block_bytes, levels};
    along(v.kind, codes, w.scores, vectors, w.ld_t, scaled ? w.scale : nullptr, w.ld_d, task.out, w.ld_d, true);
    if (has_zero) add_zeros(v, w.scores, vectors, s.block, w.ld_t, w.zero, d, w.ld_d, task.out, w.ld_d);
  }
  add_repairs(v.repairs, block.id, block.count, s.block, d, false, vectors, w.scores, w.ld_t, task.out, w.ld_d, w);
}

// out [vectors, D] += Σ_t p_t v_t
void combine(const Shape& shape, const Task& task, const Block& block, const Workspace& w) {
  const Segment& s = *task.part->segment;
  const int vectors = task.end - task.first, d = shape.head_dim;
  if (in_registers(s.v, s.v.by_channel ? s.block : d, vectors)) {
    multiply_values(shape, task, block, w);
    return;
  }
  restore(s.v, block.id, block.v, block.count, d, s.block, true, w);
  const Matrix numbers = {reinterpret_cast<uint8_t*>(w.scratch), int64_t(sizeof(float)) * w.ld_d, block.count, w.ld_d, 1};
  across(Kind::F32, numbers, block.count, w.scores, vectors, w.ld_t, 0, task.out, w.ld_d);
}

// More vectors than codes are converted for in registers.
void attend_many(const Shape& shape, const Task& task, float* workspace) {
  const Segment& s = *task.part->segment;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const Workspace w(shape, *task.part, vectors, workspace);
  const Panels panels(shape, w, vectors, workspace + w.size);
  memset(task.out, 0, sizeof(float) * vectors * w.ld_d);
  memset(w.totals, 0, sizeof(float) * vectors * W);
  for (int m = 0; m < vectors; m++) task.top[m] = kLowest;
  load_queries(shape, task, w);
  panels.take_queries(w, vectors);
  for (int column = task.first_column; column < task.end_column; column++) {
    Block block;
    if (!find_block(*task.part, task.row, column, block) || nothing_seen(shape, task, block)) continue;
    panels.take_keys(s.k, block.id, block.k, block.count, d, s.block, w);
    panels.take_values(s.v, block.id, block.v, block.count, d, s.block, w);
    for (int first = 0; first < vectors; first += kPanel) {
      Task panel = task;
      panel.first = task.first + first;
      panel.end = panel.first + kPanel < task.end ? panel.first + kPanel : task.end;
      panel.out = task.out + int64_t(first) * w.ld_d;
      panel.top = task.top + first;
      if (nothing_seen(shape, panel, block)) continue;
      const int count = panel.end - panel.first;
      panels.score(first, count, d, w);
      if (shape.softcap > 0) cap(shape.softcap, count, w.ld_t, w.scores);
      hide(shape, panel, block, w.scores, w.ld_t);
      Workspace of_panel = w;
      of_panel.totals += int64_t(first) * W;
      if (!panels.soften(panel, of_panel)) soften(panel, of_panel, 1);
      panels.combine(count, block.count, w, panel.out);
    }
  }
  for (int m = 0; m < vectors; m++) task.total[m] = sum(load(w.totals + int64_t(m) * W));
}

void attend(const Shape& shape, const Task& task, float* workspace) {
  const int vectors = task.end - task.first;
  if (vectors > kDirectVectors) {
    attend_many(shape, task, workspace);
    return;
  }
  const Workspace w(shape, *task.part, vectors, workspace);
  memset(task.out, 0, sizeof(float) * vectors * w.ld_d);
  memset(w.totals, 0, sizeof(float) * vectors * W);
  for (int m = 0; m < vectors; m++) task.top[m] = kLowest;
  load_queries(shape, task, w);
  const Segment& segment = *task.part->segment;
  const bool round_q = k_in_integers(shape, segment, vectors), round_p = v_in_integers(shape, segment, vectors);
  const int batch = batch_of(vectors);
  for (int column = task.first_column; column < task.end_column;) {
    Block blocks[kBatch];
    int n = 0;
    for (; n < batch && column < task.end_column; column++) {
      if (!find_block(*task.part, task.row, column, blocks[n]) || nothing_seen(shape, task, blocks[n])) continue;
      blocks[n].ahead = next_block(task, column, batch, blocks[n]);
      n++;
    }
    for (int b = 0; round_q && b < n; b++) round_queries(segment, blocks[b], vectors, w.of(b));
    for (int b = 0; b < n; b++) score(shape, task, blocks[b], w.of(b));
    soften(task, w, n);
    for (int b = 0; round_p && b < n; b++) round_probabilities(segment, blocks[b], vectors, w.of(b));
    for (int b = 0; b < n; b++) combine(shape, task, blocks[b], w.of(b));
  }
  for (int m = 0; m < vectors; m++) task.total[m] = sum(load(w.totals + int64_t(m) * W));
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
      if (k_in_integers(shape, s, task.end - task.first)) round_queries(s, block, task.end - task.first, w);
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
  const Workspace few(shape, part, vectors, nullptr);
  const int64_t attending = few.size + (vectors > kDirectVectors ? Panels(shape, few, vectors, nullptr).size : 0);
  return attending > merging ? attending : merging;
}

}  // namespace

extern const Kernels KVFOLD_KERNELS = {KVFOLD_NAME, W, workspace, attend, merge, mass, KVFOLD_ENCODE, KVFOLD_NAME_LEVELS};

}  // namespace kvfold
