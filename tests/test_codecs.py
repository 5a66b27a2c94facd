"""Codecs: attention on codes equals attention over what they decode to, and decoding is as near as the formulas say."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sites import site
from vectors import (
    HEAD_DIMS,
    KINDS,
    affines,
    dense,
    fitted,
    floats,
    outliers,
    residuals,
    size,
    subspaces,
    tables,
    values,
    whole_blocks,
)  # fmt: skip

from kvfold.plan import Plan
from kvfold.registry import methods
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import Store, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.rotation import Rotated
from kvfold.store.table import Table


@st.composite
def codecs(draw: st.DrawFn) -> tuple[TensorCodec, int]:
    """Any codec, rotated or not, and a head dim."""
    head_dim = draw(HEAD_DIMS)
    codec: TensorCodec = draw(st.one_of(affines, tables, fitted, outliers, subspaces, residuals, floats, dense))
    rotation = draw(st.sampled_from([None, "hadamard", "random"]))
    return (Rotated(codec, head_dim, rotation) if rotation else codec), head_dim


def _inner(codec: TensorCodec) -> TensorCodec:
    return codec.inner if isinstance(codec, Rotated) else codec


@given(codecs(), st.sampled_from(KINDS), st.sampled_from([0, 1, 5, 64, 200]), st.integers(1, 5), st.integers(0, 99))
@example((Rotated(Affine(4, "token", 64, False, "log8"), 96), 96), "positive", 256, 1, 1)
@settings(max_examples=250)
def test_attention_on_codes_equals_attention_on_what_they_decode_to(
    chosen: tuple[TensorCodec, int], kind: str, num_tokens: int, num_queries: int, seed: int
) -> None:
    codec, head_dim = chosen
    num_tokens = whole_blocks(codec, num_tokens)
    x = values(kind, 2, 3, num_tokens, head_dim, seed=seed)
    if kind == "1e3" and isinstance(_inner(codec), DenseCodec):
        x = x / 10  # a rotation of them would not fit into a half
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, num_queries, head_dim, generator=generator)
    p = torch.rand(2, 3, num_queries, num_tokens, generator=generator)
    fields = codec.encode(x)
    decoded = codec.decode(fields)
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()

    dots = codec.dot(codec.fold_query(q), fields)
    sums = codec.unfold_output(codec.combine(p, fields))
    assert dots.shape == (2, 3, num_queries, num_tokens)
    assert sums.shape == (2, 3, num_queries, head_dim)
    exact_q, exact_p, exact_x = q.double(), p.double(), decoded.double()
    # Rounding is relative to the sizes that are added. A rotation mixes all channels, and an offset that cancels counts too.
    q_size, x_size = (exact_q.norm(dim=-1), exact_x.norm(dim=-1))
    extent = float(decoded.abs().amax()) * math.sqrt(head_dim) + 1e-3 if num_tokens else 0.0
    dot_bound = 1e-6 * (q_size[..., None] * (2 * x_size[..., None, :] + extent)) + 1e-12
    assert ((dots.double() - exact_q @ exact_x.mT).abs() <= dot_bound).all()
    # Channels that a rotation has made alike are rounded alike, and turned back their errors add up rather than cancel: with
    # D = 96 and values around 5, sums of 4110 that are off by 0.005 in 64 channels make 500 off by 0.026.
    together = math.sqrt(head_dim) / 2 if isinstance(codec, Rotated) else 1.0
    sum_bound = 2e-6 * exact_p.sum(-1, keepdim=True) * extent * together + 1e-12
    assert ((sums.double() - exact_p @ exact_x).abs() <= sum_bound).all()


@given(codecs())
def test_no_blocks_are_encoded_to_no_blocks(chosen: tuple[TensorCodec, int]) -> None:
    codec, head_dim = chosen
    fields = codec.encode(torch.zeros(3, 0, codec.block, head_dim))
    assert all(x.shape[:2] == (3, 0) for x in fields.values())
    assert codec.decode(fields).shape == (3, 0, codec.block, head_dim)
    assert codec.dot(torch.zeros(3, 0, 2, head_dim), fields).shape == (3, 0, 2, codec.block)
    assert codec.combine(torch.zeros(3, 0, 2, codec.block), fields).shape == (3, 0, 2, head_dim)


@given(codecs(), st.sampled_from(["normal", "constant channels"]))
def test_a_rotation_adds_no_error(chosen: tuple[TensorCodec, int], kind: str) -> None:
    """The error of a rotated codec has the norm of its inner codec's error on rotated vectors."""
    codec, head_dim = chosen
    if not isinstance(codec, Rotated):
        codec = Rotated(codec, head_dim)
    x = values(kind, 2, whole_blocks(codec, 7), head_dim)
    turned = x @ codec.matrix()
    inner_error = (codec.inner.decode(codec.inner.encode(turned)) - turned).norm(dim=-1)
    error = (codec.decode(codec.encode(x)) - x).norm(dim=-1)
    torch.testing.assert_close(error, inner_error, rtol=1e-3, atol=1e-4 * float(x.abs().amax()))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), HEAD_DIMS)
