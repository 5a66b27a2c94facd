"""One token comes and one goes, compiled, against the layer's general path; and when the latter has to be taken.

Both add up attention in another order. One layer, whose keys don't depend on attention, keeps that from growing until a policy
chooses otherwise between two tokens that are nearly equal.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import chunked, left_pad, sharp_model, tokens
from transformers import PreTrainedModel

import kvfold
from kvfold.held_layer import HeldLayer
from kvfold.kernels import cpu
from kvfold.layer_cache import LayerCache
from kvfold.turnover import Turnover

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")

POLICIES = [
    *("h2o(40)", "h2o(30%, recent=25%, sink=3, group=max)", "tova(40)", "snapkv(40, window=8)", "sieve(40)"),
    *("scissorhands(40, window=9)", "keydiff(40)", "random(40)", "l2norm(40, skip=0)", "lagkv(40, lag=9)", "expected(40)"),
    *("kvzip(40, heads=uniform)", "window(40)", "window(30%)", "sink_window(sink=3, window=30)"),
    "sink_window(sink=3, window=30%, reindex=false)",
]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the tokens that a turnover takes, layer by layer."""
    taken = [0]
    step = Turnover.step

    def counted(self: Turnover, *args: object) -> torch.Tensor:
        taken[0] += 1
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Turnover, "step", counted)
    return taken


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    layers = list(cache.layers)
    assert all(isinstance(layer, LayerCache) for layer in layers)
    return layers  # type: ignore[return-value]


def _streamed(model: PreTrainedModel, cache: kvfold.KVCache, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], 1)


def _general(plan: str, ids: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, kvfold.KVCache]:
    """The same without turnovers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLayer, "turnover", lambda self, padding: None)
        model = sharp_model(num_hidden_layers=1)
        cache = kvfold.cache(model, plan)
        return _streamed(model, cache, ids, sizes), cache


def _same(mine: kvfold.KVCache, theirs: kvfold.KVCache) -> None:
    """The same tokens, at the same places, with the same scores, in as many bytes."""
    for a, b in zip(_layers(mine), _layers(theirs), strict=True):
        assert a.kept_slots() == b.kept_slots()
        assert torch.equal(a.body.slots(), b.body.slots())
        assert torch.equal(a.recent.slots, b.recent.slots)
        if a.plan.scored:
            torch.testing.assert_close(a.body.score(), b.body.score(), atol=1e-4, rtol=1e-3)
        assert a.num_real == b.num_real
    assert mine.nbytes == theirs.nbytes


SIZES = [60, *[1] * 150, 7, *[1] * 43]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turnover_is_what_the_general_path_does(policy: str, steps: list[int]) -> None:
    """Two sequences; a prompt, many single tokens, a chunk, and more single tokens."""
    ids = tokens(2, sum(SIZES))
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=1), policy)
    mine = _streamed(model, cache, ids, SIZES)
    assert steps[0] > 150, "hardly any token was taken"
    theirs, other = _general(policy, ids, SIZES)
    torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
    _same(cache, other)


@pytest.mark.parametrize("store", ["fp8", "fp8(e5m2, scale=false)", "int8", "kivi(int4, residual=16)", "gear(int4)"])
@pytest.mark.parametrize("policy", ["h2o(100)", "window(50%)", "random(40, recent=0)", "sieve(100)"])
def test_with_codes(policy: str, store: str, steps: list[int]) -> None:
    """Sums in another order move a code here and there: the choice stays, and the logits nearly."""
    ids = tokens(1, sum(SIZES))
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=1), f"{policy} | {store}")
    mine = _streamed(model, cache, ids, SIZES)
    assert steps[0] > 100, "hardly any token was taken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLayer, "turnover", lambda self, padding: None)
        other = kvfold.cache(model, f"{policy} | {store}")
        theirs = _streamed(model, other, ids, SIZES)
    assert (mine - theirs).norm() <= 2e-3 * theirs.norm()
    for a, b in zip(_layers(cache), _layers(other), strict=True):
        assert a.kept_slots() == b.kept_slots()
    assert cache.nbytes == other.nbytes


@settings(max_examples=25)
@given(
    st.sampled_from(
        ["h2o(20)", "tova(30%)", "snapkv(24, window=5)", "window(9)", "sink_window(sink=2, window=30%)", "l2norm(70, skip=0)"]
    ),
    st.lists(st.sampled_from([1, 1, 1, 1, 1, 2, 5, 30]), min_size=3, max_size=70),
    st.integers(1, 3),
)
def test_any_order_of_chunks(policy: str, sizes: list[int], batch: int) -> None:
    ids = tokens(batch, sum(sizes))
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=1), policy)
    mine = _streamed(model, cache, ids, sizes)
    theirs, other = _general(policy, ids, sizes)
    torch.testing.assert_close(mine, theirs, atol=2e-4 * float(theirs.abs().max()), rtol=1e-4)
    _same(cache, other)


@pytest.mark.parametrize("instructions", cpu.available())
def test_every_instruction_set(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, instructions)
    ids = tokens(2, 140)
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=1), "h2o(40)")
    mine = _streamed(model, cache, ids, [60, *[1] * 80])
    theirs, other = _general("h2o(40)", ids, [60, *[1] * 80])
    torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
    _same(cache, other)


def test_budgets_that_layers_share(steps: list[int]) -> None:
    """A layer's part may stay, grow, or shrink when a token comes."""
    ids = tokens(1, sum(SIZES))
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=4), "window(60%, layers=pyramid)")
    _streamed(model, cache, ids, SIZES)
    assert steps[0] > 150
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLayer, "turnover", lambda self, padding: None)
        other = kvfold.cache(model, "window(60%, layers=pyramid)")
        _streamed(model, other, ids, SIZES)
    for a, b in zip(_layers(cache), _layers(other), strict=True):
        assert a.kept_slots() == b.kept_slots()


