// What Python sees. Pointers come as integers; kvfold/kernels/cpu/__init__.py has checked what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using kvfold::Kind;
using kvfold::Bands;
using kvfold::Part;
using kvfold::Repairs;
using kvfold::ScaleKind;
using kvfold::Segment;
using kvfold::Side;

template <typename T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

Side side(int kind, bool by_channel, int scale_kind, uintptr_t codes, int64_t block_bytes, int64_t row_bytes, int64_t line_bytes,
          uintptr_t scale, uintptr_t zero, uintptr_t base, int groups, float middle, uintptr_t rotation,
          const std::vector<float>& levels) {
  Side side = {Kind(kind), by_channel, ScaleKind(scale_kind), pointer<uint8_t>(codes), block_bytes, row_bytes, line_bytes,
               pointer<uint8_t>(scale), pointer<uint16_t>(zero), pointer<uint16_t>(base), groups, middle, pointer<float>(rotation), {}, nullptr, {}, {}};
  if (levels.size() > size_t(kvfold::kLevels)) throw nb::value_error("a table of more levels than the kernels take");
  for (int i = 0; i < kvfold::kLevels && !levels.empty(); i++) side.levels[i] = levels[i % levels.size()];
  return side;
}

void set_block_levels(Side& side, uintptr_t levels) { side.block_levels = pointer<uint16_t>(levels); }

void set_low_rank(Side& side, int rank, uintptr_t basis, uintptr_t z) {
  side.repairs.rank = rank;
  side.repairs.basis = pointer<uint16_t>(basis);
  side.repairs.z = pointer<uint16_t>(z);
}

void set_outliers(Side& side, int outliers, bool by_channel, uintptr_t value, uintptr_t place, int place_bytes) {
  Repairs& repairs = side.repairs;
  repairs.outliers = outliers;
  repairs.by_channel = by_channel;
  repairs.value = pointer<uint16_t>(value);
  repairs.place = pointer<uint8_t>(place);
  repairs.place_bytes = place_bytes;
}

// `bands` are (kind, lines, bytes a line, levels).
Side banded_side(const std::vector<std::tuple<int, int, int, uintptr_t>>& bands, uintptr_t codes, int64_t block_bytes, uintptr_t scale,
                 uintptr_t zero, bool exact_zeros, int entries, uintptr_t value, uintptr_t place, uintptr_t rotation) {
  if (bands.size() > size_t(kvfold::kBands)) throw nb::value_error("more bands than the kernels take");
  Side side = {Kind::T4, true, ScaleKind::NONE, pointer<uint8_t>(codes), block_bytes, 0, 0, nullptr, nullptr, nullptr,
               1, 0.0f, pointer<float>(rotation), {}, nullptr, {}, {}};
  Bands& all = side.bands;
  all.used = true;
  int64_t offset = 0;
  for (const auto& [kind, lines, line_bytes, levels] : bands) {
    all.bands[all.count++] = {Kind(kind), all.channels, lines, offset, line_bytes, pointer<float>(levels)};
    all.channels += lines;
    offset += int64_t(lines) * line_bytes;
  }
  all.scale = pointer<uint8_t>(scale);
  all.zero_steps = exact_zeros ? nullptr : pointer<int8_t>(zero);
  all.zero = exact_zeros ? pointer<uint16_t>(zero) : nullptr;
  all.entries = entries;
  all.value = pointer<uint16_t>(value);
  all.place = pointer<int16_t>(place);
  return side;
}

Segment segment(const Side& k, const Side& v, int rows, int columns, int block, int head_dim, int width, uintptr_t table,
                uintptr_t slots, bool causal) {
  return {k, v, rows, columns, block, head_dim, width, pointer<int64_t>(table), pointer<int32_t>(slots), causal};
}

// A part and the numbers that it points to.
struct Look {
  Part part;
  std::vector<int64_t> starts, lengths;
};


// `given` is (segment, q, first_visible, starts, lengths).
Look look(nb::handle given) {
  nb::tuple fields = nb::cast<nb::tuple>(given);
  Look result;
  result.part.segment = nb::cast<const Segment*>(fields[0]);
  result.part.q = pointer<float>(nb::cast<uintptr_t>(fields[1]));
  result.part.first_visible = pointer<int64_t>(nb::cast<uintptr_t>(fields[2]));
  result.starts = nb::cast<std::vector<int64_t>>(fields[3]);
  result.lengths = nb::cast<std::vector<int64_t>>(fields[4]);
  const Segment& segment = *result.part.segment;
  const size_t rows = segment.table && !segment.slots ? size_t(segment.rows) : 0;
  if (result.starts.size() != rows || result.lengths.size() != rows) throw nb::value_error("a start and a length for every row");
  return result;
}

