"""Layers that hold a cache together: merged pairs against a computation by hand, borrowed tokens against a patched cache."""

import math
from typing import Any

import pytest
import torch
from oracle import LayerView, Oracle, chunked, compare, held_bytes, left_pad, sharp_model, tokens
from transformers import DynamicCache

import kvfold
from kvfold.errors import PlanError
from kvfold.plan import Plan
from kvfold.registry import methods
from kvfold.share.minicache import MiniCache, slerp
from kvfold.shared_layers import BorrowingLayer, MergedLayer

MERGED = [
    "minicache(start=0%)",
    "minicache(start=50%, keep=20%, weight=30%)",
    "int4 | minicache(start=0%)",
    "protect(sink=3, window=9) | int8 | minicache(start=0%)",
    "fp8 | minicache(start=0%, keep=0%)",
    "hybrid(edge=1, edge_store=int8) | int4 | minicache(start=0%)",
]
BORROWED = [
    "share(start=0%)",
    "int4 | share(start=50%)",
    "h2o(40%) | int8 | share(start=0%, every=3)",
    "window(100) | share(0%)",
]


def test_every_registered_method_is_tested() -> None:
    assert {"share", "minicache"} == set(methods("share"))


def test_groups_of_layers() -> None:
    def groups(text: str, num_layers: int) -> list[tuple[int, ...]]:
        return Plan.parse(text).groups(num_layers)

    assert groups("minicache", 8) == [(4, 5), (6, 7)]
    assert groups("minicache(start=0%)", 5) == [(0, 1), (2, 3)]
    assert groups("share(start=25%, every=3)", 12) == [(3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert groups("hybrid(edge=1) | int4 | minicache(start=0%)", 8) == [(1, 2), (3, 4), (5, 6)]
    assert groups("hybrid(edge=4) | int4 | minicache(start=0%)", 8) == []
    assert groups("int4", 8) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h2o(25%) | minicache", ["same tokens in both layers", "h2o"]),
        ("quest(25%) | minicache", ["merged blocks"]),
        ("minicache | tier(64, host)", ["can't move"]),
        ("minicache | share", ["two share stages"]),
        ("minicache | int4", ["too late"]),
        ("minicache(start=100%)", ["leaves no layer"]),
        ("minicache(keep=60%)", ["at most 50%"]),
        ("minicache(start=middle)", ["not a share from 0% to 100%"]),
        ("share(every=1)", ["at least 2"]),
    ],
)
def test_what_can_not_work_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


# -- minicache ---------------------------------------------------------------------------------------------------------------


def _by_hand(x: torch.Tensor, y: torch.Tensor, t: float) -> tuple[torch.Tensor, float]:
    """SLERP of two vectors as the paper writes it, in double precision; and their angle."""
    x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
    angle = math.acos(max(-1.0, min(1.0, float(x @ y))))
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle), angle


def test_slerp_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 32, generator=generator), torch.randn(20, 32, generator=generator)
    for t in (0.0, 0.3, 0.6, 1.0):
        e, angle = slerp(x, y, t)
        for i in range(20):
            expected, of_both = _by_hand(x[i], y[i], t)
            torch.testing.assert_close(e[i].double(), expected, atol=1e-5, rtol=1e-4)
            assert angle[i] == pytest.approx(of_both, abs=1e-5)


def test_slerp_of_directions_without_a_middle() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    x[4] = 0
    for y, expected in ((x.clone(), 0.0), (x * 7, 0.0), (-x, math.pi)):
        e, angle = slerp(x, y, 0.6)
        assert e.isfinite().all()
        torch.testing.assert_close(angle[:4], torch.full((4,), expected), atol=1e-3, rtol=0)
        torch.testing.assert_close(e[:4].norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(slerp(x, x, 0.6)[0][:4], torch.nn.functional.normalize(x[:4], dim=-1))


def _dense(layer: MergedLayer, kept: list[list[int]]) -> LayerView:
    """What a layer holds, restored by the paper's equation: a direction times the layer's own magnitude."""
    side = 1 if layer._first else 0
    parts = [getattr(layer, name).dense() for name in layer.runs]
    if layer.merged.width:
        k, v, slots = layer.merged.dense()
        dim = layer.site.head_dim
        parts.append((k[..., :dim] * k[..., dim + side, None], v[..., :dim] * v[..., dim + side, None], slots))
    k, v, slots = (torch.cat([part[i] for part in parts], 1) for i in range(3))
    view = LayerView(kept, [], [])
    for row, wanted in enumerate(kept):
        place = {slot: i for i, slot in enumerate(slots[row].tolist()) if slot >= 0}
        at = torch.tensor([place[slot] for slot in wanted], dtype=torch.long)
        view.k.append(k[row, at])
        view.v.append(v[row, at])
    return view


class MergedOracle(Oracle):
    """Sees the merged tensors of pairs, written out, and what other layers' codecs decode."""

    def watch(self, cache: kvfold.KVCache, *, decoded: bool) -> None:
        merged = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, MergedLayer)}
        for layer in merged.values():  # the parts that they have are not those of a single layer
            layer.__dict__["is_initialized"], layer.was = False, layer.is_initialized
        super().watch(cache, decoded=decoded)
        for i, layer in merged.items():
            layer.is_initialized = layer.was
            if layer.is_initialized:
                self.views[i] = _dense(layer, layer.kept_slots())


