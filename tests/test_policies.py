"""Every policy keeps what its paper's formula says, worked out again from transformers' own attention weights."""

import pytest
import torch
import torch.nn.functional as F
from oracle import chunked, left_pad, sharp_model, tokens

import kvfold
from kvfold.layer_cache import LayerCache


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


def _eager_attention(ids: torch.Tensor, **changes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention weights `[B, Hq, S, S]` and keys `[B, Hkv, S, D]` of each layer, from transformers' eager attention."""
    model = sharp_model(**changes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    return list(out.attentions), [layer.keys for layer in out.past_key_values.layers]


def _best(score: torch.Tensor, budget: int, pinned: set[int]) -> list[int]:
    """The pinned tokens and the best others, by a plain sort."""
    others = sorted((t for t in range(len(score)) if t not in pinned), key=lambda t: (-score[t].item(), -t))
    return sorted([*pinned, *others[: budget - len(pinned)]])


def _kept_after_one_chunk(plan: str, ids: torch.Tensor) -> list[list[list[int]]]:
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    chunked(model, cache, ids, None, [ids.shape[1]])
    # Only the first layer's input is the same under every plan, and the first chunk's output: it is computed before eviction.
    return [layer.kept_slots() for layer in _layers(cache)]


def _reduced(attention: torch.Tensor, how: str) -> torch.Tensor:
    """`[B, Hq, S]` to `[B, Hkv, S]`, over the two query heads of each group."""
    by_group = attention.unflatten(1, (2, 2))
    return by_group.mean(2) if how == "mean" else by_group.amax(2)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_h2o_keeps_what_has_received_most_attention(how: str) -> None:
    ids = tokens(2, 50)
    attentions, _ = _eager_attention(ids)
    kept = _kept_after_one_chunk(f"h2o(20, recent=6, group={how})", ids)
    for layer, attention in enumerate(attentions):
        score = _reduced(attention.sum(2), how).flatten(0, 1)
        for row in range(4):
            assert kept[layer][row] == _best(score[row], 20, set(range(44, 50)))


def test_h2o_accumulates_over_chunks() -> None:
    """Before anything is evicted, the scores after many chunks are those of one."""
    ids = tokens(1, 48)
    attentions, _ = _eager_attention(ids)
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(48)")
    chunked(model, cache, ids, None, [13, 1, 1, 20, 13])
    layer = _layers(cache)[0]
    slots, score = layer.body.slots(), layer.body.score()
    expected = _reduced(attentions[0].sum(2), "mean")[0]
    for head in range(2):
        present = slots[head] >= 0
        torch.testing.assert_close(score[head][present], expected[head][slots[head][present]], atol=1e-4, rtol=1e-4)


def test_tova_keeps_what_the_last_query_looks_at() -> None:
    ids = tokens(2, 50)
    attentions, _ = _eager_attention(ids)
    kept = _kept_after_one_chunk("tova(20)", ids)
    for layer, attention in enumerate(attentions):
        score = attention[:, :, -1].mean(1)
        for sequence in range(2):
            expected = _best(score[sequence], 20, set())
            assert kept[layer][2 * sequence] == expected
            assert kept[layer][2 * sequence + 1] == expected


@pytest.mark.parametrize(("pool", "how"), [("max", "mean"), ("mean", "max")])
def test_snapkv_pools_what_its_window_looks_at(pool: str, how: str) -> None:
    ids = tokens(2, 50)
    attentions, _ = _eager_attention(ids)
    kept = _kept_after_one_chunk(f"snapkv(24, window=8, kernel=5, pool={pool}, group={how})", ids)
    for layer, attention in enumerate(attentions):
        score = _reduced(attention[:, :, -8:].sum(2), how).flatten(0, 1)
        if pool == "max":
            pooled = F.max_pool1d(score[:, None], 5, 1, 2)[:, 0]
        else:
            pooled = F.avg_pool1d(score[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
        for row in range(4):
            expected = _best(pooled[row], 24, set(range(42, 50)))
            if pool == "mean":
                assert kept[layer][row] == expected
            else:  # a maximum is shared by neighbours, so which of them are kept at the edge is free
                assert sorted(pooled[row][kept[layer][row]].tolist()) == pytest.approx(
                    sorted(pooled[row][expected].tolist()), rel=1e-4
                )
                assert set(range(42, 50)) <= set(kept[layer][row])


def test_l2norm_keeps_keys_of_small_norm() -> None:
    ids = tokens(2, 50)
    _, keys = _eager_attention(ids)
    kept = _kept_after_one_chunk("l2norm(20, sink=2, recent=3, skip=0)", ids)
    for layer, k in enumerate(keys):
        norms = k.norm(dim=-1).flatten(0, 1)
        for row in range(4):
            assert kept[layer][row] == _best(-norms[row], 20, {0, 1, 47, 48, 49})


def test_window_keeps_the_last_and_sink_window_the_first_too() -> None:
    ids = tokens(1, 50)
    assert _kept_after_one_chunk("window(12)", ids)[0] == [list(range(38, 50))] * 2
    assert _kept_after_one_chunk("sink_window(sink=3, window=9)", ids)[0] == [[0, 1, 2, *range(41, 50)]] * 2


def test_random_depends_on_the_seed_and_not_on_the_chunks() -> None:
    ids = tokens(2, 64)

    def kept(plan: str, sizes: list[int]) -> list[list[list[int]]]:
        model = sharp_model()
        cache = kvfold.cache(model, plan)
        chunked(model, cache, ids, None, sizes)
        return [layer.kept_slots() for layer in _layers(cache)]

    once = kept("random(16, recent=4, sink=2)", [64])
    assert once == kept("random(16, recent=4, sink=2)", [64])
    assert once == kept("random(16, recent=4, sink=2)", [20, 1, 1, 30, 12])
    assert once != kept("random(16, recent=4, sink=2, seed=1)", [64])
    assert once[0][0] != once[0][1], "heads draw for themselves"
    assert once[0] != once[1], "and so do layers"
    assert once[0][:2] == once[0][2:], "a sequence's choice does not depend on its place in the batch"


def test_padded_queries_give_no_attention() -> None:
    """Padding between two turns asks nothing: scores are those of each row alone."""
    model = sharp_model()
    rows = [(tokens(1, 20, seed=1)[0], tokens(1, 9, seed=2)[0]), (tokens(1, 20, seed=3)[0], tokens(1, 4, seed=4)[0])]
    ids_2, mask_2 = left_pad([second for _, second in rows])
    ids = torch.cat([torch.stack([first for first, _ in rows]), ids_2], 1)
    mask = torch.cat([torch.ones(2, 20, dtype=torch.long), mask_2], 1)
    cache = kvfold.cache(model, "h2o(60)")
    chunked(model, cache, ids, mask, [20, 9])
    alone = kvfold.cache(model, "h2o(60)")
    chunked(model, alone, torch.cat(rows[1])[None], None, [20, 4])
    mine, theirs = _layers(cache)[0].body, _layers(alone)[0].body
    for head in range(2):
        here, there = mine.slots()[2 + head] >= 0, theirs.slots()[head] >= 0
        torch.testing.assert_close(mine.score()[2 + head][here], theirs.score()[head][there], atol=1e-4, rtol=1e-4)