def test_dense_returns_what_it_was_given(dtype: torch.dtype, head_dim: int) -> None:
    codec = DenseCodec(dtype)
    x = values("normal", 2, 5, head_dim).to(dtype)
    assert torch.equal(codec.decode(codec.encode(x)), x.float())


@given(st.one_of(affines, tables), HEAD_DIMS)
def test_tokens_can_be_moved_alone_where_the_unit_is_the_token(codec: Affine | Table, head_dim: int) -> None:
    if codec.unit == "block":
        return
    x = values("normal", 3, 20, head_dim)
    fields = codec.encode(x)
    order = torch.randperm(20)
    moved = {name: tensor[:, order] for name, tensor in fields.items()}
    # Not bit for bit: exp2 of a scale's code rounds one way in a vector register and another beside it.
    torch.testing.assert_close(codec.decode(moved), codec.decode(fields)[:, order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("plan", "bits"), [("int8", 8.5), ("int4", 4.5), ("int2", 2.5), ("fp8", 8.25), ("dense", 16)])
def test_bits_an_element_of_the_defaults(plan: str, bits: float) -> None:
    codec = Plan.parse(plan).store.codec(Site(64, torch.bfloat16))
    x = values("normal", 4, codec.block, 64)
    assert size(codec.encode(x, x)) * 8 <= bits * 2 * x.numel()


# -- every codec that a plan can name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", sorted(methods("store")))
def test_every_store_attends_as_it_decodes(name: str, head_dim: int) -> None:
    store: Store = methods("store")[name]()
    codec = store.codec(site(head_dim))
    for seed, kind in enumerate(["normal", "constant channels", "one token large"]):
        k, v = values(kind, 3, codec.block, head_dim, seed=seed), values("normal", 3, codec.block, head_dim, seed=seed + 9)
        fields = codec.encode(k, v)
        dk, dv = codec.decode(fields)
        q = torch.randn(3, 2, head_dim)
        p = torch.rand(3, 2, codec.block)
        k_fields = {n.removeprefix("k."): x for n, x in fields.items() if n.startswith("k.")}
        v_fields = {n.removeprefix("v."): x for n, x in fields.items() if n.startswith("v.")}
        assert len(k_fields) + len(v_fields) == len(fields)
        size = float(dk.abs().amax()) * head_dim**0.5
        torch.testing.assert_close(
            codec.k.dot(codec.k.fold_query(q), k_fields), q @ dk.mT, rtol=1e-4, atol=3e-6 * size * head_dim**0.5
        )
        out = codec.v.unfold_output(codec.v.combine(p, v_fields))
        # Zero points of a rotated V add up in one channel and cancel with the codes: rounding is relative to their sum.
        torch.testing.assert_close(out, p @ dv, rtol=1e-4, atol=3e-7 * codec.block * head_dim**0.5 * float(dv.abs().amax()))


@pytest.mark.parametrize("name", sorted(methods("store")))
def test_every_store_is_nearer_with_more_bits_than_none(name: str) -> None:
    """A sanity bound for whatever is registered: decoded vectors point where the vectors did."""
    codec = methods("store")[name]().codec(site(64))
    k, v = values("normal", 4, codec.block, 64), values("normal", 4, codec.block, 64, seed=1)
    for x, y in zip((k, v), codec.decode(codec.encode(k, v)), strict=True):
        assert torch.cosine_similarity(x, y, dim=-1).mean() > 0.65
