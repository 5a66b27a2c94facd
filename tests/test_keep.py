"""Dropping a token equals masking it, budgets are exact, and every policy decides as its paper's formula does."""

import itertools

import pytest
import torch
from oracle import Oracle, chunked, compare, held_bytes, left_pad, sharp_model, tokens

import kvfold
from kvfold.budget import UNIFORM, Budget, split_over_heads
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.registry import methods

EXAMPLES: dict[str, list[str]] = {
    "window": ["window(12)", "window(30%)"],
    "sink_window": [
        "sink_window(sink=3, window=9)",
        "sink_window(sink=4, window=30%)",
        "sink_window(sink=2, window=8, reindex=false)",
    ],
    "h2o": ["h2o(12)", "h2o(30%, group=max)", "h2o(12, recent=3, sink=2)", "h2o(30%, heads=ada)"],
    "tova": ["tova(12)", "tova(30%, sink=2, recent=4)"],
    "snapkv": [
        "snapkv(20, window=8, kernel=3)",
        "snapkv(40%, window=4, pool=mean, group=max)",
        "snapkv(20, window=8, heads=ada)",
        "snapkv(20, window=8, layers=pyramid(4))",
    ],
    "l2norm": ["l2norm(12, skip=0)", "l2norm(30%, sink=2, recent=3, skip=0)", "l2norm(12, heads=ada, skip=0)"],
    "scissorhands": ["scissorhands(12, recent=4)", "scissorhands(30%, window=9, group=max, layers=pyramid)"],
    "keydiff": ["keydiff(12)", "keydiff(30%, sink=2, recent=3, heads=ada)"],
    "lagkv": ["lagkv(16, lag=5)", "lagkv(40%, lag=4, sink=2, layers=weights(3, 1))"],
    "expected": ["expected(14, refresh_every=3)", "expected(30%, covariance=false, future=20, sink=1, recent=2)"],
    "kvzip": ["kvzip(14)", "kvzip(30%, sink=1, heads=uniform, recent=3)"],
    "sieve": ["sieve(16)", "sieve(30%, sink=1, recent=2, group=max)"],
    "random": ["random(16)", "random(30%, recent=25%, sink=2, seed=7)"],
}
"""Plans for every keep policy; a policy that is registered must have one here."""

PLANS = [plan for plans in EXAMPLES.values() for plan in plans]
CHUNKINGS = [[40], [1, 7, 1, 1, 20, 10], [16, 16, 8]]


def test_every_registered_policy_has_an_example() -> None:
    assert set(EXAMPLES) == set(methods("keep"))
    assert all(Plan.parse(text).keep.name == name for name, texts in EXAMPLES.items() for text in texts)


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


# -- dropping equals masking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", CHUNKINGS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_dropping_equals_masking(plan: str, sizes: list[int]) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    oracle = Oracle.of(model, cache)
    sizes = [*sizes, 1, 1, 3, 1]
    ids = tokens(2, sum(sizes))
    for mine, theirs in compare(model, cache, oracle, ids, None, sizes):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert any(len(kept) < ids.shape[1] for kept in _layers(cache)[0].kept_slots())


@pytest.mark.parametrize("sizes", CHUNKINGS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_dropping_equals_masking_with_left_padding(plan: str, sizes: list[int]) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    oracle = Oracle.of(model, cache)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (40, 17, 29)])
    new = tokens(3, 6, seed=1)
    ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    for mine, theirs in compare(model, cache, oracle, ids, mask, [*sizes, 1, 2, 1, 1, 1]):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ["full", "int8(sink=2)", *PLANS])