void attend(nb::list given, int rows, int groups, int queries, int head_dim, uintptr_t query_slots, float softcap, bool in_bf16,
            uintptr_t out, uintptr_t lse, int num_threads) {
  std::vector<Look> looks;
  for (nb::handle one : given) looks.push_back(look(one));
  std::vector<Part> parts;
  for (Look& one : looks) {
    if (one.part.segment->rows != rows || one.part.segment->head_dim != head_dim) throw nb::value_error("segments of other rows");
    one.part.starts = one.starts.data();
    one.part.lengths = one.lengths.data();
    parts.push_back(one.part);
  }
  nb::gil_scoped_release release;
  kvfold::attend({rows, groups, queries, head_dim, pointer<int64_t>(query_slots), softcap, in_bf16}, parts,
                 reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse), num_threads);
}

void mass(nb::handle given, int rows, int groups, int queries, int head_dim, uintptr_t query_slots, float softcap, uintptr_t lse,
          uintptr_t received, int width, int num_threads) {
  Look one = look(given);
  if (one.part.segment->width != width) throw nb::value_error("a segment of another width");
  one.part.starts = one.starts.data();
  one.part.lengths = one.lengths.data();
  if (one.part.segment->rows != rows || one.part.segment->head_dim != head_dim) throw nb::value_error("a segment of other rows");
  nb::gil_scoped_release release;
  kvfold::mass({rows, groups, queries, head_dim, pointer<int64_t>(query_slots), softcap}, one.part, pointer<float>(lse),
               reinterpret_cast<float*>(received), num_threads);
}

void encode(int kind, int input, bool by_channel, bool symmetric, int scale_kind, int group, uintptr_t grid, uintptr_t bounds,
            uintptr_t x, int64_t blocks, int tokens, int head_dim, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t base,
            int num_threads) {
  const kvfold::Encoding encoding = {Kind(kind),        Kind(input), by_channel,           symmetric,
                                     ScaleKind(scale_kind), group,   pointer<float>(grid), pointer<float>(bounds)};
  const kvfold::Encoded to = {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<uint8_t*>(scale),
                              reinterpret_cast<uint16_t*>(zero), reinterpret_cast<uint16_t*>(base)};
  nb::gil_scoped_release release;
  kvfold::encode(encoding, pointer<uint8_t>(x), blocks, tokens, head_dim, to, num_threads);
}

void name_levels(int kind, bool by_channel, int group, const std::vector<float>& middles, uintptr_t x, int64_t blocks, int tokens,
                 int head_dim, uintptr_t scale, uintptr_t zero, uintptr_t codes, int num_threads) {
  kvfold::Naming naming = {Kind(kind), by_channel, group, pointer<float>(scale), pointer<float>(zero), {}};
  if (middles.empty() || middles.size() >= size_t(kvfold::kLevels)) throw nb::value_error("middles of 4, 8 or 16 levels");
  for (int i = 0; i < kvfold::kLevels; i++) naming.middles[i] = middles[std::min(size_t(i) % (middles.size() + 1), middles.size() - 1)];
  nb::gil_scoped_release release;
  kvfold::name_levels(naming, pointer<float>(x), blocks, tokens, head_dim, reinterpret_cast<uint8_t*>(codes), num_threads);
}

}  // namespace

void bind_step(nb::module_& m);  // step_bindings.cpp

NB_MODULE(_native, m) {
  bind_step(m);
  nb::class_<Side>(m, "Side")
      .def("set_block_levels", &set_block_levels)
      .def("set_low_rank", &set_low_rank)
      .def("set_outliers", &set_outliers);
  nb::class_<Segment>(m, "Segment");
  m.def("side", &side, "kind"_a, "by_channel"_a, "scale_kind"_a, "codes"_a, "block_bytes"_a, "row_bytes"_a, "line_bytes"_a, "scale"_a,
        "zero"_a, "base"_a, "groups"_a, "middle"_a, "rotation"_a, "levels"_a = std::vector<float>());
  m.def("banded_side", &banded_side);
  m.def("segment", &segment);
  m.def("attend", &attend);
  m.def("mass", &mass);
  m.def("encode", &encode);
  m.def("name_levels", &name_levels);
  m.def("available", &kvfold::available);
  m.def("choose", &kvfold::choose);
  m.def("chosen", [] { return std::string(kvfold::kernels().name); });
}
