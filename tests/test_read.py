"""Reading a part: what is chosen, what is touched, and that all of it is everything."""

from typing import Any

import pytest
import torch
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from segment_cases import plain_attention

import kvfold
from kvfold.attention.reference import Query
from kvfold.held_layer import HeldLayer
from kvfold.kernels import cpu
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.read.base import best_columns
from kvfold.read.infllm import InfLLM
from kvfold.read.quest import Quest, bounds
from kvfold.reading import Reading
from kvfold.registry import methods

EXAMPLES: dict[str, list[str]] = {
    "quest": ["quest(30%)", "quest(200, page=16, skip=0)", "quest(30%, page=32, sink=2, queries=1)"],
    "infllm": ["infllm(30%)", "infllm(200, representatives=2)"],
}
STORES = ["", " | int4", " | fp8", " | kivi(int4, residual=8)"]


def test_every_registered_method_has_an_example() -> None:
    assert set(EXAMPLES) == set(methods("read"))


def _plans(budget: str | None = None) -> list[str]:
    plans = [plan + store for texts in EXAMPLES.values() for plan in texts for store in STORES]
    return plans if budget is None else [p.replace("30%", budget).replace("200", budget) for p in plans]


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


@pytest.mark.parametrize("plan", _plans("100%"))
def test_reading_all_is_reading_without_a_choice(plan: str) -> None:
    model = sharp_model()
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (290, 171)])
    sizes = [200, 60, *[1] * 6, 24]
    cache = kvfold.cache(model, plan)
    mine = chunked(model, cache, ids, mask, sizes)
    store = plan.partition(" | ")[2] or "dense"
    same = kvfold.cache(model, f"{store.rstrip(')')}{', ' if '(' in store else '('}sink={_layers(cache)[0].plan.sink})")
    theirs = chunked(model, same, ids, mask, sizes)
    if _layers(cache)[0].codec.unit == "block" or "dense" in store:  # else tokens wait, dense, until they fill a block
        # Sums in another order may move a code to its neighbour: weights that differ by 2e-7 move single logits by 7e-4.
        off = (mine - theirs)[mask.bool()].abs()
        assert off.max() < 5e-3
        assert off.mean() < 5e-6  # 7e-7 with a code that moved; logits are 1.0 on average
    full = chunked(model, kvfold.cache(model, "full"), ids, mask, sizes)
    assert (mine - full)[mask.bool()].norm() <= (0.3 if store != "dense" else 1e-4) * full[mask.bool()].norm()


