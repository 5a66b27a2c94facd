"""Codecs: attention on codes equals attention over what they decode to, and decoding is as near as the formulas say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.plan import Plan
from kvfold.registry import methods
from kvfold.site import Site
from kvfold.store import affine
from kvfold.store.affine import Affine, channel_group
from kvfold.store.base import Fields, Store, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fp8 import Float8
from kvfold.store.pack import pack, unpack
from kvfold.store.rotation import Rotated, hadamard

HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 256])
KINDS = ["normal", "1e-3", "1e3", "constant channels", "one token large", "zeros", "negative", "positive", "tiny"]

affines = st.builds(
    Affine,
    bits=st.sampled_from([8, 4, 2]),
    axis=st.sampled_from(["token", "channel"]),
    group=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
    scales=st.sampled_from(["half", "log8"]),
)
floats = st.builds(Float8, format=st.sampled_from(["e4m3", "e5m2"]), scaled=st.booleans())
dense = st.builds(DenseCodec, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))


@st.composite
def codecs(draw: st.DrawFn) -> tuple[TensorCodec, int]:
    """Any codec, rotated or not, and a head dim."""
    head_dim = draw(HEAD_DIMS)
    codec: TensorCodec = draw(st.one_of(affines, floats, dense))
    return (Rotated(codec, head_dim) if draw(st.booleans()) else codec), head_dim


def values(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Vectors `[..., T, D]` of a kind that has broken a codec somewhere."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "1e-3":
        return x * 1e-3
    if kind == "1e3":
        return x * 1e3
    if kind == "constant channels":
        x[..., ::7] = 150 * torch.where(torch.arange(x[..., ::7].shape[-1]) % 2 == 0, 1.0, -1.0)
    if kind == "one token large":
        x[..., :1, :] *= 200
    if kind == "zeros":
        return torch.zeros_like(x)
    if kind == "negative":
        return -x.abs() - 3
    if kind == "positive":
        return x.abs() + 3
    if kind == "tiny":
        return x * 1e-6
    return x


def _inner(codec: TensorCodec) -> TensorCodec:
    return codec.inner if isinstance(codec, Rotated) else codec


def _num_tokens(codec: TensorCodec, num: int) -> int:
    """Codecs of whole blocks take whole blocks, one at least."""
    return num if codec.unit == "token" else max(1, -(-num // codec.block)) * codec.block


@given(codecs(), st.sampled_from(KINDS), st.sampled_from([0, 1, 5, 64, 200]), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=250)
def test_attention_on_codes_equals_attention_on_what_they_decode_to(
    chosen: tuple[TensorCodec, int], kind: str, num_tokens: int, num_queries: int, seed: int
) -> None:
    codec, head_dim = chosen
    num_tokens = _num_tokens(codec, num_tokens)
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
    sum_bound = 2e-6 * exact_p.sum(-1, keepdim=True) * extent + 1e-12
    assert ((sums.double() - exact_p @ exact_x).abs() <= sum_bound).all()


@given(codecs())
def test_no_blocks_are_encoded_to_no_blocks(chosen: tuple[TensorCodec, int]) -> None:
    codec, head_dim = chosen
    fields = codec.encode(torch.zeros(3, 0, codec.block, head_dim))
    assert all(x.shape[:2] == (3, 0) for x in fields.values())
    assert codec.decode(fields).shape == (3, 0, codec.block, head_dim)
    assert codec.dot(torch.zeros(3, 0, 2, head_dim), fields).shape == (3, 0, 2, codec.block)
    assert codec.combine(torch.zeros(3, 0, 2, codec.block), fields).shape == (3, 0, 2, head_dim)


@given(affines, HEAD_DIMS, st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=250)
def test_affine_errs_by_half_a_step(codec: Affine, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, 2, _num_tokens(codec, 7), head_dim, seed=seed)
    fields = codec.encode(x)
    step = _steps(codec, fields, x)
    assert ((codec.decode(fields) - x).abs() <= step / 2 + 4e-7 * (x.abs() + 2**codec.bits * step)).all()


@given(affines, HEAD_DIMS, st.sampled_from(["normal", "1e3", "constant channels", "one token large", "negative", "positive"]))
@settings(max_examples=150)
def test_affine_steps_are_as_small_as_the_range_allows(codec: Affine, head_dim: int, kind: str) -> None:
    x = values(kind, 2, _num_tokens(codec, 7), head_dim)
    step = _steps(codec, codec.encode(x), x)
    low, high = _range(codec, x)
    ideal = 2 * torch.maximum(high, -low) if codec.symmetric else high - low
    # Half precision costs a thousandth of the numbers that are stored; a logarithmic grid up to one of its steps, and it ends
    # some octaves below the largest.
    grid = 1.0 if codec.scales == "half" else 2 ** (1 / affine._PER_OCTAVE[codec.axis])
    assert (step * (2**codec.bits - 1) <= ideal * 1.002 * grid + 0.003 * x.abs().amax() + 1e-3).all()


def _steps(codec: Affine, fields: Fields, x: torch.Tensor) -> torch.Tensor:
    """The stored step of each number of `x [..., T, D]`, from the formulas of the format."""
    scale = fields["scale"].double()
    if codec.scales == "log8":
        largest = affine._LARGEST_TOKEN_STEP if codec.axis == "token" else fields["base"].double()[..., None]
        scale = 2 ** (-scale / affine._PER_OCTAVE[codec.axis]) * largest
    if codec.axis == "token":
        return scale.repeat_interleave(channel_group(x.shape[-1], codec.group), -1)
    return scale.repeat_interleave(codec.group, -2)


def _range(codec: Affine, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest number among those that share a scale, for each number of x."""
    low, high = torch.empty_like(x), torch.empty_like(x)
    width = channel_group(x.shape[-1], codec.group) if codec.axis == "token" else codec.group
    axis = -1 if codec.axis == "token" else -2
    for start in range(0, x.shape[axis], width):
        part = x.narrow(axis, start, width)
        low.narrow(axis, start, width).copy_(part.amin(axis, keepdim=True))
        high.narrow(axis, start, width).copy_(part.amax(axis, keepdim=True))
    return low, high


