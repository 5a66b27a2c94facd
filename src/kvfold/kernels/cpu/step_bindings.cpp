// What Python sees of the decoder layer. Pointers come as integers; kvfold/kernels/cpu/step.py has checked what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "schedule.h"

namespace nb = nanobind;

namespace {

using namespace kvfold;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Weight weight(int form, uintptr_t data, int rows, int columns, uintptr_t bias) {
  return {Form(form), pointer<const uint8_t>(data), rows, columns, pointer<const float>(bias)};
}

Norm norm(uintptr_t weight, float eps) { return {pointer<const float>(weight), eps}; }

// `weights`: q, k, v, o, gate, up, down. `norms`: before attention, of queries, of keys, after attention, before the MLP, after it.
DecoderLayer decoder_layer(int number, int activation, int num_query_heads, int num_kv_heads, int head_dim, nb::list weights,
                           nb::list norms) {
  if (weights.size() != 7 || norms.size() != 6) throw nb::value_error("seven weights and six norms");
  DecoderLayer layer = {};
  layer.number = Number(number);
  layer.activation = Activation(activation);
  layer.num_query_heads = num_query_heads;
  layer.num_kv_heads = num_kv_heads;
  layer.head_dim = head_dim;
  Weight* each[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
  for (size_t i = 0; i < 7; i++) *each[i] = nb::cast<const Weight&>(weights[i]);
  Norm* every[] = {&layer.before_attention, &layer.q_norm,     &layer.k_norm,
                   &layer.after_attention,  &layer.before_mlp, &layer.after_mlp};
  for (size_t i = 0; i < 6; i++) *every[i] = nb::cast<const Norm&>(norms[i]);
  layer.hidden = layer.o.rows;
  layer.inner = layer.gate.rows;
  return layer;
}

// `given` has (segment, starts, lengths) of each segment; the last one grows, or with `apart` the one before: see schedule.h. Slots of
// the last one follow from start and length.
Tail tail(nb::list given, bool apart) {
  Tail result;
  result.apart = apart;
  for (nb::handle one : given) {
    nb::tuple fields = nb::cast<nb::tuple>(one);
    result.segments.push_back(nb::cast<const Segment&>(fields[0]));
    result.starts.push_back(nb::cast<std::vector<int64_t>>(fields[1]));
    result.lengths.push_back(nb::cast<std::vector<int64_t>>(fields[2]));
  }
  if (result.segments.size() < (apart ? 2u : 1u)) throw nb::value_error("a tail has a segment, or two");
  Segment& last = result.segments.back();
  for (size_t i = result.segments.size() - (apart ? 2 : 1); i < result.segments.size(); i++) {
    if (result.starts[i].size() != size_t(last.rows) || result.lengths[i].size() != size_t(last.rows)) {
      throw nb::value_error("a start and a length for every row");
    }
  }
  last.slots = nullptr;
  return result;
}

// `given`: sinks, if `has_sinks`, blocks, if `has_blocks`, and a run; all with slots.
Turnover turnover(nb::list given, bool has_sinks, bool has_blocks, bool moves, int places) {
  Turnover result = {{}, has_sinks, has_blocks, moves, places};
  for (nb::handle one : given) result.segments.push_back(nb::cast<const Segment&>(one));
  if (result.segments.size() != 1u + has_sinks + has_blocks) throw nb::value_error("sinks, blocks and a run");
  int found = result.segments.back().width;
  if (has_blocks) found += result.segments[result.segments.size() - 2].width;
  for (const Segment& s : result.segments) {
    if (!s.slots || s.rows != result.segments.back().rows) throw nb::value_error("segments with slots, of the same rows");
  }
  if (found != places || (moves && (!has_blocks || result.segments.back().width != 1))) throw nb::value_error("other places");
  return result;
}

int64_t capacity(const Segment& s) { return s.table ? int64_t(s.columns) * s.block : s.width; }

void check(int count) {
  if (count < 1 || count > kMostVectors) throw nb::value_error("a step takes 1 to 8 tokens");
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<Weight>(m, "Weight");
  nb::class_<Norm>(m, "Norm");
  nb::class_<DecoderLayer>(m, "DecoderLayer");
  nb::class_<Tail>(m, "Tail");
  m.def("tail", &tail);
  m.def("step", [](const DecoderLayer& layer, Tail& tail, uintptr_t hidden, int count, int number, uintptr_t cos, uintptr_t sin, int size,
                   bool same, float scaling, float softcap, uintptr_t out, int num_threads) {
    check(count);
    const size_t home = tail.segments.size() - (tail.apart ? 2 : 1);
    const Segment& last = tail.segments[home];
    if (last.rows != count * layer.num_kv_heads || last.head_dim != layer.head_dim) throw nb::value_error("a tail of other rows");
    for (int64_t length : tail.lengths[home]) {
      if (length >= capacity(last)) throw nb::value_error("a tail without room");
    }
    nb::gil_scoped_release release;
    const Positions positions = {Number(number), pointer<void>(cos), pointer<void>(sin), size, same};
    step(layer, tail, pointer<void>(hidden), count, positions, scaling, softcap, pointer<void>(out), num_threads);
  });
  nb::class_<Turnover>(m, "Turnover");
  m.def("turnover", &turnover);
  m.def("come", [](const DecoderLayer& layer, Turnover& t, uintptr_t hidden, int count, int number, uintptr_t cos, uintptr_t sin,
                   int size, bool same, uintptr_t inv_freq, int half, int64_t shift, float scaling, float softcap, int place, int64_t slot,
                   bool by_largest, uintptr_t score, uintptr_t mass, uintptr_t queries, uintptr_t attended, int num_threads) {
    check(count);
    const Segment& run = t.segments.back();
    if (run.rows != count * layer.num_kv_heads || run.head_dim != layer.head_dim) throw nb::value_error("a turnover of other rows");
    if (place < 0 || place >= run.width) throw nb::value_error("a run without room");
    nb::gil_scoped_release release;
    const Positions positions = {Number(number), pointer<void>(cos), pointer<void>(sin), size, same};
    come(layer, t, pointer<void>(hidden), count, positions, {pointer<float>(inv_freq), half, shift}, scaling, softcap, place, slot,
         by_largest, pointer<float>(score), pointer<float>(mass), pointer<float>(queries), pointer<float>(attended), num_threads);
  });
  m.def("go", [](Turnover& t, int number, uintptr_t rank, const std::vector<int64_t>& first_recent, uintptr_t score) {
    if (first_recent.size() != size_t(t.segments.back().rows)) throw nb::value_error("a first recent slot for every row");
    go(t, Number(number), pointer<float>(rank), first_recent, pointer<float>(score));
  });
  m.def("settle", [](Turnover& t, int number, uintptr_t score) { settle(t, Number(number), pointer<float>(score)); });
  m.attr("most_vectors") = kMostVectors;
  m.def("weight", &weight);
  m.def("norm", &norm);
  m.def("decoder_layer", &decoder_layer);
  m.def("linear", [](const Weight& w, int number, uintptr_t x, int count, uintptr_t y, int num_threads) {
    check(count);
    nb::gil_scoped_release release;
    linear(w, Number(number), pointer<void>(x), count, pointer<void>(y), num_threads);
  });
  m.def("unpack", [](const Weight& w, int number, uintptr_t to, int num_threads) {
    nb::gil_scoped_release release;
    unpack(w, Number(number), pointer<void>(to), num_threads);
  });
  m.def("before_attention", [](const DecoderLayer& layer, uintptr_t hidden, int count, int number, uintptr_t cos, uintptr_t sin,
                               int size, bool same, uintptr_t q, uintptr_t keys, uintptr_t values, int num_threads) {
    check(count);
    nb::gil_scoped_release release;
    const Positions positions = {Number(number), pointer<void>(cos), pointer<void>(sin), size, same};
    before_attention(layer, pointer<void>(hidden), count, positions, pointer<float>(q), pointer<void>(keys),
                     pointer<void>(values), num_threads);
  });
  m.def("normalize_tokens", [](const Norm& norm, int number, uintptr_t x, int64_t count, int size, uintptr_t y, int num_threads) {
    nb::gil_scoped_release release;
    normalize_tokens(norm, Number(number), pointer<void>(x), count, size, pointer<void>(y), num_threads);
  });
  m.def("place_heads", [](const Norm& norm, int heads, int head_dim, int number, uintptr_t x, int batch, int length,
                          int number_of_positions, uintptr_t cos, uintptr_t sin, int size, uintptr_t y, int num_threads) {
    nb::gil_scoped_release release;
    const Positions positions = {Number(number_of_positions), pointer<void>(cos), pointer<void>(sin), size, false};
    const Heads of = {heads, head_dim, norm};
    place_heads(of, Number(number), pointer<void>(x), batch, length, size ? &positions : nullptr, pointer<void>(y), num_threads);
  });
  m.def("add_tokens", [](const Norm& of_x, const Norm& of_sum, int number, uintptr_t hidden, uintptr_t x, int64_t count, int size,
                         uintptr_t sum, uintptr_t normed, int num_threads) {
    nb::gil_scoped_release release;
    add_tokens(of_x, of_sum, Number(number), pointer<void>(hidden), pointer<void>(x), count, size, pointer<void>(sum),
               pointer<void>(normed), num_threads);
  });
  m.def("gate_tokens", [](int activation, int number, uintptr_t gate, uintptr_t up, int64_t count, int size, int num_threads) {
    nb::gil_scoped_release release;
    gate_tokens(Activation(activation), Number(number), pointer<void>(gate), pointer<void>(up), count, size, num_threads);
  });
  m.def("after_attention", [](const DecoderLayer& layer, uintptr_t hidden, uintptr_t attended, int count, uintptr_t out,
                              int num_threads) {
    check(count);
    nb::gil_scoped_release release;
    after_attention(layer, pointer<void>(hidden), pointer<float>(attended), count, pointer<void>(out), num_threads);
  });
}