@pytest.mark.parametrize("plan", [p for p in _plans() if "skip=0" in p or "infllm" in p])
def test_attention_is_over_what_was_chosen_and_nothing_else_is_touched(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not chosen is overwritten with garbage before the step; the step is plain attention over the rest."""
    monkeypatch.setattr(HeldLayer, "turnover", lambda self, padding: None)
    model = sharp_model(num_hidden_layers=1)
    cache = kvfold.cache(model, plan)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (700, 430)])
    chunked(model, cache, ids, mask, [600, 100])
    layer = _layers(cache)[0]
    read = layer.plan.read
    assert read is not None
    chosen: list[torch.Tensor] = []
    choose = type(read).choose

    def watched(self: Any, q: torch.Tensor, table: torch.Tensor, summary: Any, *numbers: list[int]) -> torch.Tensor:
        columns = choose(self, q, table, summary, *numbers)
        assert columns is not None
        chosen.append(columns)
        k, v, slots = layer.body.dense()
        block = layer.body.pool.block
        stays = torch.zeros_like(table, dtype=torch.bool)
        for row, of_row in enumerate(columns.tolist()):
            picked = [c for c in of_row if c >= 0]
            assert picked == sorted(set(picked))
            newest = int((table[row] >= 0).sum()) - 1
            assert picked[-1] == newest, "the newest block is always read"
            stays[row, picked] = True
        for (
            x
        ) in layer.body.pool.fields.values():  # as a float 1e36; finite, as the reference multiplies what it hides with zero
            x.view(torch.uint8)[table[~stays & (table >= 0)]] = 0x7B
        seen = stays.repeat_interleave(block, 1)
        parts = [(k[0:0], v[0:0], slots[0:0])]
        parts = [layer.sink.dense(), (k, v, slots.masked_fill(~seen, -1)), layer.recent.dense()]
        held.extend(torch.cat([part[i] for part in parts], 1) for i in range(3))
        return columns

    held: list[torch.Tensor] = []
    monkeypatch.setattr(type(read), "choose", watched)
    attended: dict[str, Any] = {}
    attend_all = LayerCache._attend_all

    def kept(self: Any, query: Query, chunk: Any, ranks: Any) -> Any:
        attended["out"], attended["query"], attended["chunk"] = attend_all(self, query, chunk, ranks), query, chunk
        return attended["out"]

    monkeypatch.setattr(LayerCache, "_attend_all", kept)
    with torch.no_grad():
        model(tokens(2, 1), attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
    k, v, slots = (torch.cat([x, y], 1) for x, y in zip(held, attended["chunk"].dense(), strict=True))
    out, lse = plain_attention(attended["query"].q, k, v, slots, attended["query"])
    rounding = 0.0 if layer.codec.unit == "token" else 0.02  # of queries, by the kernels that multiply in integers
    torch.testing.assert_close(attended["out"].out, out.float(), atol=1e-4 + rounding, rtol=1e-3)
    torch.testing.assert_close(attended["out"].lse, lse.float(), atol=1e-4 + rounding, rtol=1e-3)
    counts = (chosen[0] >= 0).sum(1)
    for row, count in enumerate(counts.tolist()):
        num_real = layer.num_real[row // 2]
        dense = layer.sink.counts()[row] + layer.recent.counts()[row]
        assert 64 * count <= max(64, read.budget.tokens(num_real) - int(dense) + 1)


@pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")
@pytest.mark.parametrize(
    ("plan", "padded"),
    [*((plan, True) for plan in _plans() if "fp8" not in plan), ("quest(30%) | int4", False), ("infllm(30%)", False)],
)
def test_single_tokens_read_what_the_general_path_reads(plan: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps: over the end of blocks, after chunks, in rows of unequal length."""
    lengths = (391, 270) if padded else (391, 391)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in lengths])
    sizes = [300, *[1] * 40, 6, *[1] * 45]
    taken: list[int] = []
    step = Reading.step
    monkeypatch.setattr(Reading, "step", lambda self, *given: (taken.append(1), step(self, *given))[1])

    def run() -> tuple[torch.Tensor, kvfold.KVCache]:
        model = sharp_model(num_hidden_layers=1 + 2 * ("skip=0" not in plan and "quest" in plan))
        cache = kvfold.cache(model, plan)
        return chunked(model, cache, ids, mask if padded else None, sizes), cache

    mine, cache = run()
    whole_blocks = _layers(cache)[-1].body.unit == "block"
    assert len(taken) > 70 or not whole_blocks
    monkeypatch.setattr(HeldLayer, "turnover", lambda self, padding: None)
    theirs, other = run()
    assert (mine - theirs)[mask.bool()].norm() <= 2e-3 * theirs[mask.bool()].norm()
    for a, b in zip(_layers(cache), _layers(other), strict=True):
        assert a.kept_slots() == b.kept_slots()
        assert torch.equal(a.recent.slots, b.recent.slots)
        if a.recent.score is not None:
            torch.testing.assert_close(a.recent.score, b.recent.score, atol=1e-3, rtol=1e-3)
    assert cache.nbytes == other.nbytes


def test_no_key_of_a_page_scores_above_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(3, 5, 64, 32, generator=generator)
    q = torch.randn(3, 7, 32, generator=generator)
    for page in (16, 32, 64):
        summary = Quest.summarize(Plan.parse(f"quest(25%, page={page})").read, k, None)
        most = bounds(q, summary["page.low"], summary["page.high"])
        scores = torch.einsum("rmd,rctd->rmct", q, k).unflatten(-1, (-1, page)).amax(-1)
        assert (scores <= most + 1e-5).all()
        by_hand = torch.maximum(
            q[:, :, None, None] * summary["page.low"][:, None], q[:, :, None, None] * summary["page.high"][:, None]
        ).sum(-1)
        torch.testing.assert_close(most, by_hand, atol=1e-4, rtol=1e-4)


