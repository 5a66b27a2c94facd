"""Keys without their projection's bias."""

import pytest
import torch
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from sites import RandomLayer, site

import kvfold
from kvfold.errors import PlanError
from kvfold.plan import Plan
from kvfold.site import Site

PLANS = ["delta(int8(k_axis=token))", "delta(turboquant(3))", "delta(fp8)"]


@pytest.mark.parametrize("plan", PLANS)
def test_the_codes_are_those_of_the_difference(plan: str) -> None:
    """Whatever the positions, and a bias a thousand times as large changes no code."""
    store = Plan.parse(plan).store
    codec = store.codec(site(64, num_kv_heads=3))
    layer = RandomLayer(64, 3)
    bias = layer.projections().k_bias
    assert bias is not None
    positions = torch.arange(6)[:, None] * 700 + torch.arange(20)
    differences = torch.randn(6, 20, 64)
    turned = layer.rope().rotate(bias.repeat(2, 1)[:, None].expand(-1, 20, -1), positions)
    fields = codec.encode(differences + turned, differences, positions)
    inner = store.codes.codec(site(64, num_kv_heads=3)).k
    expected = inner.decode(inner.encode(differences)) + turned
    torch.testing.assert_close(codec.decode(fields)[0], expected, atol=0.05, rtol=0)  # borders fall to either side
    assert (codec.decode(fields)[0] - expected).abs().mean() < 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_products_are_those_of_the_decoded_keys(plan: str) -> None:
    codec = Plan.parse(plan).store.codec(site(64, num_kv_heads=2)).k
    fields = codec.encode_at(torch.randn(4, 3, 64, 64), torch.arange(64) + torch.arange(3)[:, None] * 64)
    q, p = torch.randn(4, 3, 5, 64), torch.rand(4, 3, 5, 64)
    decoded = codec.decode(fields)
    torch.testing.assert_close(codec.dot(codec.fold_query(q), fields), q @ decoded.mT, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(codec.unfold_output(codec.combine(p, fields)), p @ decoded, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("channels", [(26, 29, 31), (1, 3, 6)], ids=["slow", "fast"])
def test_large_biases_cost_little_wherever_they_are(channels: tuple[int, ...]) -> None:
    """Biases of ±150 in channels that RoPE hardly turns, and in those that it turns fast: there even int4 per channel fails."""
    model = sharp_model("qwen2", gain=4.0, head_dim=64, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in range(2):
                layer.self_attn.k_proj.bias[[64 * head + c for c in channels]] = torch.tensor([150.0, -150.0, 150.0])
    ids = tokens(1, 384)

    def kl(plan: str) -> float:
        full, mine = (
            chunked(model, kvfold.cache(model, each), ids, None, [256, *[32] * 4])[0, 256:].log_softmax(-1)
            for each in ("full", plan)
        )
        return float((full.exp() * (full - mine)).sum(-1).mean())

    for codes in ("int4(k_axis=token, rotate=kv)", "turboquant(4)", "fp8"):
        assert kl(f"delta({codes})") < 0.25 * kl(codes)
    if channels[0] == 1:
        assert kl("delta(int4(k_axis=token, rotate=kv))") < 0.25 * kl("int4")


@pytest.mark.parametrize(
    "plan", ["delta(int8(k_axis=token))", "h2o(60) | delta(fp8)", "protect(window=5) | delta(turboquant(4))"]
)
def test_bytes_are_counted_and_rows_are_apart(plan: str) -> None:
    """Sequences of other lengths, padded: each has the positions of its own."""
    model = sharp_model("qwen2")
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (150, 97)])
    cache = kvfold.cache(model, plan)
    both = chunked(model, cache, ids, mask, [100, 30, 1, 1, 18])
    assert cache.nbytes == held_bytes(cache, but=model)
    alone = chunked(model, kvfold.cache(model, plan), ids[1:, 53:], None, [47, 30, 1, 1, 18])
    torch.testing.assert_close(both[1, 53:], alone[0], atol=2e-3, rtol=2e-3)


def test_what_can_not_work_is_refused() -> None:
    with pytest.raises(PlanError, match="no bias to take out; write int4 alone"):
        kvfold.cache(sharp_model(), "delta(int4(k_axis=token))")
    with pytest.raises(PlanError, match="no bias to take out"):
        kvfold.cache(sharp_model("qwen3"), "delta(fp8)")
    with pytest.raises(PlanError, match=r"one by one, as .* holds whole blocks"):
        kvfold.cache(sharp_model("qwen2"), "delta(int4)")
    with pytest.raises(PlanError, match="belongs to no model"):
        Plan.parse("delta(fp8)").store.codec(Site(64))
