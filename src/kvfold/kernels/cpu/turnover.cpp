// A decode step under a keep policy: one token comes, and one goes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "engine.h"
#include "schedule.h"

namespace kvfold {
namespace {

struct Memory {
  Newest next;
  std::vector<float> shifted, lse, received;
};

Memory& memory() {
  thread_local Memory m;
  return m;
}

const Segment& run_of(const Turnover& t) { return t.segments.back(); }

// Blocks come before the run, in segments as in places.
const Segment* blocks_of(const Turnover& t) { return t.has_blocks ? &t.segments[t.segments.size() - 2] : nullptr; }

int places_in_blocks(const Turnover& t) { return t.places - run_of(t).width; }

// The slot of the token at a place of a row; null where the row has no block there.
int32_t* slot_at(const Turnover& t, int row, int place) {
  const int in_blocks = places_in_blocks(t);
  const Segment& s = place < in_blocks ? *blocks_of(t) : run_of(t);
  int64_t at = int64_t(row) * s.width + place - in_blocks;
  if (place < in_blocks) {
    const int64_t block = s.table[int64_t(row) * s.columns + place / s.block];
    if (block < 0) return nullptr;
    at = block * s.block + place % s.block;
  }
  return const_cast<int32_t*>(s.slots) + at;
}

void shift_all(const Shift& by, const float* q, int64_t count, int d, std::vector<float>& out) {
  out.assign(q, q + count * d);
  for (int i = 0; i < by.half; i++) {
    const double angle = double(by.positions) * double(by.inv_freq[i]);
    const float cos = float(std::cos(angle)), sin = float(std::sin(angle));
    for (int64_t m = 0; m < count; m++) {
      float &x = out[m * d + i], &y = out[m * d + i + by.half];
      const float a = x, b = y;
      x = a * cos - b * sin;
      y = b * cos + a * sin;
    }
  }
}

// What tokens of a segment received, [rows, width], to [rows, places] from place `first` on.
void gather_mass(const Shape& shape, const Part& part, bool by_largest, int first, int places, float* to, int num_threads) {
  Memory& mem = memory();
  const int width = part.segment->width;
  mem.received.resize(int64_t(shape.rows) * shape.groups * width);
  mass(shape, part, mem.lse.data(), mem.received.data(), num_threads);
  for (int row = 0; row < shape.rows; row++) {
    float* out = to + int64_t(row) * places + first;
    for (int g = 0; g < shape.groups; g++) {
      const float* from = mem.received.data() + (int64_t(row) * shape.groups + g) * width;
      for (int t = 0; t < width; t++) out[t] = g == 0 ? from[t] : by_largest ? std::max(out[t], from[t]) : out[t] + from[t];
    }
    for (int t = 0; t < width && !by_largest; t++) out[t] /= float(shape.groups);
  }
}

// The token in the run of a row goes to a place of its blocks.
void move(Turnover& t, int row, int place, Number number, float* score) {
  const Segment& run = run_of(t);
  const int from = places_in_blocks(t);
  const int64_t first = int64_t(row) * t.places;
  put(*blocks_of(t), row, place, number, place_in(run, run.k, row, 0), place_in(run, run.v, row, 0));
  *slot_at(t, row, place) = *slot_at(t, row, from);
  *slot_at(t, row, from) = -1;
  if (score) score[first + place] = score[first + from];
}

// The place of the lowest rank of a row, of equals the oldest; -1 where there is no token.
int least(const Turnover& t, int row, const float* rank, int64_t first_recent) {
  const int in_blocks = places_in_blocks(t), block = t.has_blocks ? blocks_of(t)->block : 1;
  int found = -1;
  int32_t slot_found = 0;
  float best = 0;
  for (int first = 0; first < t.places;) {
    const int end = first < in_blocks ? std::min(first + block, in_blocks) : t.places;
    const int32_t* slots = slot_at(t, row, first);
    const float* ranks = rank ? rank + int64_t(row) * t.places + first : nullptr;
    for (int i = 0; slots && i < end - first; i++) {
      if (slots[i] < 0) continue;
      float mine = ranks ? ranks[i] : float(slots[i]);
      if (slots[i] >= first_recent) mine = std::max(mine, std::numeric_limits<float>::max());  // below what the user has pinned
      if (found >= 0 && (mine > best || (mine == best && slots[i] > slot_found))) continue;
      found = first + i;
      slot_found = slots[i];
      best = mine;
    }
    first = end;
  }
  return found;
}

}  // namespace

void come(const DecoderLayer& layer, Turnover& t, const void* hidden, int count, const Positions& positions, const Shift& of_sinks,
          float scaling, float softcap, int place, int64_t slot, bool by_largest, float* score, float* mass, float* queries,
          float* attended, int num_threads) {
  Memory& mem = memory();
  Newest& next = mem.next;
  project(layer, hidden, count, positions, scaling, num_threads, next);
  const int rows = next.rows, groups = next.groups, d = layer.head_dim;
  if (queries) std::copy(next.q.begin(), next.q.end(), queries);

  const Segment& run = run_of(t);
  for (int row = 0; row < rows; row++) {
    put(run, row, place, layer.number, next.keys.data() + row * next.bytes, next.values.data() + row * next.bytes);
    *slot_at(t, row, places_in_blocks(t) + place) = int32_t(slot);
    if (score) score[int64_t(row) * t.places + places_in_blocks(t) + place] = 0;
  }

  std::vector<Part> parts;
  for (const Segment& segment : t.segments) parts.push_back({&segment, next.q.data(), nullptr, nullptr, nullptr});
  if (t.has_sinks && of_sinks.inv_freq) {
    shift_all(of_sinks, next.q.data(), int64_t(rows) * groups, d, mem.shifted);
    parts.front().q = mem.shifted.data();
  }
  const Shape shape = {rows, groups, 1, d, &slot, softcap};
  mem.lse.resize(int64_t(rows) * groups);
  attend(shape, parts, attended, mem.lse.data(), num_threads);
  if (!mass) return;
  if (t.has_blocks) gather_mass(shape, parts[parts.size() - 2], by_largest, 0, t.places, mass, num_threads);
  gather_mass(shape, parts.back(), by_largest, places_in_blocks(t), t.places, mass, num_threads);
}

void go(Turnover& t, Number number, const float* rank, const std::vector<int64_t>& first_recent, float* score) {
  const int rows = run_of(t).rows, in_blocks = places_in_blocks(t);
  for (int row = 0; row < rows; row++) {
    if (first_recent[row] < 0) continue;
    const int place = least(t, row, rank, first_recent[row]);
    if (place < 0) continue;
    if (t.moves && place < in_blocks && *slot_at(t, row, in_blocks) >= 0) {
      move(t, row, place, number, score);
    } else {
      *slot_at(t, row, place) = -1;
    }
  }
}

void settle(Turnover& t, Number number, float* score) {
  const int rows = run_of(t).rows, in_blocks = places_in_blocks(t);
  for (int row = 0; row < rows; row++) {
    if (*slot_at(t, row, in_blocks) < 0) continue;
    int place = 0;
    while (place < in_blocks && (!slot_at(t, row, place) || *slot_at(t, row, place) >= 0)) place++;
    if (place == in_blocks) throw std::logic_error("blocks without a free place");
    move(t, row, place, number, score);
  }
}

}  // namespace kvfold
