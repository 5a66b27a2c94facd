"""Every policy keeps what its paper's formula says, worked out again from transformers' own attention weights."""

import pytest
import torch
import torch.nn.functional as F
from oracle import chunked, left_pad, sharp_model, tokens

import kvfold
from kvfold.candidates import Candidates, empty_chunk
from kvfold.keep.base import KeepContext, Moment
from kvfold.keep.sieve import Sieve
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan


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
    kept = _kept_after_one_chunk(f"snapkv(24, window=8, kernel=5, sink=0, pool={pool}, group={how})", ids)
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


def _queries_and_cache(
    ids: torch.Tensor,
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]], torch.nn.Module]:
    """Queries before their rotation, `[B, Hq, S, D]`, and keys and values `[B, Hkv, S, D]` of each layer."""
    model = sharp_model()
    queries: list[torch.Tensor] = []
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: queries.append(out))
    with torch.no_grad():
        held = model(ids, use_cache=True).past_key_values.layers
    return [q.unflatten(-1, (4, 16)).transpose(1, 2) for q in queries], [(x.keys, x.values) for x in held], model


@pytest.mark.parametrize("how", ["mean", "max"])
def test_scissorhands_counts_queries_that_give_more_than_average(how: str) -> None:
    ids = tokens(2, 50)
    attentions, _ = _eager_attention(ids)
    kept = _kept_after_one_chunk(f"scissorhands(20, window=8, recent=4, group={how})", ids)
    for layer, attention in enumerate(attentions):
        by_head = torch.stack([_reduced(attention[:, :, q], how) for q in range(42, 50)], 2)
        hits = (by_head * torch.arange(43, 51)[:, None] >= 1).float().sum(2).flatten(0, 1)
        for row in range(4):
            assert kept[layer][row] == _best(hits[row], 20, set(range(46, 50)))


def test_keydiff_keeps_keys_far_from_the_mean_direction() -> None:
    ids = tokens(2, 50)
    _, keys = _eager_attention(ids)
    kept = _kept_after_one_chunk("keydiff(20, sink=2, recent=3)", ids)
    for layer, k in enumerate(keys):
        direction = F.normalize(k[:, :, 2:], dim=-1)
        score = F.pad(-F.cosine_similarity(direction, direction.mean(2, keepdim=True), dim=-1), (2, 0)).flatten(0, 1)
        for row in range(4):
            assert kept[layer][row] == _best(score[row], 20, {0, 1, 47, 48, 49})


def test_lagkv_judges_each_partition_by_the_next() -> None:
    ids = tokens(2, 50)
    _, held, _ = _queries_and_cache(ids)
    kept = _kept_after_one_chunk("lagkv(29, lag=10, sink=3)", ids)
    for layer, (k, v) in enumerate(held):
        for row, (keys, values) in enumerate(zip(k.flatten(0, 1), v.flatten(0, 1), strict=True)):
            score = torch.full((50,), 2.0)  # the last whole partition and what follows is not judged
            for start in (3, 13, 23):
                judged = torch.zeros(10)
                for x in (keys, values):
                    low, high = x[start + 10 : start + 20].amin(0), x[start + 10 : start + 20].amax(0)
                    judged += ((x[start : start + 10] - low) / (high - low)).std(-1).softmax(0)
                score[start : start + 10] = judged.argsort().argsort() / 10
            assert kept[layer][row] == _best(score, 29, {0, 1, 2})


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_by_explicit_matrices(covariance: bool) -> None:
    """Statistics of the queries that the model really makes, rotations averaged as matrices."""
    ids = tokens(2, 50)
    queries, held, model = _queries_and_cache(ids)
    kept = _kept_after_one_chunk(f"expected(20, sink=2, future=40, covariance={str(covariance).lower()})", ids)
    cos, sin = model.get_decoder().rotary_emb(queries[0], torch.arange(50, 90)[None])
    swap = torch.zeros(16, 16)
    swap[:8, 8:], swap[8:, :8] = -torch.eye(8), torch.eye(8)
    turn = (cos[0, :, :, None] * torch.eye(16) + sin[0, :, :, None] * swap).mean(0)
    for layer, (q, (k, v)) in enumerate(zip(queries, held, strict=True)):
        for sequence in range(2):
            for head in range(2):
                keys = k[sequence, head, 2:]
                shares = []
                for q_head in (2 * head, 2 * head + 1):
                    seen = q[sequence, q_head, 2:] / 4  # scaled by 1 / sqrt(16)
                    logits = keys @ (turn @ seen.mean(0))
                    if covariance:
                        spread = turn @ torch.cov(seen.T, correction=0) @ turn.T
                        logits = logits + torch.einsum("ni,ij,nj->n", keys, spread, keys) / 2
                    shares.append(logits.softmax(0))
                score = F.pad(torch.stack(shares).mean(0) * v[sequence, head, 2:].norm(dim=-1), (2, 0))
                mine, best = kept[layer][2 * sequence + head], _best(score, 20, {0, 1})
                # With covariance a little is added to its diagonal, which may swap two tokens at the edge.
                assert len(set(mine) & set(best)) >= (19 if covariance else 20)


def test_kvzip_keeps_what_the_repetition_looks_at() -> None:
    ids = tokens(2, 40)
    attentions, _ = _eager_attention(torch.cat([ids, ids], 1))
    kept = _kept_after_one_chunk("kvzip(14, sink=2, heads=uniform)", ids)
    for layer, attention in enumerate(attentions):
        score = _reduced(attention[:, :, 40:, :40].amax(2), "max").flatten(0, 1)
        for row in range(4):
            assert kept[layer][row] == _best(score[row], 14, {0, 1})