def test_quest_finds_the_page_that_matters() -> None:
    k = torch.randn(1, 8, 64, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    q = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    k[0, 3, 17] = q[0, 0] * 3
    for text in ("quest(25%)", "quest(25%, page=16)"):
        read = Plan.parse(text).read
        assert isinstance(read, Quest)
        assert read.relevance(q, read.summarize(k, None))[0].argmax() == 3


def test_infllm_represents_a_block_by_what_was_asked_for() -> None:
    read = Plan.parse("infllm(25%, representatives=2)").read
    assert isinstance(read, InfLLM)
    k = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    score = torch.zeros(1, 1, 64)
    score[0, 0, [9, 40]] = 1.0
    summary = read.summarize(k, score)
    assert torch.equal(summary["page.keys"], k[:, :, [9, 40]])
    q = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    expected = (q[0] @ k[0, 0, [9, 40]].T).sum()
    torch.testing.assert_close(read.relevance(q, summary)[0, 0], expected)


def test_infllms_scores_are_means_over_later_queries() -> None:
    """However the chunks are cut: r_m = 1/L Σ q_{m+j} · k_m."""
    read = Plan.parse("infllm(25%)").read
    assert read is not None
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 20, 8, generator=generator), torch.randn(2, 3, 20, 8, generator=generator)
    scores = torch.einsum("rgqd,rnd->rqn", q, k) / 3
    later = torch.arange(20)[:, None] >= torch.arange(20)
    expected = (scores * later).sum(1) / later.sum(0)
    for sizes in ([20], [1] * 20, [7, 1, 12]):
        score, start = torch.zeros(2, 0), 0
        for size in sizes:
            end = start + size
            score = torch.cat([score, torch.zeros(2, size)], 1)
            slots = torch.arange(end).expand(2, -1)
            score = read.observe(score, k[:, :end], slots, q[:, :, start:end], torch.arange(start, end))
            start = end
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-4)


def test_best_columns_by_hand() -> None:
    relevance = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.0], [0.9, 0.1, 0.2, 5.0, 5.0]])
    assert best_columns(relevance, [5, 3], [3, 2]).tolist() == [[1, 3, 4], [0, 2, -1]]
    assert best_columns(relevance, [5, 3], [0, -3]).tolist() == [[4], [2]]
    assert best_columns(relevance, [5, 3], [5, 9]) is None
    assert best_columns(relevance, [4, 4], [2, 2]).tolist() == [[1, 3], [0, 3]]
    assert best_columns(relevance, [4, 4], [1, 0]).tolist() == [[3], [3]]


def test_long_chunks_read_everything() -> None:
    model = sharp_model()
    logits = []
    for plan in ("quest(64, queries=20, skip=0)", "dense(sink=4)"):
        cache = kvfold.cache(model, plan)
        logits.append(chunked(model, cache, tokens(1, 400), None, [300, 21, 79]))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", [texts[0] + " | int4" for texts in EXAMPLES.values()])
def test_beams_crops_resets_and_files(plan: str, tmp_path) -> None:
    model = sharp_model(num_hidden_layers=3)
    cache = kvfold.cache(model, plan)
    rows = tokens(2, 420)
    chunked(model, cache, rows, None, [400, 20])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
    alone = kvfold.cache(model, plan)
    chunked(model, alone, rows[[1, 0, 1, 0]], None, [400, 20])
    following = tokens(4, 70, seed=3)
    sizes = [1, 68, 1]
    torch.testing.assert_close(
        chunked(model, cache, following, None, sizes), chunked(model, alone, following, None, sizes), atol=1e-4, rtol=1e-4
    )
    cache.save(tmp_path / "cache")
    loaded = kvfold.load_cache(tmp_path / "cache", model)
    mine, theirs = (chunked(model, c, following, None, [70]) for c in (cache, loaded))
    assert torch.equal(mine, theirs)
    cache.crop(-200)
    assert cache.get_seq_length() == 360
    assert chunked(model, cache, following, None, [1] * 3 + [67]).isfinite().all()
    assert cache.nbytes == held_bytes(cache, but=model)
    cache.reset()
    again = kvfold.cache(model, plan)
    assert torch.equal(chunked(model, cache, rows, None, [419, 1]), chunked(model, again, rows, None, [419, 1]))
