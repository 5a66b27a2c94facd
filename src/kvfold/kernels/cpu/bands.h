// Attention over channels that differ in the bits of their codes: a product for each band (kvfold/store/bands.py).
#pragma once
#include "folding.h"

namespace kvfold {
namespace {

// Scales and zeros of a block's channels, 0 for those without codes.
void read_bands(const Bands& side, int64_t id, const Workspace& w) {
  const int64_t first = id * side.channels;
  for (int c = 0; c < w.ld_d; c += W) {
    const int count = side.channels - c < W ? side.channels - c : W;
    uint8_t scales[W] = {};
    int8_t steps[W] = {};
    uint16_t zeros[W] = {};
    if (count > 0) {
      memcpy(scales, side.scale + first + c, count);
      if (side.zero_steps) memcpy(steps, side.zero_steps + first + c, count);
      if (side.zero) memcpy(zeros, side.zero + first + c, count * sizeof(uint16_t));
    }
    const vf scale = exp2((to_float(load_bytes(scales)) - 128.0f) * 0.125f);
    vf zero = load_half(reinterpret_cast<const uint8_t*>(zeros));
    if (side.zero_steps) {
      vu codes = load_bytes(reinterpret_cast<const uint8_t*>(steps));
      zero = __builtin_convertvector(bits<vi>(codes << 24) >> 24, vf) * scale * 0.0625f;
    }
    store(w.scale + c, scale);
    store(w.zero + c, zero);
    for (int i = count < 0 ? 0 : count; i < W; i++) w.scale[c + i] = w.zero[c + i] = 0;
  }
}

Matrix lines_of(const Band& band, const uint8_t* codes, int block, int64_t ahead) {
  return {codes + band.offset, band.line_bytes, band.lines, block, 1, ahead, band.levels};
}

// scores [vectors, T] = q · k_t, for up to kDirectVectors.
void score_bands(const Side& k, const uint8_t* codes, int64_t id, int64_t ahead, int block, int vectors, const Workspace& w) {
  const Bands& side = k.bands;
  read_bands(side, id, w);
  fold(k, w.q, vectors, w.ld_d, w.ld_d, w, true, w.folded);
  for (int m = 0; m < vectors; m++) {
    for (int t = 0; t < w.ld_t; t += W) store(w.scores + int64_t(m) * w.ld_t + t, all(w.sums[m]));
  }
  for (int b = 0; b < side.count; b++) {
    const Band& band = side.bands[b];
    const Matrix lines = lines_of(band, codes, block, ahead * k.block_bytes);
    across(band.kind, lines, band.lines, w.folded + band.first, vectors, w.ld_d, 0, w.scores, w.ld_t);
  }
}

// out [vectors, D] += Σ_t p_t v_t, for as many.
void combine_bands(const Side& v, const uint8_t* codes, int64_t id, int64_t ahead, int block, int vectors, float* out,
                   const Workspace& w) {
  const Bands& side = v.bands;
  read_bands(side, id, w);
  for (int b = 0; b < side.count; b++) {
    const Band& band = side.bands[b];
    const Matrix lines = lines_of(band, codes, block, ahead * v.block_bytes);
    along(band.kind, lines, w.scores, vectors, w.ld_t, w.scale + band.first, 0, w.folded, w.ld_d, false);
    for (int m = 0; m < vectors; m++) {  // a product ends with a whole vector, a band need not
      float *to = out + int64_t(m) * w.ld_d + band.first, *from = w.folded + int64_t(m) * w.ld_d;
      for (int i = 0; i < band.lines; i++) to[i] += from[i];
    }
  }
  for (int m = 0; m < vectors; m++) {
    float* to = out + int64_t(m) * w.ld_d;
    const vf total = all(sum_of(w.scores + int64_t(m) * w.ld_t, block));
    for (int i = 0; i < w.ld_d; i += W) store(to + i, load(to + i) + load(w.zero + i) * total);
  }
}

// Of K: from queries to scores; of V: from probabilities to the output.
void mend_entries(const Bands& side, int64_t id, int head_dim, bool of_keys, int vectors, const float* from, int ld_from, float* to,
                  int ld_to) {
  for (int64_t i = id * side.entries; i < (id + 1) * side.entries; i++) {
    const int token = side.place[i] / head_dim, channel = side.place[i] % head_dim;
    const float value = half_at(side.value + i);
    for (int m = 0; m < vectors; m++) {
      to[int64_t(m) * ld_to + (of_keys ? token : channel)] += from[int64_t(m) * ld_from + (of_keys ? channel : token)] * value;
    }
  }
}

}  // namespace
}  // namespace kvfold
