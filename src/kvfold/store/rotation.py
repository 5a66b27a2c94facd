"""A rotation before any codec: it spreads outlier channels over all channels.

q · k = (q H) · (k H) for an orthogonal H, so the rotation is folded into the query before, and out of the output after;
cached tokens are never rotated back. QuaRot (arXiv 2404.00456, section 4.2) and SpinQuant use Hadamard matrices for the KV
cache, TurboQuant (arXiv 2504.19874, section 3.1) a random one.

It is not safe by itself: where k_proj has large biases (Qwen2, Qwen2.5) a rotation smears them over all channels and per-token
codes collapse (docs/log.md). The defaults therefore rotate V only.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store.base import AroundCodec, Fields
from kvfold.store.constants import sent


@dataclass(frozen=True)
class Rotated(AroundCodec):
    """`inner` over vectors rotated by `hadamard(head_dim)` or `random_rotation(head_dim)`."""

    head_dim: int
    rotation: Literal["hadamard", "random"] = "hadamard"

    def matrix(self) -> torch.Tensor:
        """The rotation, `[D, D] float32`: made once, never freed."""
        return self.matrix_on(torch.device("cpu"))

    def matrix_on(self, device: torch.device) -> torch.Tensor:
        """The same on a device."""
        return sent(device, hadamard if self.rotation == "hadamard" else random_rotation, self.head_dim)

    def _matrix(self, like: torch.Tensor) -> torch.Tensor:
        return self.matrix_on(like.device)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """What is encoded: `x [..., D]`, rotated, in float32."""
        return x.float() @ self._matrix(x)

    def encode(self, x: torch.Tensor) -> Fields:
        return self.inner.encode(self.turn(x))

    def decode(self, fields: Fields) -> torch.Tensor:
        x = self.inner.decode(fields)
        return x @ self._matrix(x).T

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.inner.dot(q, fields)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.inner.combine(p, fields)

    def fold_query(self, q: torch.Tensor) -> torch.Tensor:
        return self.inner.fold_query(q @ self._matrix(q))

    def unfold_output(self, out: torch.Tensor) -> torch.Tensor:
        return self.inner.unfold_output(out) @ self._matrix(out).T


@functools.cache
def hadamard(dim: int) -> torch.Tensor:
    """An orthogonal `[dim, dim] float32` with entries of few magnitudes.

    A Hadamard matrix over sqrt(dim) where the Sylvester and Paley constructions give one (64, 80, 96, 128, 160, 192, 256 …);
    otherwise blocks of the largest power of two that divides dim.
    """
    for core in (1, 12, 20):
        power = dim // core
        if dim % core == 0 and power & (power - 1) == 0:
            return torch.kron(_sylvester(power), _paley(core)) / math.sqrt(dim)
    block = dim & -dim
    return torch.block_diag(*[_sylvester(block)] * (dim // block)) / math.sqrt(block)


@functools.cache
def random_rotation(dim: int) -> torch.Tensor:
    """An orthogonal `[dim, dim] float32`, drawn evenly from all of them: always the same one.

    The Q of a Gaussian matrix, columns signed so that R has a positive diagonal (Mezzadri, arXiv math-ph/0609050, section 5).
    """
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().contiguous()


def _sylvester(dim: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _paley(order: int) -> torch.Tensor:
    """Paley's first construction for order - 1 a prime that is 3 modulo 4."""
    if order == 1:
        return torch.ones(1, 1)
    prime = order - 1
    squares = {i * i % prime for i in range(1, prime)}
    character = [0] + [1 if i in squares else -1 for i in range(1, prime)]
    matrix = torch.ones(order, order)
    matrix[1:, 0] = -1
    for i in range(prime):
        for j in range(prime):
            matrix[i + 1, j + 1] = character[(j - i) % prime] + (i == j)
    return matrix
