"""LoRC: coordinates in the subspaces of the projections, keys before their rotation."""

import pytest
import torch
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from sites import RandomLayer, site

import kvfold
from kvfold.errors import ModelError, PlanError
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.store.lorc import LoRC


def _codec(plan: str, head_dim: int = 64, num_kv_heads: int = 3):
    return Plan.parse(plan).store.codec(site(head_dim, num_kv_heads=num_kv_heads))


def _written(num_rows: int, num_tokens: int, head_dim: int = 64, num_kv_heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, before their rotation, and values that the random layer's projections make of random inputs."""
    layer = RandomLayer(head_dim, num_kv_heads).projections()
    x = torch.randn(num_rows, num_tokens, 4 * head_dim, generator=torch.Generator().manual_seed(2))
    heads = torch.arange(num_rows) % num_kv_heads
    assert layer.k_bias is not None
    assert layer.v_bias is not None
    return x @ layer.k[heads].mT + layer.k_bias[heads, None], x @ layer.v[heads].mT + layer.v_bias[heads, None]


def test_all_dimensions_lose_nothing() -> None:
    codec = _codec("lorc(100%, last=100%)")
    k, v = _written(6, 20)
    positions = torch.arange(6)[:, None] * 1000 + torch.arange(20)
    decoded_k, decoded_v = codec.decode(codec.encode(k, v, positions))
    torch.testing.assert_close(decoded_k, k, atol=0.05, rtol=2e-3)  # half precision, of numbers up to 60
    torch.testing.assert_close(decoded_v, v, atol=0.05, rtol=2e-3)


@pytest.mark.parametrize("share", [25, 50, 75])
def test_what_is_lost_lies_in_the_smallest_directions(share: int) -> None:
    """The error is the part of W x in the left singular directions that are left out, for each head its own."""
    codec = _codec(f"lorc({share}%, last={share}%)")
    layer = RandomLayer(64, 3).projections()
    k, v = _written(6, 20)
    turned = codec.k.rope.rotate(k, torch.arange(20))
    decoded_k, decoded_v = codec.decode(codec.encode(turned, v, torch.arange(20)))
    for row in range(6):
        for x, y, weight, bias in (
            (k[row], codec.k.rope.rotate(decoded_k, -torch.arange(20))[row], layer.k[row % 3], layer.k_bias[row % 3]),
            (v[row], decoded_v[row], layer.v[row % 3], layer.v_bias[row % 3]),
        ):
            left_out = torch.linalg.svd(weight).U[:, 64 * share // 100 :]
            expected = ((x - bias) @ left_out).square().sum(-1)
            torch.testing.assert_close((x - y).square().sum(-1), expected, rtol=0.02, atol=0.05)


def test_keys_are_alike_wherever_they_stand() -> None:
    """RoPE only turns a key, so what is kept of it must not depend on its position."""
    codec = _codec("lorc(50%, codes=int8)")
    k, v = _written(3, 20)
    decoded = []
    for start in (0, 5000):
        positions = start + torch.arange(20)
        fields = codec.encode(codec.k.rope.rotate(k, positions), v, positions)
        decoded.append(codec.k.rope.rotate(codec.decode(fields)[0], -positions))
    torch.testing.assert_close(decoded[0], decoded[1], atol=0.5, rtol=0)  # a code of 8 bits may fall to the other side


def test_ranks_fall_from_the_first_layer_to_the_last() -> None:
    store = Plan.parse("lorc(75%, last=25%)").store
    assert isinstance(store, LoRC)
    assert [store.rank_of(Site(64, layer=i, num_layers=5)) for i in range(5)] == [48, 40, 32, 24, 16]
    assert store.rank_of(Site(64)) == 48


@pytest.mark.parametrize("plan", ["lorc(100%, last=100%)", "protect(sink=2, window=9) | lorc(100%, last=100%)"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_model_does_not_notice_when_all_dimensions_are_kept(plan: str, family: str) -> None:
    model = sharp_model(family)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (90, 57)])
    sizes = [40, 30, 1, 1, 18]
    full = chunked(model, kvfold.cache(model, "full"), ids, mask, sizes).log_softmax(-1)
    cache = kvfold.cache(model, plan)
    mine = chunked(model, cache, ids, mask, sizes).log_softmax(-1)
    divergence = (full.exp() * (full - mine)).sum(-1)[mask.bool()]
    assert divergence.mean() < 1e-4
    assert cache.nbytes == held_bytes(cache, but=model)


def test_memory_is_freed_and_bases_are_counted() -> None:
    model = sharp_model(head_dim=64, num_hidden_layers=3)
    full, cache = (kvfold.cache(model.to(torch.bfloat16), plan) for plan in ("full", "lorc(50%, last=25%, codes=int8)"))
    bases = sum(x.nbytes for _, name, x in cache.tensors() if name.startswith("codec"))
    assert bases == 2 * 2 * 64 * (32 + 24 + 16) * 2
    for each in (full, cache):
        chunked(model, each, tokens(1, 1500), None, [500] * 3)
    # A coordinate is a byte, and a token has a scale and a zero for each of K and V, and a position.
    rows = sum(2 * rank + 2 * 3 + 4 for rank in (32, 24, 16)) / (3 * 2 * 64 * 2)
    assert cache.nbytes - bases < (rows + 0.03) * full.nbytes


@pytest.mark.parametrize("keep", ["h2o(96KiB)", "window(96KiB)"])
def test_a_budget_of_bytes_has_room_for_the_bases(keep: str) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, f"{keep} | lorc")
    for size in (300, 300, 1, 1):
        with torch.no_grad():
            model(tokens(1, size), past_key_values=cache)
        assert 0 < held_bytes(list(cache.layers), but=model) <= 96 * 1024
    assert cache.nbytes > 60 * 1024


def test_positions_that_are_not_those_of_generate_are_refused() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "lorc")
    with torch.no_grad(), pytest.raises(ModelError, match="must count the tokens without padding"):
        model(tokens(1, 9), position_ids=torch.arange(3, 12)[None], past_key_values=cache)


def test_models_that_can_not_be_served() -> None:
    with pytest.raises(PlanError, match="normalises its keys"):
        kvfold.cache(sharp_model("qwen3"), "lorc")
    with pytest.raises(ModelError, match="weights of k_proj"):
        kvfold.cache(sharp_model("phi3"), "lorc")
    with pytest.raises(PlanError, match="belongs to no model"):
        Plan.parse("lorc").store.codec(Site(64))
    with pytest.raises(PlanError, match="holds V in whole blocks"):
        kvfold.cache(sharp_model(), "mixed(k=lorc, v=int4(v_axis=channel))")
    with pytest.raises(PlanError, match="writes whole blocks"):
        kvfold.cache(sharp_model(num_hidden_layers=4), "quest(25%) | lorc")
    with pytest.raises(PlanError, match="minicache merges directions"):
        kvfold.cache(sharp_model(num_hidden_layers=4), "lorc | minicache(start=50%)")
    assert isinstance(kvfold.cache(sharp_model(), "mixed(k=lorc, v=int4)").layers[0], LayerCache)


def test_a_model_without_biases_has_none() -> None:
    codec = kvfold.cache(sharp_model(), "lorc").layers[0].codec
    assert set(codec.constants()) == {"k.basis", "v.basis"}
