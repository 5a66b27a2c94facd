"""Rotations are orthogonal, and spread one channel over all."""

import pytest
import torch

from kvfold.store.rotation import hadamard, random_rotation


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 192, 256, 48, 112])
def test_hadamard_is_orthogonal_and_flat(head_dim: int) -> None:
    matrix = hadamard(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=3e-6, rtol=0)
    if head_dim in (16, 64, 80, 96, 128, 160, 192, 256):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, head_dim**-0.5))


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_the_random_rotation_is_orthogonal_and_always_the_same(head_dim: int) -> None:
    matrix = random_rotation(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    random_rotation.cache_clear()
    assert torch.equal(random_rotation(head_dim), matrix)
    # Entries of an evenly drawn rotation are nearly normal with variance 1 / dim.
    assert float(matrix.square().mean() * head_dim) == pytest.approx(1, abs=1e-5)
    assert float(matrix.pow(4).mean() * head_dim**2) == pytest.approx(3, abs=0.6)
