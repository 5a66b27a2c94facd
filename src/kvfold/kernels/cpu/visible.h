// The blocks of a row, and which of their tokens a query sees.
#pragma once
#include <cmath>
#include <initializer_list>

#include "attention.h"

namespace kvfold {
namespace {

// One block as a task sees it.
struct Block {
  int row;        // of the task
  int64_t id;     // in the pool, or 0
  int64_t ahead;  // blocks of the pool from this one to the next of the row
  int count;      // places up to the last token
  bool holes;     // some of them are empty
  int64_t lowest, highest;  // slots
  const int32_t* slots;     // null: lowest, lowest + 1 ...
  const uint8_t *k, *v;
};

bool find_block(const Part& part, int row, int column, Block& block) {
  const Segment& s = *part.segment;
  const int first = column * s.block;
  int places = s.block;
  block.id = block.ahead = 0;
  if (s.table) {
    block.id = s.table[int64_t(row) * s.columns + column];
    if (block.id < 0) return false;
    block.k = s.k.codes + block.id * s.k.block_bytes;
    block.v = s.v.codes + block.id * s.v.block_bytes;
  } else {
    places = s.width - first < places ? s.width - first : places;
    block.k = s.k.codes + row * s.k.row_bytes + first * s.k.line_bytes;
    block.v = s.v.codes + row * s.v.row_bytes + first * s.v.line_bytes;
  }
  block.holes = false;
  if (!s.slots) {
    const int64_t left = part.lengths[row] - first;
    if (left <= 0) return false;
    block.slots = nullptr;
    block.count = left < places ? int(left) : places;
    block.lowest = part.starts[row] + first;
    block.highest = block.lowest + block.count - 1;
    return true;
  }
  block.slots = s.slots + (s.table ? block.id * s.block : int64_t(row) * s.width + first);
  int count = 0, tokens = 0;
  int32_t lowest = INT32_MAX, highest = -1;
  for (int t = 0; t < places; t++) {
    const int32_t slot = block.slots[t];
    if (slot < 0) continue;
    count = t + 1;
    tokens++;
    lowest = slot < lowest ? slot : lowest;
    highest = slot > highest ? slot : highest;
  }
  block.count = count;
  block.holes = tokens < count;
  block.lowest = lowest;
  block.highest = highest;
  return count > 0;
}

// The blocks of a task in the order in which they are read: column by column, since rows grow together and a pool's blocks are
// then read one after the other.
struct Place {
  int row, column;  // the row counts from the task's first
};

inline int num_places(const Task& task) { return (task.end_column - task.first_column) * task.num_rows; }

inline Place place_of(const Task& task, int place) {
  return {place % task.num_rows, task.first_column + place / task.num_rows};
}

// How far the block is that comes `distance` places later. The products ask for its codes line by line while they work on this one's:
// the processor's own prefetching ends at a page, and a block of a pool rarely continues the one before.
int64_t next_block(const Task& task, int place, int distance, const Block& block) {
  const Segment& s = *task.part->segment;
  if (!s.table || place + distance >= num_places(task)) return 0;
  const Place next = place_of(task, place + distance);
  const int64_t id = s.table[int64_t(task.row + next.row) * s.columns + next.column];
  if (id < 0) return 0;
  for (const Side* side : {&s.k, &s.v}) {
    if (side->scale_kind == ScaleKind::NONE) continue;
    const int each = side->scale_kind == ScaleKind::HALF ? 2 : 1;
    const int64_t scales = int64_t(side->groups) * (side->by_channel ? s.head_dim : s.block);
    for (int64_t i = 0; i < scales * each; i += 64) __builtin_prefetch(side->scale + id * scales * each + i);
    if (!side->zero) continue;
    for (int64_t i = 0; i < scales; i += 32) __builtin_prefetch(side->zero + id * scales + i);
  }
  return id - block.id;
}

struct Range {
  int64_t lowest, highest;  // the slots that a query sees
};

Range visible(const Shape& shape, const Part& part, int row, int vector) {
  const int query = vector % shape.queries;
  Range seen = {INT64_MIN, INT64_MAX};
  if (part.segment->causal && shape.queries > 1) seen.highest = shape.query_slots[query];
  if (part.first_visible) seen.lowest = part.first_visible[int64_t(row) * shape.queries + query];
  return seen;
}

bool everything_seen(const Shape& shape, const Part& part) {
  return !part.first_visible && !(part.segment->causal && shape.queries > 1);
}

bool nothing_seen(const Shape& shape, const Task& task, const Block& block) {
  if (everything_seen(shape, *task.part)) return false;
  for (int m = task.first; m < task.end; m++) {
    const Range seen = visible(shape, *task.part, task.row, m);
    if (block.lowest <= seen.highest && block.highest >= seen.lowest) return false;
  }
  return true;
}

void hide(const Shape& shape, const Task& task, const Block& block, float* scores, int ld) {
  for (int m = task.first; m < task.end; m++, scores += ld) {
    for (int t = block.count; t < ld; t++) scores[t] = -INFINITY;
    if (!block.holes && everything_seen(shape, *task.part)) continue;
    const Range seen = visible(shape, *task.part, task.row, m);
    if (!block.holes && block.lowest >= seen.lowest && block.highest <= seen.highest) continue;
    for (int t = 0; t < block.count; t++) {
      const int64_t slot = block.slots ? block.slots[t] : block.lowest + t;
      if (slot < 0 || slot < seen.lowest || slot > seen.highest) scores[t] = -INFINITY;
    }
  }
}

}  // namespace
}  // namespace kvfold
