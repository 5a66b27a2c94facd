"""Low rank: the subspace is nearly the best one, and repairs what a codec misses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vectors import size, values

from kvfold.errors import PlanError
from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.dense import DenseCodec
from kvfold.store.subspace import Subspace


def _error(codec, x: torch.Tensor) -> torch.Tensor:
    return (codec.decode(codec.encode(x)) - x).flatten(-2).norm(dim=-1)


@pytest.mark.parametrize("kind", ["normal", "constant channels", "one token large", "1e3", "tiny"])
@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_the_subspace_is_nearly_the_best(rank: int, kind: str) -> None:
    """Eckart and Young: no matrix of this rank is nearer than by the singular values that are left out."""
    x = values(kind, 5, 64, 80)
    best = torch.linalg.svdvals(x)[:, rank:].norm(dim=-1)
    error = _error(Subspace(DenseCodec(torch.float32), rank), x)
    rounding = 2.0**-10 * x.flatten(-2).norm(dim=-1)  # the basis is kept in half precision
    assert (error >= best * 0.999).all()
    assert (error <= best * 1.05 + rounding).all()


@given(st.sampled_from([1, 3, 8]), st.integers(0, 99))
def test_what_has_few_dimensions_is_kept(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 64, rank, generator=generator) @ torch.randn(2, rank, 64, generator=generator)
    assert (_error(Subspace(DenseCodec(torch.float32), 8), x) <= 2e-3 * x.flatten(-2).norm(dim=-1)).all()


def test_more_directions_than_there_are() -> None:
    with pytest.raises(ValueError, match="65 directions are more than 64 tokens"):
        Subspace(DenseCodec(torch.float16), 65).encode(torch.zeros(1, 64, 128))


_INT4, _HALVES, _OUTLIERS = 64 * 64 * 4, 64 * 32, 64 * 24  # codes; scales and zeros; one of 64 numbers


@pytest.mark.parametrize(
    ("plan", "bits"),
    [
        ("gear(int4(scales=half, symmetric=none), rank=4, outliers=1%)", _INT4 + _HALVES + _OUTLIERS + 4 * 128 * 16),
        ("gear(int4(scales=half, symmetric=none), rank=0, outliers=2%)", _INT4 + _HALVES + 2 * _OUTLIERS),
        ("gear(int4(scales=half, symmetric=none), 2, 0%, factors=int8)", _INT4 + _HALVES + 2 * (64 * 24 + 16)),
        ("lowrank(25%, tokens=64, codes=half)", 16 * 128 * 16),
        ("lowrank(25%, tokens=64, codes=int8)", 16 * 64 * 24 + 16 * 32),
    ],
)
def test_bits_of_a_block_of_64_tokens(plan: str, bits: int) -> None:
    x = values("normal", 1, 64, 64)
    for codec in (Plan.parse(plan).store.codec(Site(64)).k, Plan.parse(plan).store.codec(Site(64)).v):
        assert 8 * size(codec.encode(x)) == bits


@pytest.mark.parametrize("codes", ["int2", "int4", "nf4", "turboquant(2)"])
def test_gear_repairs_what_its_codec_misses(codes: str) -> None:
    x = values("constant channels", 4, 64, 64)
    plain, repaired = (Plan.parse(plan).store.codec(Site(64)) for plan in (codes, f"gear({codes}, rank=8, outliers=2%)"))
    assert (_error(repaired.k, x) < 0.9 * _error(plain.k, x)).all()
    assert (_error(repaired.v, x) < 0.9 * _error(plain.v, x)).all()


def test_what_gear_can_not_do() -> None:
    from sites import site

    with pytest.raises(PlanError, match="rank of 17 is more than the head dim of 16"):
        Plan.parse("gear(int4, rank=17)").store.codec(site(16))
    with pytest.raises(PlanError, match="can't repair lorc"):
        Plan.parse("gear(lorc)").store.codec(site(64))


def test_eight_bits_for_the_factors_cost_little_error() -> None:
    x = values("constant channels", 4, 64, 64)
    exact, rounded = (Subspace(inner, 8) for inner in (DenseCodec(torch.float16), Affine(8, "channel", 64, symmetric=True)))
    assert (_error(rounded, x) <= 1.02 * _error(exact, x)).all()