@pytest.mark.parametrize("plan", MERGED)
@pytest.mark.parametrize("sizes", [[300], [150, 70, 1, 30, 1, 48], [1] * 3 + [140, 157]], ids=str)
def test_attention_is_over_the_merged_tensors(plan: str, sizes: list[int]) -> None:
    model = sharp_model(num_hidden_layers=5)
    cache = kvfold.cache(model, plan)
    oracle = Oracle.of(model, cache)
    oracle.__class__ = MergedOracle
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (300, 221)])
    new = tokens(2, 9, seed=1)
    ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    for mine, theirs in compare(model, cache, oracle, ids, mask, [*sizes, 1, 7, 1], decoded=True):
        if all(isinstance(layer, MergedLayer) for layer in cache.layers) or "int" not in plan:
            torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=3e-4)
        else:  # layers that stay alone run on kernels that round queries (tests/rounding.py)
            assert (mine - theirs).norm() <= 0.02 * theirs.norm()
    assert all(layer.merged.width for layer in cache.layers if isinstance(layer, MergedLayer))


@pytest.mark.parametrize("keep", [0, 5, 20])
def test_what_is_merged_and_what_is_kept(keep: int) -> None:
    """The first pair of layers, from keys and values that a plain cache holds: equations, choice and places."""
    model = sharp_model(num_hidden_layers=2)
    ids = tokens(1, 300)
    plain = DynamicCache()
    chunked(sharp_model(num_hidden_layers=2), plain, ids, None, [300])
    cache = kvfold.cache(model, f"minicache(start=0%, keep={keep}%)")
    chunked(model, cache, ids, None, [300])
    first, second = cache.layers
    assert isinstance(first, MergedLayer)
    assert isinstance(second, MergedLayer)
    num_kept = int(keep / 100 * 64 / (1 - keep / 100))
    group = 64 + num_kept
    num_groups = 300 // group
    k, v, slots = first.merged.dense()
    assert torch.equal(first.kept.slots, second.kept.slots)
    for row in range(2):
        own = [[getattr(plain.layers[i], name)[0, row] for i in (0, 1)] for name in ("keys", "values")]
        angles = [sum(_by_hand(x[s], y[s], 0.6)[1] for x, y in own) for s in range(300)]
        kept = []
        for g in range(num_groups):
            span = range(g * group, (g + 1) * group)
            kept += sorted(sorted(span, key=lambda s: -angles[s])[:num_kept])
        assert first.kept.slots[row].tolist() == kept
        assert [s for s in slots[row].tolist() if s >= 0] == [s for s in range(num_groups * group) if s not in kept]
        assert first.recent.slots[row].tolist() == list(range(num_groups * group, 300))
        for layer, run in ((0, first.kept), (1, second.kept)):
            torch.testing.assert_close(run.k[row], own[0][layer][kept], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(run.v[row], own[1][layer][kept], atol=1e-4, rtol=1e-4)
        for place, slot in list(enumerate(slots[row].tolist()))[::17]:
            for x, merged in ((own[0], k), (own[1], v)):
                expected, _ = _by_hand(x[0][slot], x[1][slot], 0.6)
                for side in (0, 1):
                    mine = merged[row, place, :16] * merged[row, place, 16 + side]
                    theirs = (expected * x[side][slot].double().norm()).float()
                    torch.testing.assert_close(mine, theirs, atol=2e-3 * float(theirs.norm()), rtol=2e-3)


def test_layers_that_are_alike_lose_nothing() -> None:
    """Where the second layer's keys and values point as the first's do, merging is exact, whatever the magnitudes."""
    model = sharp_model(num_hidden_layers=2)
    cache = kvfold.cache(model, "minicache(start=0%)")
    first, second = cache.layers
    assert isinstance(first, MergedLayer)
    generator = torch.Generator().manual_seed(0)
    for layer, scale in ((first, 1.0), (second, 2.5)):
        generator.manual_seed(0)
        k, v = (torch.randn(1, 2, 200, 16, generator=generator) * scale for _ in range(2))
        handle, _ = layer.update(k, v)
        layer.attend(handle, torch.zeros(1, 4, 200, 16), None, 0.25, None)
    q = torch.randn(1, 4, 1, 16, generator=generator)
    for layer, scale in ((first, 1.0), (second, 2.5)):
        generator.manual_seed(0)
        k, v = (torch.randn(1, 2, 200, 16, generator=generator) * scale for _ in range(2))
        new = torch.zeros(1, 2, 1, 16)
        mine = layer.attend(layer.update(new, new)[0], q, None, 0.25, None)
        k, v = (torch.cat([x, new], 2).repeat_interleave(2, 1) for x in (k, v))
        theirs = ((q @ k.mT * 0.25).softmax(-1) @ v).transpose(1, 2)
        torch.testing.assert_close(mine, theirs, atol=3e-3, rtol=3e-3)


def test_bytes_of_merged_pairs() -> None:
    """One direction for two layers, four half precision magnitudes, a slot; the kept and the waiting tokens dense."""
    model = sharp_model(num_hidden_layers=2, head_dim=64, hidden_size=128).to(torch.bfloat16)
    sizes = {}
    for plan in ("full", "minicache(start=0%)", "int4", "int4 | minicache(start=0%)"):
        cache = kvfold.cache(model, plan)
        chunked(model, cache, tokens(1, 2000), None, [500] * 4)
        assert cache.nbytes == held_bytes(cache, but=model)
        sizes[plan] = cache.nbytes
    waiting = 66 * 2 * 2 * 2 * 64 * 2 * 2
    dense = 2000 * 2 * 2 * 64 * 2
    assert sizes["minicache(start=0%)"] <= (dense + 2000 * 2 * 12) * 1.02 + 0.05 * 2 * dense + waiting
    assert sizes["minicache(start=0%)"] <= 0.62 * sizes["full"]
    assert sizes["int4 | minicache(start=0%)"] < 0.95 * sizes["int4"]
    for layer in cache.layers:
        assert isinstance(layer, MergedLayer)
        assert layer.recent.width < 67


# -- borrowed tokens ---------------------------------------------------------------------------------------------------------


class Lending(DynamicCache):
    """transformers' own cache, where some layers get another layer's keys and values."""

    lenders: dict[int, int]

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        mine = super().update(k, v, layer_idx, *args, **kwargs)
        if (lender := self.lenders.get(layer_idx)) is None:
            return mine
        return self.layers[lender].keys, self.layers[lender].values


@pytest.mark.parametrize("every", [2, 3])
def test_borrowing_layers_attend_to_their_lenders_tokens(every: int) -> None:
    model = sharp_model(num_hidden_layers=6)
    theirs = Lending()
    theirs.lenders = {i: i - i % every for i in range(6) if i % every}
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (90, 57)])
    sizes = [50, 1, 30, *[1] * 9]
    expected = chunked(sharp_model(num_hidden_layers=6), theirs, ids, mask, sizes)
    cache = kvfold.cache(model, f"share(start=0%, every={every})")
    mine = chunked(model, cache, ids, mask, sizes)
    torch.testing.assert_close(mine[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    full = kvfold.cache(model, "full")
    chunked(model, full, ids, mask, sizes)
    assert cache.nbytes * every == full.nbytes


def test_a_borrowing_layer_holds_nothing() -> None:
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, "int4 | share(start=50%)")
    chunked(model, cache, tokens(2, 200), None, [200])
    assert isinstance(cache.layers[3], BorrowingLayer)
    assert sum(x.nbytes for _, x in cache.layers[3].tensors()) == 0
    assert cache.layers[3].kept_slots() == cache.layers[2].kept_slots()


# -- both --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*MERGED[:4], *BORROWED])
def test_beams_crops_resets_and_files(plan: str, tmp_path) -> None:
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, plan)
    rows = tokens(2, 260)
    chunked(model, cache, rows, None, [200, 60])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
    alone = kvfold.cache(model, plan)
    chunked(model, alone, rows[[1, 0, 1, 0]], None, [200, 60])
    following = tokens(4, 90, seed=3)
    sizes = [1, 88, 1]
    torch.testing.assert_close(
        chunked(model, cache, following, None, sizes), chunked(model, alone, following, None, sizes), atol=2e-4, rtol=2e-4
    )
    assert cache.nbytes == held_bytes(cache, but=model)
    cache.save(tmp_path / "cache")
    loaded = kvfold.load_cache(tmp_path / "cache", model)
    mine, theirs = (chunked(model, c, following, None, [89, 1]) for c in (cache, loaded))
    assert torch.equal(mine, theirs)
    cache.crop(-130)
    assert cache.get_seq_length() == 310
    assert all(slot < 310 for layer in cache.layers for row in layer.kept_slots() for slot in row)
    assert chunked(model, cache, following, None, [1] * 3 + [87]).isfinite().all()
    assert cache.nbytes == held_bytes(cache, but=model)
    cache.reset()
    assert cache.nbytes == 0
    again = kvfold.cache(model, plan)
    assert torch.equal(chunked(model, cache, rows, None, [259, 1]), chunked(model, again, rows, None, [259, 1]))


def test_a_crop_of_merged_tokens_is_a_crop() -> None:
    """Cropped to where nothing has been read again, a merged cache attends to the same tensors."""
    model = sharp_model(num_hidden_layers=2)
    cache = kvfold.cache(model, "minicache(start=0%)")
    chunked(model, cache, tokens(1, 300), None, [300])
    first = cache.layers[0]
    assert isinstance(first, MergedLayer)
    before = {s: first.merged.dense()[0][0, i] for i, s in enumerate(first.merged.slots()[0].tolist()) if 0 <= s < 100}
    cache.crop(-200)
    after = {s: first.merged.dense()[0][0, i] for i, s in enumerate(first.merged.slots()[0].tolist()) if s >= 0}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[s], after[s]) for s in before)
    assert isinstance(Plan.parse("minicache").share, MiniCache)