def test_padding_between_turns_is_no_token(plan: str) -> None:
    """In a batch, turns of different lengths are padded in the middle of the sequence; each row must be as if it were alone."""
    model = sharp_model()
    turns = [[tokens(1, n, seed=n)[0] for n in lengths] for lengths in ((30, 21), (7, 12), (9, 3))]
    padded = [left_pad(turn) for turn in turns]
    ids, mask = torch.cat([i for i, _ in padded], 1), torch.cat([m for _, m in padded], 1)
    both = chunked(model, kvfold.cache(model, plan), ids, mask, [30, 12, 9])
    for row in range(2):
        parts = [turn[row] for turn in turns]
        alone = chunked(model, kvfold.cache(model, plan), torch.cat(parts)[None], None, [len(part) for part in parts])
        torch.testing.assert_close(both[row][mask[row].bool()], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_dropping_equals_masking_on_gemma2(plan: str) -> None:
    """Capped scores, and layers with a window of their own in between."""
    model = sharp_model("gemma2", gain=4.0, num_hidden_layers=4, attn_logit_softcapping=5.0)
    cache = kvfold.cache(model, plan)
    oracle = Oracle.of(model, cache)
    for mine, theirs in compare(model, cache, oracle, tokens(2, 44), None, [24, 16, 1, 1, 2]):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "store",
    [
        "int8",
        "int4(k_axis=token, rotate=none)",
        "kivi(int4, residual=8)",
        "fp8",
        "protect(window=5) | int4",
        "nf4(k_axis=token)",
        "turboquant(3)",
        "kvquant(4)",
        "gear(int4, rank=2)",
        "lowrank(50%, tokens=64)",
        "lorc(codes=int8)",
        "protect(window=5) | lorc",
    ],
)
@pytest.mark.parametrize(
    "keep", ["window(80)", "h2o(40%)", "snapkv(90, window=8, heads=ada)", "random(50%)", "sink_window(sink=4, window=80)"]
)
@pytest.mark.usefixtures("exact_products")
def test_any_keep_with_any_store(keep: str, store: str) -> None:
    """Packed tokens: the oracle sees what the codec decodes."""
    model = sharp_model()
    cache = kvfold.cache(model, f"{keep} | {store}")
    oracle = Oracle.of(model, cache)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (230, 131)])
    for mine, theirs in compare(model, cache, oracle, ids, mask, [100, 70, 50, 1, 1, 8], decoded=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "plan", [*PLANS, "h2o(16) | int4", "window(16) | kivi(int8, residual=4)", "turboquant(3)", "h2o(16) | lorc"]
)
@pytest.mark.usefixtures("exact_products")
def test_beams_are_sequences_of_their_own(plan: str) -> None:
    """Rows that are repeated, reordered and continued are as if each had been read alone."""
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    prompt = tokens(2, 33)
    chunked(model, cache, prompt, None, [33])
    cache.batch_repeat_interleave(2)
    history = prompt.repeat_interleave(2, 0)
    for step, order in enumerate([[0, 0, 2, 3], [1, 0, 3, 3], [1, 1, 2, 2], [0, 1, 2, 3]]):
        new = tokens(4, 2, seed=10 + step)
        history = torch.cat([history, new], 1)
        with torch.no_grad():
            mine = model(new, past_key_values=cache).logits
        for row in range(4):
            alone = kvfold.cache(model, plan)
            sizes = [33, *[2] * (step + 1)]
            theirs = chunked(model, alone, history[row : row + 1], None, sizes)[0, -2:]
            torch.testing.assert_close(mine[row], theirs, atol=1e-4, rtol=1e-4)
        cache.reorder_cache(torch.tensor(order))
        history = history[order]


# -- budgets -----------------------------------------------------------------------------------------------------------------


def _pins(plan: str) -> tuple[int, int]:
    """Sinks and recent tokens that a plan pins once its budget of 12 … 20 tokens is full."""
    keep = Plan.parse(plan).keep
    assert keep is not None
    return keep.sink, keep.recent.tokens(int(keep.budget.value) - keep.sink) if keep.budget.unit == "tokens" else 0


@pytest.mark.parametrize("plan", PLANS)
def test_budget_is_exact_after_every_chunk(plan: str) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    keep = Plan.parse(plan).keep
    assert keep is not None
    sink, recent = _pins(plan)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (61, 40, 5)])
    start = 0
    for size in [20, 1, 1, 24, 7, 1, 1, 1, 5]:
        chunked(model, cache, ids[:, : start + size], mask[:, : start + size], [start + size]) if start == 0 else _feed(
            model, cache, ids, mask, start, size
        )
        start += size
        real = mask[:, :start].sum(1).tolist()
        kept_by_layer = [layer.kept_slots() for layer in _layers(cache)]
        if keep.layers != UNIFORM:
            for row, seen in enumerate(n for n in real for _ in range(2)):
                allowed = min(seen, max(keep.sink + 1, keep.budget.tokens(seen)))
                held = sum(len(kept[row]) for kept in kept_by_layer)
                # A share grows for all layers at once, and a layer may be allowed two tokens more when there is only one.
                slack = len(kept_by_layer) if keep.budget.unit == "share" else 0
                assert len(kept_by_layer) * allowed - slack <= held <= len(kept_by_layer) * allowed
            continue
        for kept in kept_by_layer:
            for sequence, seen in enumerate(real):
                rows = kept[2 * sequence : 2 * sequence + 2]
                allowed = min(seen, max(keep.sink + 1, keep.budget.tokens(seen)))
                first = start - seen
                if keep.heads == "ada":
                    assert sum(map(len, rows)) == 2 * allowed
                else:
                    assert [len(row) for row in rows] == [allowed, allowed]
                for row in rows:
                    assert set(range(first, first + min(sink, seen))) <= set(row)
                    assert set(range(max(first, start - recent), start)) <= set(row)
                    assert len(set(row)) == len(row)
                    assert all(first <= slot < start for slot in row)