def test_kvzip_leaves_no_trace_of_the_repetition() -> None:
    """Where nothing is evicted, the cache after the second pass is that of `full`."""
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (40, 23)])
    for family in ("llama", "gemma2"):
        model = sharp_model(family)
        full, again = kvfold.cache(model, "full"), kvfold.cache(model, "kvzip(100)")
        sizes = [22, 9, 1, 8]
        torch.testing.assert_close(
            chunked(model, again, ids, mask, sizes)[mask.bool()], chunked(model, full, ids, mask, sizes)[mask.bool()]
        )
        assert again.get_seq_length() == 40
        assert not again.looks_back


def test_detach_takes_the_second_pass_away() -> None:
    model = sharp_model()
    kvfold.cache(model, "kvzip(14)")
    assert model.get_decoder()._forward_hooks
    kvfold.detach(model)
    assert not model.get_decoder()._forward_hooks


def test_sieve_walks_as_the_one_by_one_algorithm() -> None:
    """Many victims at once, chosen by a sort, against a hand that walks a queue."""
    keep = Plan.parse("sieve(4, sink=1, recent=1)").keep
    assert isinstance(keep, Sieve)
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(100)")
    chunked(model, cache, tokens(1, 3), None, [3])
    layer = _layers(cache)[0]
    tokens_of_layer = Candidates(layer.body, layer.recent, empty_chunk(layer.recent))
    generator = torch.Generator().manual_seed(1)
    for trial in range(200):
        num_tokens, num_victims = 9, trial % 8 + 1
        slots = tokens_of_layer.slots = torch.randperm(20, generator=generator)[:num_tokens].int()[None]
        bits = torch.randint(0, 2, (1, num_tokens), generator=generator).float()
        hand = torch.randint(0, 21, (1,), generator=generator).int()
        free = torch.rand(1, num_tokens, generator=generator) < 0.9
        num_victims = min(num_victims, int(free.sum()))
        ctx = KeepContext(tokens_of_layer, Moment(20, [20], [1]), [0], [num_tokens], [0], 1, 0, 0, {"hand": hand.clone()})
        rank = keep.rank(bits, ctx).masked_fill(~free, torch.inf)
        victims = rank[0].argsort(stable=True)[:num_victims]
        stays = torch.ones(1, num_tokens, dtype=torch.bool)
        stays[0, victims] = False
        after = keep.settle(bits, stays, free, ctx)

        queue = sorted((int(slots[0, i]), i) for i in range(num_tokens) if free[0, i])
        visited, gone = bits[0].tolist(), []
        at = next((n for n, (slot, _) in enumerate(queue) if slot >= int(hand)), 0)
        while len(gone) < num_victims:
            slot, i = queue[at % len(queue)]
            if visited[i]:
                visited[i] = 0.0
                at += 1
            else:
                gone.append(i)
                queue.remove((slot, i))
                position = slot + 1
                at = next((n for n, (s, _) in enumerate(queue) if s >= position), 0) if queue else 0
        assert sorted(gone) == sorted(victims.tolist())
        assert int(ctx.state["hand"]) == position
        kept = [i for i in range(num_tokens) if i not in gone]
        assert [after[0, i].item() for i in kept] == [visited[i] for i in kept]


def test_sieve_visits_by_the_even_share() -> None:
    ids = tokens(1, 30)
    attentions, _ = _eager_attention(ids)
    model = sharp_model()
    cache = kvfold.cache(model, "sieve(100, sink=0)")
    chunked(model, cache, ids, None, [18, 1, 11])
    layer = _layers(cache)[0]
    expected = (_reduced(attentions[0].transpose(1, 2).flatten(0, 1), "mean") * torch.arange(1, 31)[:, None, None] >= 1).any(0)
    slots, score = layer.body.slots(), layer.body.score()
    for head in range(2):
        present = slots[head] >= 0
        assert score[head][present].bool().tolist() == expected[head][slots[head][present].long()].tolist()


def test_l2norm_leaves_the_first_layers_alone() -> None:
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, "l2norm(12)")
    chunked(model, cache, tokens(1, 50), None, [50])
    assert [len(layer.kept_slots()[0]) for layer in _layers(cache)] == [50, 50, 12, 12]


@pytest.mark.parametrize("plan", ["h2o(70)", "tova(70)", "snapkv(70, window=8)", "sieve(70)", "scissorhands(70)", "keydiff(70)",
                                  "random(70)", "l2norm(70, skip=0)", "lagkv(70, lag=9)", "expected(70)", "window(70)",
                                  "h2o(70) | int8(k_axis=token)", "tova(70) | fp8"])  # fmt: skip
def test_one_token_in_place_is_what_the_general_path_does(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (120, 96)])
    sizes = [64, 26, *[1] * 30]

    def run() -> tuple[torch.Tensor, list[list[list[int]]]]:
        model = sharp_model()
        cache = kvfold.cache(model, plan)
        logits = chunked(model, cache, ids, mask, sizes)[mask.bool()]
        return logits, [layer.kept_slots() for layer in _layers(cache)]

    monkeypatch.setattr(LayerCache, "turnover", lambda self, padding: None)
    in_place = [0]
    replace = Candidates.replace
    monkeypatch.setattr(Candidates, "replace", lambda *a: (in_place.__setitem__(0, in_place[0] + 1), replace(*a))[1])
    fast = run()
    assert in_place[0] >= 40, "the fast path was not taken"
    monkeypatch.setattr(Candidates, "one_can_replace_one", False)
    slow = run()
    assert fast[1] == slow[1]
    torch.testing.assert_close(fast[0], slow[0], atol=1e-4, rtol=1e-4)
