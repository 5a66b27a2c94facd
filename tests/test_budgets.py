"""Budgets hold to the token and the byte, whatever the method, the codec, the batch and the chunks; pins are always there."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import Oracle, chunked, compare, held_bytes, left_pad, sharp_model, tokens

import kvfold
from kvfold.budget import LayerSplit, split_over_layers
from kvfold.errors import PlanError
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan

# Policy and its other arguments: tokens of the budget come first.
POLICIES = {
    "window": "",
    "sink_window": None,  # its budget has another name
    "h2o": "",
    "tova": "",
    "snapkv": ", window=8",
    "l2norm": ", skip=0",
    "random": "",
    "scissorhands": ", window=20",
    "keydiff": "",
    "lagkv": ", lag=6",
    "expected": ", refresh_every=4, sink=2",
    "kvzip": ", sink=1, heads=uniform",
    "sieve": "",
}
STORES = ["dense", "int4", "int8(k_axis=token)", "protect(sink=2, window=5) | int4", "fp8"]


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


def _plan(policy: str, budget: int, layers: str, store: str) -> str:
    if policy == "sink_window":
        return f"sink_window(sink=3, window={budget - 3}) | {store}"
    return f"{policy}({budget}{POLICIES[policy]}, layers={layers}) | {store}"


@settings(max_examples=30)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    budget=st.integers(16, 90),
    layers=st.sampled_from(["uniform", "pyramid", "weights(1, 3)"]),
    store=st.sampled_from(STORES),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
)
def test_budgets_are_exact(policy: str, budget: int, layers: str, store: str, lengths: list[int], sizes: list[int]) -> None:
    plan = _plan(policy, budget, layers, store)
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in lengths])
    total = ids.shape[1]
    cuts = [c for c in itertools.accumulate(sizes) if c < total] + [total]
    start = 0
    for end in cuts:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
        with torch.no_grad():
            model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache)
        start = end
        assert cache.nbytes == held_bytes(cache, but=model)
        for row, seen in enumerate(n for n in mask[:, :end].sum(1).tolist() for _ in range(2)):
            held = [layer.kept_slots()[row] for layer in _layers(cache)]
            assert sum(map(len, held)) == len(held) * min(seen, budget)
            for layer, kept in zip(_layers(cache), held, strict=True):
                assert kept == sorted(set(kept))
                keep = layer.plan.keep
                assert keep is not None
                first = end - seen
                recent = min(keep.recent.tokens(max(0, len(kept) - layer.plan.sink)), seen)
                assert set(range(first, first + min(layer.plan.sink, seen))) <= set(kept)
                assert set(range(end - recent, end)) <= set(kept)


@given(
    even=st.integers(1, 400),
    least=st.integers(0, 40),
    most=st.integers(1, 600),
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    num_layers=st.integers(5, 12),
)
def test_a_split_over_layers_is_whole(even: int, least: int, most: int, weights: list[int], num_layers: int) -> None:
    split = LayerSplit.parse("weights", [str(w) for w in weights])
    counts = split_over_layers(even, least, most, split, num_layers)
    total = min(even, most)
    assert len(counts) == num_layers
    assert all(min(least, total) <= n <= most for n in counts)
    assert sum(counts) <= num_layers * total
    if all(split.over(num_layers)):
        assert sum(counts) == num_layers * total


def test_a_pyramid_is_as_in_its_paper() -> None:
    """PyramidKV's own arithmetic: the window aside, from 2 - 1/beta down to 1/beta of the even part."""
    counts = split_over_layers(1032, 32, 10**6, LayerSplit.parse("pyramid"), 30)
    assert counts[0] == 32 + 1950
    assert counts[-1] == 32 + 50
    steps = [a - b for a, b in itertools.pairwise(counts)]
    assert max(steps) - min(steps) <= 1
    assert sum(counts) == 30 * 1032