def _feed(model, cache, ids, mask, start: int, size: int) -> None:
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start : start + size]
    with torch.no_grad():
        model(
            ids[:, start : start + size], attention_mask=mask[:, : start + size], position_ids=positions, past_key_values=cache
        )


def test_ada_gives_heads_different_lengths_and_frees_their_memory() -> None:
    model = sharp_model(num_hidden_layers=3)
    cache = kvfold.cache(model, "h2o(25%, recent=0, heads=ada)")
    chunked(model, cache, tokens(1, 1200), None, [1200])
    lengths = [[len(row) for row in layer.kept_slots()] for layer in _layers(cache)]
    assert all(sum(heads) == 600 for heads in lengths)
    assert any(heads[0] != heads[1] for heads in lengths)
    for layer, heads in zip(_layers(cache), lengths, strict=True):
        blocks = sum(-(-n // 64) for n in heads)
        assert layer.body.pool.fields["k.x"].shape[0] <= -(-blocks * 9 // 8), "blocks that a head gave up are not freed"
    full = kvfold.cache(model, "full")
    chunked(model, full, tokens(1, 1200), None, [1200])
    assert cache.nbytes < 0.33 * full.nbytes


def test_memory_that_moves_between_heads_is_given_back() -> None:
    """Step by step, one head's share shrinks as another's grows; the pool must follow."""
    model = sharp_model()
    cache = kvfold.cache(model, "l2norm(512, heads=ada, skip=0)")
    chunked(model, cache, tokens(1, 900), None, [600, *[20] * 15])
    for layer in _layers(cache):
        blocks = sum(-(-len(row) // 64) for row in layer.kept_slots())
        assert (layer.body.pool.table >= 0).sum() == blocks
        assert layer.body.pool.fields["k.x"].shape[0] <= -(-blocks * 9 // 8)


@pytest.mark.parametrize("store", ["dense", "int8", "int4(k_axis=token)", "kivi(int4, residual=16)", "gear(int4)"])
@pytest.mark.parametrize("keep", ["h2o(96KiB)", "window(96KiB)", "h2o(96KiB, heads=ada)"])
def test_a_budget_of_bytes_is_not_exceeded(keep: str, store: str) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, f"{keep} | {store}")
    for step in range(4):
        with torch.no_grad():
            model(tokens(1, 300, seed=step), past_key_values=cache)
            for _ in range(3):
                model(tokens(1, 1), past_key_values=cache)
        assert held_bytes(list(cache.layers), but=model) <= 96 * 1024
    assert cache.nbytes > 40 * 1024, "most of the budget should be used"


def test_pins_beyond_the_budget_leave_no_head_empty() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(10%, recent=32, heads=ada)")
    chunked(model, cache, tokens(1, 100), None, [100])
    assert [len(row) for row in _layers(cache)[0].kept_slots()] == [10, 10]


def test_split_over_heads_by_brute_force() -> None:
    """Ada-KV by hand: a fifth of the even share for each head, the rest to the best of all heads."""
    generator = torch.Generator().manual_seed(3)
    for budget, num_tokens in itertools.product([1, 2, 5, 9], [1, 4, 9, 30]):
        scores = torch.rand(6, num_tokens, generator=generator)
        slots = torch.arange(num_tokens).expand(6, -1)
        stays = split_over_heads(scores, slots, torch.full((6,), budget), 3, "ada")
        for sequence in range(2):
            rows = scores[3 * sequence : 3 * sequence + 3]
            floor = min(-(-budget // 5), num_tokens)
            ranked = [sorted(range(num_tokens), key=lambda t, h=h: -rows[h, t].item()) for h in range(3)]
            chosen = {(h, t) for h in range(3) for t in ranked[h][:floor]}
            others = sorted(
                ((h, t) for h in range(3) for t in range(num_tokens) if (h, t) not in chosen), key=lambda p: -rows[p].item()
            )
            chosen |= set(others[: max(0, 3 * budget - len(chosen))])
            got = {(h, t) for h in range(3) for t in range(num_tokens) if stays[3 * sequence + h, t]}
            assert got == chosen


@pytest.mark.parametrize("plan", [*EXAMPLES["window"], *EXAMPLES["sink_window"]])
def test_windows_do_not_depend_on_chunks(plan: str) -> None:
    model = sharp_model()
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (90, 57)])
    results = []
    for size in (1, 7, 64, 90):
        sizes = [size] * (90 // size)
        sizes += [90 - sum(sizes)] if sum(sizes) < 90 else []
        results.append(chunked(model, kvfold.cache(model, plan), ids, mask, sizes)[mask.bool()])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-4)


def test_budget_arithmetic() -> None:
    assert [Budget.parse("25%").tokens(n) for n in (1, 4, 5, 4096)] == [1, 1, 2, 1024]
    assert Budget.parse("64MiB").tokens(10, 77) == 77
    assert Budget.parse("1024").tokens(10) == 1024
