// A block of K or V as numbers, with everything that its codec adds to its codes: for vectors so many that this is cheaper than to
// fold all of it for each, or lines that fill no registers.
#pragma once
#include "bands.h"
#include "repairs.h"

namespace kvfold {
namespace {

// Where a number of a tile is.
struct Tile {
  float* numbers;
  int64_t token, channel;  // steps
  float& at(int t, int c) const { return numbers[t * token + c * channel]; }
};

void restore_bands(const Bands& side, int64_t id, const uint8_t* codes, int block, const Tile& tile, const Workspace& w) {
  read_bands(side, id, w);
  for (int t = 0; t < block; t++) {
    for (int c = side.channels; c < w.head_dim; c++) tile.at(t, c) = 0;
  }
  for (int b = 0; b < side.count; b++) {
    const Band& band = side.bands[b];
    for (int l = 0; l < band.lines; l++) {
      const int c = band.first + l;
      const float scale = w.scale[c], zero = w.zero[c];
      convert(band.kind, codes + band.offset + l * band.line_bytes, block, band.levels, w.line);
      for (int t = 0; t < block; t++) tile.at(t, c) = w.line[t] * scale + zero;
    }
  }
  for (int64_t i = id * side.entries; i < (id + 1) * side.entries; i++) {
    tile.at(side.place[i] / w.head_dim, side.place[i] % w.head_dim) += half_at(side.value + i);
  }
}

void repair(const Repairs& a, int64_t id, int count, int block, const Tile& tile, const Workspace& w) {
  const int d = w.head_dim;
  const uint16_t *basis = a.basis + id * d * a.rank, *z = a.z + id * block * a.rank;
  for (int r = 0; r < a.rank; r++) {
    const bool by_token = tile.channel == 1;  // what lies together
    const int lines = by_token ? count : d, columns = by_token ? d : block;
    read_column(by_token ? basis : z, columns, a.rank, r, w.line);
    for (int l = 0; l < lines; l++) {
      const float factor = half_at((by_token ? z : basis) + int64_t(l) * a.rank + r);
      float* line = tile.numbers + l * (by_token ? tile.token : tile.channel);
      for (int i = 0; i < columns; i += W) store(line + i, load(line + i) + load(w.line + i) * factor);
    }
  }
  const int lines = a.by_channel ? d : count, lines_each = a.by_channel ? d : block;
  for (int l = 0; a.outliers && l < lines; l++) {
    for (int i = 0; i < a.outliers; i++) {
      const int64_t from = (id * lines_each + l) * a.outliers + i;
      const int place = place_at(a, from);
      tile.at(a.by_channel ? place : l, a.by_channel ? l : place) += half_at(a.value + from);
    }
  }
}

// Into scratch: [T, D] with the lines of a product for V (`lines_are_tokens`), [D, T] for K. Channels of K may have numbers in
// places after the last token, which nobody sees.
void restore(const Side& side, int64_t id, const uint8_t* codes, int count, int head_dim, int block, bool lines_are_tokens,
             const Workspace& w) {
  const Tile tile = {w.scratch, lines_are_tokens ? w.ld_d : 1, lines_are_tokens ? 1 : w.ld_t};
  if (side.bands.used) {
    restore_bands(side.bands, id, codes, block, tile, w);
    return;
  }
  const int lines = side.by_channel ? head_dim : block;
  const bool has_zero = side.scale_kind != ScaleKind::NONE &&
                        read_scales(side, id, lines, side.by_channel ? w.ld_d : w.ld_t, w.scale, w.zero);
  restore_block(side, codes, read_levels(side, id, w), count, head_dim, block, lines_are_tokens, has_zero, w);
  repair(side.repairs, id, count, block, tile, w);
}

}  // namespace
}  // namespace kvfold
