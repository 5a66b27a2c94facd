"""Outliers apart: they are found, kept to the last bit of a half, and no longer widen the range of the others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vectors import HEAD_DIMS, outliers, size, values

from kvfold.percent import Percent
from kvfold.store.affine import Affine
from kvfold.store.outliers import Outliers


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("head_dim", [64, 80, 512])
def test_planted_outliers_are_found_and_kept(axis: str, head_dim: int) -> None:
    x = values("normal", 3, 64, head_dim)
    lines = x if axis == "token" else x.mT
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(lines.shape[-1], lines.shape[:-1], generator=generator)[..., None]
    lines.scatter_(-1, place, 50 * torch.where(place % 2 == 0, 1.0, -1.0))
    inner = Affine(4, axis, lines.shape[-1])
    codec = Outliers(inner, Percent(1 / lines.shape[-1]), axis)
    fields = codec.encode(x)
    assert torch.equal(fields["place"].long(), place)
    error = (codec.decode(fields) - x).abs()
    at_outliers = (error if axis == "token" else error.mT).gather(-1, place)
    assert at_outliers.max() <= 50 * 2.0**-11
    plain = (inner.decode(inner.encode(x)) - x).abs()
    assert error.mean() < plain.mean() / 5


@given(outliers, HEAD_DIMS)
def test_outliers_take_three_bytes_each(codec: Outliers, head_dim: int) -> None:
    x = values("normal", 2, codec.block, head_dim)
    num_lines, width = (codec.block, head_dim) if codec.axis == "token" else (head_dim, codec.block)
    count = -(-width // 100) if codec.share == Percent(0.01) else -(-width // 10)
    assert size(codec.encode(x)) == size(codec.inner.encode(x)) + 2 * num_lines * count * 3


@given(st.sampled_from(["token", "channel"]), st.sampled_from([1, 4, 12]))
def test_more_outliers_leave_less_error(axis: str, percent: int) -> None:
    x = values("normal", 2, 64, 64)
    few, more = (Outliers(Affine(2, axis), Percent(p / 100), axis) for p in (percent, 2 * percent))
    errors = [float((codec.decode(codec.encode(x)) - x).square().mean()) for codec in (few, more)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_one_query_looks_at_several_blocks(axis: str) -> None:
    """`[R, 1, M, D]` against `[R, C, T, D]`, as attention over whole blocks asks."""
    codec = Outliers(Affine(4, axis), Percent(0.05), axis)
    x, q = values("normal", 2, 3, 64, 64), values("normal", 2, 1, 5, 64, seed=1)
    fields = codec.encode(x)
    torch.testing.assert_close(codec.dot(q, fields), q @ codec.decode(fields).mT, atol=1e-4, rtol=1e-5)