@pytest.mark.parametrize("store", ["dense", "int8", "int4(k_axis=token)"])
def test_a_pyramid_of_bytes_is_not_exceeded(store: str) -> None:
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, f"h2o(192KiB, layers=pyramid(4)) | {store}")
    for step in range(3):
        with torch.no_grad():
            model(tokens(1, 300, seed=step), past_key_values=cache)
        assert held_bytes(list(cache.layers), but=model) <= 192 * 1024
    lengths = [len(layer.kept_slots()[0]) for layer in _layers(cache)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


@settings(max_examples=12)
@given(
    store=st.sampled_from(["dense", "int8", "int4", "turboquant(3)"]),
    kibibytes=st.integers(140, 400),
    batch=st.integers(1, 2),
    policy=st.sampled_from(["h2o", "snapkv", "keydiff"]),
)
@example(store="dense", kibibytes=140, batch=1, policy="keydiff")  # a head gets a block before another one gives its own back
def test_bytes_that_heads_share_are_not_exceeded(store: str, kibibytes: int, batch: int, policy: str) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, f"{policy}({kibibytes}KiB, heads=ada) | {store}")
    for step in range(3):
        with torch.no_grad():
            model(tokens(batch, 200, seed=step), past_key_values=cache)
        assert held_bytes(list(cache.layers), but=model) <= kibibytes * 1024


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h2o(25%, layers=pyramids)", "write one of uniform, pyramid"),
        ("h2o(25%, layers=weights(0, 0))", "write one of uniform"),
        ("h2o(25%, layers=weights(a))", "its arguments are numbers"),
        ("h2o(25%, layers=pyramid(0.5))", "beta is 1"),
        ("l2norm(64MiB)", "write skip=0"),
        ("h2o(64MiB, layers=pyramid) | hybrid | int4", "which hybrid changes"),
        ("lagkv(25%, lag=0)", "no partition"),
        ("expected(25%, future=0)", "1 or more"),
        ("scissorhands(25%, window=0)", "remembers nothing"),
    ],
)
def test_what_cannot_work_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan.parse(text)


def test_more_weights_than_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="3 weights for 2 layers"):
        kvfold.cache(sharp_model(), "h2o(25%, layers=weights(3, 2, 1))")


# -- pins --------------------------------------------------------------------------------------------------------------------

PINNABLE = sorted(set(POLICIES) - {"window", "sink_window"})


@pytest.mark.parametrize("store", ["dense", "int4"])
@pytest.mark.parametrize("policy", PINNABLE)
def test_pinned_tokens_are_always_there(policy: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CPU", "off")  # kernels round queries, and this is about which tokens are there
    model = sharp_model()
    cache = kvfold.cache(model, f"{policy}(40{POLICIES[policy]}) | {store}", pin=[range(5, 15), 20, range(12, 18)])
    oracle = Oracle.of(model, cache)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (130, 90)])
    for mine, theirs in compare(model, cache, oracle, ids, mask, [60, 45, 1, 1, 23], decoded=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    for layer in _layers(cache):
        for row, kept in enumerate(layer.kept_slots()):
            first = 40 if row >= 2 else 0  # the second sequence is padded: positions count its own tokens
            assert {first + p for p in (*range(5, 18), 20)} <= set(kept)
            assert len(kept) == 40


def test_pins_beyond_a_share_outgrow_it() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(10%)", pin=[range(30)])
    chunked(model, cache, tokens(1, 100), None, [60, 40])
    assert all(kept[:30] == list(range(30)) and len(kept) == 31 for kept in _layers(cache)[0].kept_slots())


def test_pins_survive_a_file(tmp_path) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "random(40)", pin=[range(8, 20)])
    chunked(model, cache, tokens(1, 90), None, [90])
    cache.save(tmp_path / "cache")
    loaded = kvfold.load_cache(tmp_path / "cache", model)
    for held in (cache, loaded):
        with torch.no_grad():
            model(tokens(1, 50, seed=1), past_key_values=held)
        assert all(set(range(8, 20)) <= set(kept) for kept in _layers(held)[0].kept_slots())
    assert [layer.kept_slots() for layer in _layers(cache)] == [layer.kept_slots() for layer in _layers(loaded)]


@pytest.mark.parametrize(
    ("plan", "pin", "says"),
    [
        ("window(20)", [3], "shows each query its window only"),
        ("h2o(20)", [range(20)], "leave nothing of a budget of 20"),
        ("h2o(20)", [-1], "positions from 0 on"),
        ("h2o(20)", [range(0, 10, 2)], "ranges without a step"),
    ],
)
def test_pins_that_cannot_be_are_refused(plan: str, pin: list[int | range], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        kvfold.cache(sharp_model(), plan, pin=pin)
