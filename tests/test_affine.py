"""Integers with scales: the error is half a step, steps are as small as the range allows, bytes are the formula's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import HEAD_DIMS, KINDS, affines, size, values, whole_blocks

from kvfold.store import scales
from kvfold.store.affine import Affine
from kvfold.store.base import Fields
from kvfold.store.scales import channel_group


@given(affines, HEAD_DIMS, st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=250)
def test_affine_errs_by_half_a_step(codec: Affine, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, 2, whole_blocks(codec, 7), head_dim, seed=seed)
    fields = codec.encode(x)
    step = _steps(codec, fields, x)
    assert ((codec.decode(fields) - x).abs() <= step / 2 + 4e-7 * (x.abs() + 2**codec.bits * step)).all()


@given(affines, HEAD_DIMS, st.sampled_from(["normal", "1e3", "constant channels", "one token large", "negative", "positive"]))
@settings(max_examples=150)
def test_affine_steps_are_as_small_as_the_range_allows(codec: Affine, head_dim: int, kind: str) -> None:
    x = values(kind, 2, whole_blocks(codec, 7), head_dim)
    step = _steps(codec, codec.encode(x), x)
    low, high = _range(codec, x)
    ideal = 2 * torch.maximum(high, -low) if codec.symmetric else high - low
    # Half precision costs a thousandth of the numbers that are stored; a logarithmic grid up to one of its steps, and it ends
    # some octaves below the largest.
    grid = 1.0 if codec.scales == "half" else 2 ** (1 / scales.PER_OCTAVE[codec.axis])
    assert (step * (2**codec.bits - 1) <= ideal * 1.002 * grid + 0.003 * x.abs().amax() + 1e-3).all()


def _steps(codec: Affine, fields: Fields, x: torch.Tensor) -> torch.Tensor:
    """The stored step of each number of `x [..., T, D]`, from the formulas of the format."""
    scale = fields["scale"].double()
    if codec.scales == "log8":
        largest = scales.LARGEST_OF_TOKEN if codec.axis == "token" else fields["base"].double()[..., None]
        scale = 2 ** (-scale / scales.PER_OCTAVE[codec.axis]) * largest
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
    assert size(codec.encode(values("normal", num_blocks, codec.block, head_dim))) == expected