@given(floats, HEAD_DIMS, st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=100)
def test_float8_errs_by_half_a_bit_of_its_mantissa(codec: Float8, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, 2, 5, head_dim, seed=seed)
    mantissa, smallest, largest = (3, 2.0**-9, 448.0) if codec.format == "e4m3" else (2, 2.0**-16, 57344.0)
    fields = codec.encode(x)
    scale = fields["scale"].float() if codec.scaled else torch.ones(())
    bound = torch.maximum(x.abs() * 2.0 ** -(mantissa + 1), scale * smallest / 2) * 1.0001
    error = (codec.decode(fields) - x).abs()
    if not codec.scaled:
        bound = torch.maximum(bound, (x.abs() - largest).clamp_min(0) * 1.0001)
    assert (error <= bound).all()


@given(codecs(), st.sampled_from(["normal", "constant channels"]))
def test_a_rotation_adds_no_error(chosen: tuple[TensorCodec, int], kind: str) -> None:
    """The error of a rotated codec has the norm of its inner codec's error on rotated vectors."""
    codec, head_dim = chosen
    if not isinstance(codec, Rotated):
        codec = Rotated(codec, head_dim)
    x = values(kind, 2, _num_tokens(codec, 7), head_dim)
    turned = x @ hadamard(head_dim)
    inner_error = (codec.inner.decode(codec.inner.encode(turned)) - turned).norm(dim=-1)
    error = (codec.decode(codec.encode(x)) - x).norm(dim=-1)
    torch.testing.assert_close(error, inner_error, rtol=1e-3, atol=1e-4 * float(x.abs().amax()))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), HEAD_DIMS)
