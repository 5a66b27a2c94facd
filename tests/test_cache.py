"""Where tokens are in a layer: dense sinks, dense recent ones, codes between; and what the cache says of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle, chunked, compare, left_pad, sharp_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import kvfold
from kvfold.attention.dispatch import kernel_name
from kvfold.catalog import STRATEGIES
from kvfold.errors import PlanError
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


def _own_keys(ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values `[B * Hkv, S, D]` of each layer, as transformers caches them."""
    cache = DynamicCache()
    chunked(sharp_model(), cache, ids, None, [ids.shape[1]])
    return [(layer.keys.flatten(0, 1), layer.values.flatten(0, 1)) for layer in cache.layers]


@pytest.mark.parametrize("sizes", [[300], [3, 9, 100, 1, 1, 120, 66]], ids=str)
@pytest.mark.parametrize(
    ("plan", "sink", "window", "block"),
    [
        ("protect(sink=16, window=32) | int8", 16, 32, 64),
        ("protect(sink=16, window=32) | int8(k_axis=token)", 16, 32, 1),
        ("protect(sink=5) | fp8", 5, 0, 1),
        ("kivi(int4, residual=40)", 0, 40, 64),
        ("int4(sink=4, window=10)", 4, 10, 64),
        ("protect(sink=0, window=0) | int4", 0, 0, 64),
    ],
)
def test_protected_tokens_are_dense_and_exact(plan: str, sink: int, window: int, block: int, sizes: list[int]) -> None:
    """The first `sink` and at least the last `window` are what the model made; fewer than a block more are."""
    ids = tokens(2, sum(sizes))
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    chunked(model, cache, ids, None, sizes)
    layer = _layers(cache)[0]
    assert layer.sink.slots.tolist() == [list(range(sink))] * 4
    num_recent = layer.recent.width
    assert window <= num_recent < window + block
    assert layer.recent.slots.tolist() == [list(range(300 - num_recent, 300))] * 4
    assert layer.body.counts().tolist() == [300 - sink - num_recent] * 4
    k, v = _own_keys(ids)[0]
    # A few tokens at a time are multiplied by other code than a prompt, in another order.
    torch.testing.assert_close(layer.sink.k, k[:, :sink], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.recent.k, k[:, 300 - num_recent :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.recent.v, v[:, 300 - num_recent :], atol=1e-5, rtol=1e-5)
    decoded, _, slots = layer.body.dense()
    in_body = slots[0] >= 0
    error = (decoded[:, in_body] - k[:, slots[0][in_body]]).norm() / k.norm()
    assert 0 < error < 0.2


def test_hybrid_gives_edge_layers_another_codec() -> None:
    model = sharp_model(num_hidden_layers=5)
    cache = kvfold.cache(model, "hybrid(edge=2, edge_store=int8) | int4")
    chunked(model, cache, tokens(1, 140), None, [140])
    widths = [layer.body.pool.fields["k.codes"].shape[-1] for layer in _layers(cache)]
    assert widths == [64, 64, 32, 64, 64], "bytes of a channel's 64 codes"


def test_hybrid_counts_only_the_layers_that_it_serves() -> None:
    model = sharp_model("gemma2", num_hidden_layers=6)
    cache = kvfold.cache(model, "hybrid(edge=1) | int4")
    chunked(model, cache, tokens(1, 140), None, [140])
    stores = [layer.plan.store.name for layer in _layers(cache)]
    assert stores == ["dense", "int4", "dense"]


@pytest.mark.parametrize("kernel", ["reference", "compiled"])
@pytest.mark.parametrize("plan", ["int8", "int4", "int2", "fp8", "kivi(int4)", "protect(sink=16, window=32) | int4", "mixed"])
def test_attention_is_over_what_was_decoded(plan: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded path through the whole model, against plain attention over decoded vectors.

    The compiled kernels may round queries (tests/rounding.py), which sharp attention magnifies: the mean is bounded.
    """
    if kernel == "reference":
        monkeypatch.setenv("KVFOLD_CPU", "off")
    model = sharp_model()
    cache = kvfold.cache(model, plan)
    oracle = Oracle.of(model, cache)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (260, 181)])
    for mine, theirs in compare(model, cache, oracle, ids, mask, [150, 70, 1, 30, 1, 8], decoded=True):
        if kernel == "reference":
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
        else:
            assert (mine - theirs).square().mean().sqrt() < 0.02 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_in_half_precision(dtype: torch.dtype) -> None:
    """As near to float32 as transformers' own attention in this type is."""
    ids = tokens(1, 80)
    exact_model = sharp_model(gain=4.0)
    with torch.no_grad():
        exact = exact_model(ids).logits
        theirs = sharp_model(gain=4.0).to(dtype)(ids).logits.float()
    model = sharp_model(gain=4.0).to(dtype)
    cache = kvfold.cache(model, "full")
    mine = chunked(model, cache, ids, None, [50, 1, 29]).float()
    assert _layers(cache)[0].body.pool.fields["k.x"].dtype == dtype
    assert (mine - exact).norm() <= 1.2 * (theirs - exact).norm()


class _LargestFloat(TorchDispatchMode):
    """Notes the largest floating point tensor that is made inside it."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("name", sorted(n for n, s in STRATEGIES.items() if s.changes == "how tokens are held"))
def test_no_step_decodes_the_whole_cache(name: str) -> None:
    """A step, a reordering and a crop make no tensor as large as half of the decoded keys."""
    model = sharp_model(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    cache = kvfold.cache(model, name)
    chunked(model, cache, tokens(2, 4000), None, [1000] * 4)
    decoded = 4 * 4000 * 32
    with torch.no_grad(), _LargestFloat() as seen:
        for _ in range(3):
            model(tokens(2, 1), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        model(tokens(2, 1), past_key_values=cache)
        cache.crop(-70)
        model(tokens(2, 1), past_key_values=cache)
    # A pool that grows copies its fields; those of some codecs are floats, though fewer.
    fields = [x.numel() for layer in _layers(cache) for x in layer.body.pool.fields.values() if x.is_floating_point()]
    assert 0 < seen.largest <= max([decoded / 2, *fields])


def test_a_reordered_cache_shares_what_beams_have_in_common() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int8(sink=0, k_axis=token)")
    chunked(model, cache, tokens(1, 640), None, [640])
    before = cache.nbytes
    cache.batch_repeat_interleave(4)
    with torch.no_grad():
        model(tokens(4, 1), past_key_values=cache)
    assert cache.nbytes < 1.6 * before


def test_the_cache_is_what_transformers_expects() -> None:
    model = sharp_model("gemma2")
    cache = kvfold.cache(model, "int4")
    assert cache.get_seq_length() == 0
    assert cache.is_sliding == [True, False]
    assert not cache.is_compileable
    chunked(model, cache, tokens(3, 9), None, [9])
    assert cache.get_seq_length() == 9
    assert _layers(cache)[0].batch_size == 3
    assert cache.is_croppable
    assert str(cache.plan) == "int4"
    assert cache.kernel == kernel_name()


def test_memory_prints_its_parts() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "protect(sink=2, window=4) | int4")
    chunked(model, cache, tokens(1, 200), None, [200])
    lines = str(cache.memory()).splitlines()
    assert lines[0].replace(",", "").split()[0] == str(cache.nbytes)
    assert "200 tokens" in lines[0]
    parts = cache.memory().by_component()
    assert {"sink.k", "recent.v", "body.k.codes", "body.v.scale", "body.table"} <= set(parts)
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert parts["body.k.codes"] >= 2 * 2 * 128 * 8


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_of_the_catalog_runs_on_a_padded_batch(name: str) -> None:
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, name)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (130, 3)])
    full = chunked(model, kvfold.cache(model, "full"), ids, mask, [130])
    mine = chunked(model, cache, ids, mask, [130])
    strict = getattr(Plan.parse(STRATEGIES[name].plan).keep, "strict", False)
    lends = "share(" in STRATEGIES[name].plan  # half of the layers have lost their own tokens at once
    if not strict and not lends:  # the first chunk sees all of itself, dense
        torch.testing.assert_close(mine[mask.bool()], full[mask.bool()], atol=1e-4, rtol=1e-4)
    new = torch.ones(2, 2, dtype=torch.long)
    ids, mask = torch.cat([ids, tokens(2, 2)], 1), torch.cat([mask, new], 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1)[:, 130:]
        out = model(ids[:, 130:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert out.isfinite().all()


def test_a_chunk_of_nothing_but_padding_is_nothing() -> None:
    model = sharp_model()
    for plan in ("full", "int4", "h2o(8)", "sink_window(sink=2, window=6)"):
        ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (20, 11)])
        pad = torch.zeros(2, 6, dtype=torch.long)
        ids, mask = torch.cat([pad, ids], 1), torch.cat([pad, mask], 1)
        mine = chunked(model, kvfold.cache(model, plan), ids, mask, [4, 9, 13])
        whole = chunked(model, kvfold.cache(model, plan), ids[:, 6:], mask[:, 6:], [7, 13])
        assert mine.isfinite().all()
        torch.testing.assert_close(mine[mask.bool()], whole[mask[:, 6:].bool()], atol=1e-4, rtol=1e-4)


def test_positions_that_can_not_be_re_indexed_are_refused() -> None:
    from kvfold.errors import ModelError

    model = sharp_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ModelError, match="reindex=false"):
        kvfold.cache(model, "sink_window(4, 60)")
    kvfold.cache(model, "sink_window(4, 60, reindex=false)")


def test_a_budget_of_too_few_bytes_says_how_many_it_takes() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "h2o(1KiB)")
    with pytest.raises(PlanError, match=r"1KiB is too little for this plan: it needs \d+\.\dMiB at least"):
        chunked(model, cache, tokens(1, 9), None, [9])


def test_a_plan_may_be_given_as_text_name_or_plan() -> None:
    model: PreTrainedModel = sharp_model()
    plans = [kvfold.cache(model, given).plan for given in ("int4", "selective_int4", Plan.parse("h2o(25%)"))]
    assert [str(plan) for plan in plans] == ["int4", "protect(sink=16, window=32) | int4", "h2o(25%)"]


def test_transformers_own_cache_is_measured_as_it_is(tmp_path: Path) -> None:
    model = sharp_model(num_hidden_layers=3)
    before = model.config._attn_implementation
    ids = tokens(2, 40)
    with torch.no_grad():
        theirs = model(ids, use_cache=True)
        kvfold.cache(model, "full")
        cache = kvfold.cache(model, "transformers")
        mine = model(ids, past_key_values=cache)
    assert model.config._attn_implementation == before
    assert torch.equal(mine.logits, theirs.logits)
    assert cache.kernel == "transformers"
    assert cache.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.past_key_values.layers)
    with pytest.raises(PlanError, match="plan 'full'"):
        cache.save(tmp_path / "cache.safetensors")
