"""Rotations are orthogonal, and spread one channel over all."""

import pytest
import torch

from kvfold.store.rotation import hadamard


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 192, 256, 48, 112])
def test_hadamard_is_orthogonal_and_flat(head_dim: int) -> None:
    matrix = hadamard(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=3e-6, rtol=0)
    if head_dim in (16, 64, 80, 96, 128, 160, 192, 256):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, head_dim**-0.5))
