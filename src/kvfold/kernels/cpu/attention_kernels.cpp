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

// Takes the scores of a block into account for the largest score so far; what was added up before shrinks with it.
void raise_top(const Task& task, const Workspace& w) {
  for (int m = 0; m < task.end - task.first; m++) {
    const float* scores = w.scores + int64_t(m) * w.ld_t;
    vf tops = load(scores);
    for (int t = W; t < w.ld_t; t += W) tops = larger(tops, load(scores + t));
    if (!any_larger(tops, task.top[m])) continue;
    const float top = largest(tops), shrink = exp_negative(all(task.top[m] - top))[0];
    float *out = task.out + int64_t(m) * w.ld_d, *totals = w.totals + int64_t(m) * W;
    for (int d = 0; d < w.ld_d; d += W) store(out + d, load(out + d) * shrink);
    store(totals, load(totals) * shrink);
    task.top[m] = top;
  }
}

// The scores of a block become probabilities, relative to the largest score so far.
void soften(const Task& task, const Workspace& w) {
  for (int m = 0; m < task.end - task.first; m++) {
    float *scores = w.scores + int64_t(m) * w.ld_t, *totals = w.totals + int64_t(m) * W;
    vf total = load(totals);
    for (int t = 0; t < w.ld_t; t += W) {
      const vf p = exp_negative(load(scores + t) - task.top[m]);
      store(scores + t, p);
      total += p;
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

// More vectors than codes are converted for in registers; a task of one row.
void attend_many(const Shape& shape, const Task& task, float* workspace) {
  const Segment& s = *task.part->segment;
  const int vectors = task.end - task.first, d = shape.head_dim;
  const Workspace w(shape, *task.part, vectors, 1, workspace);
  const Panels panels(shape, w, vectors, workspace + w.size);
  memset(task.out, 0, sizeof(float) * vectors * w.ld_d);
  memset(w.totals, 0, sizeof(float) * vectors * W);
  for (int m = 0; m < vectors; m++) task.top[m] = kLowest;
  load_queries(shape, task, w.q, w.ld_d);
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
      if (!panels.soften(panel, of_panel)) {
        raise_top(panel, of_panel);
        soften(panel, of_panel);
      }
      panels.combine(count, block.count, w, panel.out);
    }
  }
  for (int m = 0; m < vectors; m++) task.total[m] = sum(load(w.totals + int64_t(m) * W));
}

// What a task does for one of its rows.
Task row_of(const Task& task, int row, int ld_d) {
  const int vectors = task.end - task.first;
  Task one = task;
  one.row += row;
  one.num_rows = 1;
  one.out += int64_t(row) * vectors * ld_d;
  one.top += row * vectors;
  one.total += row * vectors;
  return one;
}

// The next blocks of a task that its queries see, up to `batch` of them, from `place` on; returns how many.
int gather(const Shape& shape, const Task& task, const Task* rows, int batch, int& place, Block* blocks) {
  int n = 0;
  for (const int places = num_places(task); n < batch && place < places; place++) {
    const Place at = place_of(task, place);
    Block& block = blocks[n];
    block.row = at.row;
    if (!find_block(*task.part, rows[at.row].row, at.column, block) || nothing_seen(shape, rows[at.row], block)) continue;
    block.ahead = next_block(task, place, batch, block);
    n++;
  }
  return n;
}

void attend(const Shape& shape, const Task& task, float* workspace) {
  if (task.end - task.first > kDirectVectors) {
    attend_many(shape, task, workspace);
    return;
  }
  const int vectors = task.end - task.first, places = num_places(task), batch = batch_of(vectors);
  const Workspace w(shape, *task.part, vectors, task.num_rows, workspace);
  const Segment& segment = *task.part->segment;
  const bool round_q = k_in_integers(shape, segment, vectors), round_p = v_in_integers(shape, segment, vectors);
  Task rows[kRows];
  for (int r = 0; r < task.num_rows; r++) {
    rows[r] = row_of(task, r, w.ld_d);
    load_queries(shape, rows[r], w.q + r * w.q_each, w.ld_d);
  }
  memset(task.out, 0, sizeof(float) * task.num_rows * vectors * w.ld_d);
  memset(w.totals, 0, sizeof(float) * task.num_rows * vectors * W);
  for (int i = 0; i < task.num_rows * vectors; i++) task.top[i] = kLowest;
  Workspace views[] = {w, w, w, w};
  static_assert(sizeof(views) / sizeof(w) == kBatch);
  for (int b = 1; b < batch; b++) views[b] = w.of(b);
  for (int place = 0; place < places;) {
    Block blocks[kBatch];
    const int n = gather(shape, task, rows, batch, place, blocks);
    for (int b = 0; b < n; b++) {
      views[b].q = w.q + blocks[b].row * w.q_each;
      views[b].totals = w.totals + blocks[b].row * w.totals_each;
    }
    // Stage by stage: a stage of one block is a chain of dependent instructions, and the blocks' chains don't depend on each other.
    const auto each = [&](auto stage) {
      for (int b = 0; b < n; b++) stage(rows[blocks[b].row], blocks[b], views[b]);
    };
    if (round_q) each([&](const Task&, const Block& block, const Workspace& one) { round_queries(segment, block, vectors, one); });
    each([&](const Task& row, const Block& block, const Workspace& one) { score(shape, row, block, one); });
    each([&](const Task& row, const Block&, const Workspace& one) { raise_top(row, one); });
    each([&](const Task& row, const Block&, const Workspace& one) { soften(row, one); });
    if (round_p) each([&](const Task&, const Block& block, const Workspace& one) { round_probabilities(segment, block, vectors, one); });
    each([&](const Task& row, const Block& block, const Workspace& one) { combine(shape, row, block, one); });
  }
  for (int i = 0; i < task.num_rows * vectors; i++) task.total[i] = sum(load(w.totals + int64_t(i) * W));
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

void merge(const Shape& shape, const Task* tasks, int count, int row, float* out, float* lse, float* workspace) {
  const int vectors = tasks->end - tasks->first, d = shape.head_dim, ld = rounded_up(d, W);
  const int64_t size = int64_t(vectors) * ld;
  const Sum whole = {workspace, workspace + 3 * size, workspace + 3 * size + vectors};
  const Sum turned = {workspace + size, workspace + 3 * size + 2 * vectors, workspace + 3 * size + 3 * vectors};
  clear(whole, vectors, ld);
  for (int i = 0; i < count; i++) {
    const Task task = row_of(tasks[i], row - tasks[i].row, ld);
    const float* matrix = task.part->segment->v.rotation;
    if (!matrix) {
      add(whole, task.out, task.top, task.total, vectors, ld);
      continue;
    }
    const bool first = i == 0 || tasks[i - 1].part != task.part;
    const bool last = i + 1 == count || tasks[i + 1].part != task.part;
    if (first) clear(turned, vectors, ld);
    add(turned, task.out, task.top, task.total, vectors, ld);
    if (last) {
      float* back = workspace + 2 * size;
      memset(back, 0, sizeof(float) * size);
      rotate(turned.out, ld, matrix, true, vectors, d, back, ld, workspace + 3 * size + 4 * vectors);
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
    const Workspace w(shape, *task.part, task.end - task.first, 1, workspace);
    load_queries(shape, task, w.q, w.ld_d);
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
  const int64_t merging = int64_t(vectors) * (3 * rounded_up(shape.head_dim, W) + 4) + rotation_floats(vectors, shape.head_dim);
  const int num_rows = shape.rows < rows_together(vectors) ? shape.rows : rows_together(vectors);
  const Workspace w(shape, part, vectors, num_rows, nullptr);
  const int64_t attending = w.size + (vectors > kDirectVectors ? Panels(shape, w, vectors, nullptr).size : 0);
  return attending > merging ? attending : merging;
}

}  // namespace

extern const Kernels KVFOLD_KERNELS = {KVFOLD_NAME, W, workspace, attend, merge, mass, KVFOLD_ENCODE, KVFOLD_NAME_LEVELS};

}  // namespace kvfold