def test_dense_returns_what_it_was_given(dtype: torch.dtype, head_dim: int) -> None:
    codec = DenseCodec(dtype)
    x = values("normal", 2, 5, head_dim).to(dtype)
    assert torch.equal(codec.decode(codec.encode(x)), x.float())


@given(affines, HEAD_DIMS)
def test_tokens_can_be_moved_alone_where_the_unit_is_the_token(codec: Affine, head_dim: int) -> None:
    if codec.unit == "block":
        return
    x = values("normal", 3, 20, head_dim)
    fields = codec.encode(x)
    order = torch.randperm(20)
    moved = {name: tensor[:, order] for name, tensor in fields.items()}
    # Not bit for bit: exp2 of a scale's code rounds one way in a vector register and another beside it.
    torch.testing.assert_close(codec.decode(moved), codec.decode(fields)[:, order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 192, 256, 48, 112])
def test_hadamard_is_orthogonal_and_flat(head_dim: int) -> None:
    matrix = hadamard(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=3e-6, rtol=0)
    if head_dim in (16, 64, 80, 96, 128, 160, 192, 256):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, head_dim**-0.5))


# -- packing and sizes -------------------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 4, 8]), st.integers(0, 9), st.sampled_from([16, 64, 80, 96, 128, 256]), st.integers(0, 99))
def test_unpack_undoes_pack(bits: int, num_tokens: int, head_dim: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (num_tokens, head_dim), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.shape == (num_tokens, head_dim * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_codes_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        pack(torch.zeros(3, 6, dtype=torch.uint8), 2)


def _size(fields: Fields) -> int:
    return sum(x.untyped_storage().nbytes() for x in fields.values())


@given(affines, HEAD_DIMS, st.integers(1, 3))
def test_affine_takes_the_bytes_of_its_formula(codec: Affine, head_dim: int, num_blocks: int) -> None:
    num_tokens = num_blocks * codec.block
    if codec.axis == "token":
        width = min(g for g in range(min(codec.group, head_dim), head_dim + 1) if head_dim % g == 0)
        num_scales = num_tokens * head_dim // width
    else:
        num_scales = num_tokens // codec.group * head_dim
    expected = num_tokens * head_dim * codec.bits // 8 + num_scales * (2 if codec.scales == "half" else 1)
    if codec.scales == "log8" and codec.axis == "channel":
        expected += 2 * num_blocks
    if not codec.symmetric:
        expected += 2 * num_scales
    assert _size(codec.encode(values("normal", num_blocks, codec.block, head_dim))) == expected


@given(floats, HEAD_DIMS, st.integers(1, 9))
def test_float8_takes_a_byte_a_number_and_two_a_token(codec: Float8, head_dim: int, num_tokens: int) -> None:
    assert _size(codec.encode(values("normal", num_tokens, head_dim))) == num_tokens * (head_dim + 2 * codec.scaled)


@pytest.mark.parametrize(("plan", "bits"), [("int8", 8.5), ("int4", 4.5), ("int2", 2.5), ("fp8", 8.25), ("dense", 16)])
def test_bits_an_element_of_the_defaults(plan: str, bits: float) -> None:
    codec = Plan.parse(plan).store.codec(Site(64, torch.bfloat16))
    x = values("normal", 4, codec.block, 64)
    assert _size(codec.encode(x, x)) * 8 <= bits * 2 * x.numel()


# -- every codec that a plan can name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", sorted(methods("store")))
def test_every_store_attends_as_it_decodes(name: str, head_dim: int) -> None:
    store: Store = methods("store")[name]()
    codec = store.codec(Site(head_dim, torch.float32))
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
    codec = methods("store")[name]().codec(Site(64, torch.float32))
    k, v = values("normal", 4, codec.block, 64), values("normal", 4, codec.block, 64, seed=1)
    for x, y in zip((k, v), codec.decode(codec.encode(k, v)), strict=True):
        assert torch.cosine_similarity(x, y, dim=-1).mean() > 0.85
