"""Tables of levels: the nearest level is taken, and the levels are those of their sources."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import HEAD_DIMS, KINDS, size, tables, values, whole_blocks

from kvfold.store import levels, scales
from kvfold.store.base import Fields
from kvfold.store.scales import channel_group
from kvfold.store.table import Table


def _spread(codec: Table, stored: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A stored number for each number of `x [..., T, D]`."""
    if codec.axis == "token":
        return stored.repeat_interleave(channel_group(head_dim, codec.group), -1)
    return stored.repeat_interleave(codec.group, -2)


def _scale_zero(codec: Table, fields: Fields, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of each number, from the formulas of the format."""
    scale = fields["scale"].double()
    if codec.scales == "log8":
        largest = scales.LARGEST_OF_TOKEN if codec.axis == "token" else fields["base"].double()[..., None]
        scale = 2 ** (-scale / scales.PER_OCTAVE[codec.axis]) * largest
    zero = fields["zero"].double() if codec.offset else torch.zeros_like(scale)
    return _spread(codec, scale, head_dim), _spread(codec, zero, head_dim)


@given(tables, HEAD_DIMS, st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=150)
def test_the_nearest_level_is_taken(codec: Table, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, 2, whole_blocks(codec, 7), head_dim, seed=seed).double()
    fields = codec.encode(x.float())
    scale, zero = _scale_zero(codec, fields, head_dim)
    candidates = scale[..., None] * torch.tensor(codec.levels, dtype=torch.float64) + zero[..., None]
    best = (x[..., None] - candidates).abs().amin(-1)
    error = (codec.decode(fields).double() - x).abs()
    extent = x.abs() + candidates.abs().amax(-1)
    assert (error <= best + 1e-6 * extent).all()
    if codec.fit == "largest" and codec.refits == 0:
        gap = max(b - a for a, b in zip(codec.levels, codec.levels[1:], strict=False))
        assert (error <= scale * gap / 2 + 1e-6 * extent).all()


@given(tables, HEAD_DIMS, st.integers(0, 99))
@settings(max_examples=60)
def test_refitting_scales_does_not_add_to_the_error(codec: Table, head_dim: int, seed: int) -> None:
    x = values("normal", 4, codec.block, head_dim, seed=seed)
    errors = []
    for refits in (0, 2):
        again = Table(codec.levels, codec.axis, codec.group, codec.offset, codec.scales, codec.fit, refits)
        errors.append(float((again.decode(again.encode(x)) - x).square().mean()))
    assert errors[1] <= errors[0] * 1.02  # rounding of the stored scales aside


@given(tables, HEAD_DIMS, st.integers(1, 3))
def test_tables_take_the_bytes_of_their_formula(codec: Table, head_dim: int, num_blocks: int) -> None:
    num_tokens = num_blocks * codec.block
    if codec.axis == "token":
        num_scales = num_tokens * (head_dim // channel_group(head_dim, codec.group))
    else:
        num_scales = num_tokens // codec.group * head_dim
    expected = num_tokens * head_dim * codec.bits // 8 + num_scales * ((2 if codec.scales == "half" else 1) + 2 * codec.offset)
    if codec.scales == "log8" and codec.axis == "channel":
        expected += 2 * num_blocks
    assert size(codec.encode(values("normal", num_blocks, codec.block, head_dim))) == expected


def test_nf4_is_what_its_paper_lists() -> None:
    """QLoRA, appendix E."""
    listed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert levels.nf4() == pytest.approx(listed, abs=2e-6)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_of_the_normal_distribution_have_the_least_distortion(bits: int, distortion: float) -> None:
    """Max (1960), table 1, gives the distortion of the best quantizers with 4, 8 and 16 levels."""
    found = torch.tensor(levels.on_a_sphere(bits, 10**6), dtype=torch.float64)
    x = torch.linspace(-8, 8, 400001, dtype=torch.float64)
    weight = (-x.square() / 2).exp()
    nearest = found[torch.bucketize(x, (found[1:] + found[:-1]) / 2)]
    assert float(((x - nearest).square() * weight).sum() / weight.sum()) == pytest.approx(distortion, rel=1e-3)


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_level_on_a_sphere_is_the_mean_of_what_is_nearest(bits: int, dim: int) -> None:
    found = torch.tensor(levels.on_a_sphere(bits, dim))
    points = torch.randn(2_000_000 // dim, dim, generator=torch.Generator().manual_seed(0))
    x = (points / points.norm(dim=1, keepdim=True) * math.sqrt(dim)).flatten()
    codes = torch.bucketize(x, (found[1:] + found[:-1]) / 2)
    sums = torch.zeros(2**bits).index_add_(0, codes, x)
    counts = torch.bincount(codes, minlength=2**bits)
    torch.testing.assert_close(sums / counts, found, atol=0.02, rtol=0)


@pytest.mark.parametrize("wrong", [(-1.0, 1.0), (1.0, 2.0, 3.0, 4.0), (-1.0, 0.5, 0.2, 1.0)])
def test_what_is_no_table(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a table"):
        Table(wrong)