def test_what_the_user_has_pinned_stays(steps: list[int]) -> None:
    ids = tokens(1, 160)
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(30)", pin=[range(10, 20)])
    _streamed(model, cache, ids, [60, *[1] * 100])
    assert steps[0] > 100
    for layer in _layers(cache):
        assert all(set(range(10, 20)) <= set(row) and len(row) == 30 for row in layer.kept_slots())


# -- whoever looks at the layer closes it ------------------------------------------------------------------------------------


def test_it_is_closed_before_anyone_looks(steps: list[int], tmp_path: Path) -> None:
    """Sizes, slots, saving, beams and a smaller batch between single tokens change nothing."""
    ids = tokens(2, 120)
    model = sharp_model(num_hidden_layers=1)
    looked, other = (kvfold.cache(model, "h2o(40)") for _ in range(2))
    for cache in (looked, other):
        _streamed(model, cache, ids[:, :60], [60])
    for i in range(60, 100):
        mine = _streamed(model, looked, ids[:, i : i + 1], [1])
        torch.testing.assert_close(mine, _streamed(model, other, ids[:, i : i + 1], [1]), atol=1e-4, rtol=1e-4)
        if i % 9 == 0:
            assert looked.nbytes > 0
            assert all(len(row) == 40 for layer in _layers(looked) for row in layer.kept_slots())
            looked.reorder_cache(torch.tensor([0, 1]))
        if i == 80:
            looked.save(tmp_path / "cache.safetensors")
            looked = kvfold.load_cache(tmp_path / "cache.safetensors", model)
    looked.batch_select_indices(torch.tensor([1]))
    mine = _streamed(model, looked, ids[1:, 100:], [1] * 20)
    torch.testing.assert_close(mine, _streamed(model, other, ids[:, 100:], [1] * 20)[1:], atol=1e-4, rtol=1e-4)
    assert steps[0] >= 50


@pytest.mark.parametrize("plan", ["h2o(40)", "h2o(100) | int8"])
def test_it_outlives_inference_mode(plan: str, steps: list[int]) -> None:
    ids = tokens(1, 140)
    model = sharp_model(num_hidden_layers=1)
    cache, other = kvfold.cache(model, plan), kvfold.cache(model, plan)
    with torch.inference_mode():
        first = torch.cat([model(part, past_key_values=cache).logits for part in ids[:, :100].split([60, *[1] * 40], 1)], 1)
    mine = torch.cat([first, _streamed(model, cache, ids[:, 100:], [1] * 40)], 1)
    theirs = _streamed(model, other, ids, [60, *[1] * 80])
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert steps[0] > 100


@pytest.mark.parametrize(
    "plan", ["h2o(40, heads=ada)", "h2o(40) | tier(device=32, host)", "h2o(100) | int8(k_axis=token)", "quest(50%)", "int4"]
)
def test_what_it_does_not_know_goes_the_long_way(plan: str, steps: list[int]) -> None:
    _streamed(model := sharp_model(), kvfold.cache(model, plan), tokens(1, 80), [60, *[1] * 20])
    assert steps[0] == 0


PADDED = [
    *("h2o(40)", "h2o(30%, recent=25%, sink=3, group=max)", "tova(30%)", "snapkv(25%, window=8)", "keydiff(30%)"),
    *("scissorhands(40, window=9)", "random(30%)", "l2norm(40, skip=0)", "window(30%)", "expected(30%)"),
    *("sink_window(sink=3, window=30%, reindex=false)", "h2o(30%) | fp8", "window(70) | int8", "snapkv(30%) | kivi(int4)"),
]


@pytest.mark.parametrize("plan", PADDED)
def test_padded_batches(plan: str, steps: list[int]) -> None:
    """Rows have budgets of their own, and lose a token each in its own time; a chunk in between."""
    ids, mask = left_pad([tokens(1, n + 130, seed=n)[0] for n in (60, 21, 47)])
    sizes = [60, *[1] * 90, 5, *[1] * 35]
    cache = kvfold.cache(model := sharp_model(num_hidden_layers=1), plan)
    mine = chunked(model, cache, ids, mask, sizes)
    assert steps[0] > 80, "hardly any token was taken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLayer, "turnover", lambda self, padding: None)
        model = sharp_model(num_hidden_layers=1)
        other = kvfold.cache(model, plan)
        theirs = chunked(model, other, ids, mask, sizes)
    assert (mine - theirs)[mask.bool()].norm() <= 2e-3 * theirs[mask.bool()].norm()
    for a, b in zip(_layers(cache), _layers(other), strict=True):
        assert a.kept_slots() == b.kept_slots()
        assert a.num_real == b.num_real
    assert cache.nbytes == other.nbytes


@pytest.mark.parametrize("plan", ["sieve(40)", "sink_window(sink=3, window=40)"])
def test_where_padding_goes_the_long_way(plan: str, steps: list[int]) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (70, 50)])
    model = sharp_model()
    chunked(model, kvfold.cache(model, plan), ids, mask, [60, *[1] * 10])
    assert steps[0] == 0


def test_padding_between_turns_goes_the_long_way(steps: list[int]) -> None:
    """Positions are then not slots less a number."""
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (70, 50)])
    mask[1, 40:44] = 0
    model = sharp_model()
    chunked(model, kvfold.cache(model, "h2o(40)"), ids, mask, [60, *[1] * 10])
    assert steps[0] == 0


# -- a token that is encoded as it comes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["fp8", "fp8(e5m2)", "fp8(scale=false)", "protect(sink=3) | fp8"])
def test_tokens_are_encoded_as_they_come(plan: str) -> None:
    """A tail writes what the codec does: the same bytes but for numbers that lie between two codes."""
    ids = tokens(2, 220)
    model = sharp_model(gain=3.0)
    cache, other = kvfold.cache(model, plan), kvfold.cache(model, plan)
    mine = _streamed(model, cache, ids, [60, *[1] * 160])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLayer, "tail", lambda self: None)
        theirs = _streamed(model, other, ids, [60, *[1] * 160])
    assert (mine - theirs).norm() <= 2e-3 * theirs.norm()
    a, b = _layers(cache)[0].body, _layers(other)[0].body
    assert a.lengths == b.lengths == [220 - _layers(cache)[0].plan.sink] * 4
    assert torch.equal(a.slots(), b.slots())
    for name, x in a.pool.read(a.pool.table).items():
        assert (x == b.pool.read(b.pool.table)[name]).float().mean() > 0.999


# -- what the compiled code refuses ------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(40)")
    _streamed(model, cache, tokens(1, 70), [60, *[1] * 10])
    layer = _layers(cache)[0]
    turnover = layer.turnover()
    assert turnover is not None
    with pytest.raises(ValueError, match="rank must be"):
        turnover._go(torch.zeros(1, 1), 0)
    segments = [found.descriptor.native for found in turnover._segments]
    with pytest.raises(ValueError, match="other places"):
        cpu._native.turnover(segments, False, True, True, 7)
    with pytest.raises(ValueError, match="sinks, blocks and a run"):
        cpu._native.turnover([], False, True, True, 7)
