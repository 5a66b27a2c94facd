"""A Hadamard rotation before any codec: it spreads outlier channels over all channels.

q · k = (q H) · (k H) for an orthogonal H, so the rotation is folded into the query before, and out of the output after;
cached tokens are never rotated back. QuaRot (arXiv 2404.00456, section 4.2) and SpinQuant use it for the KV cache.

It is not safe by itself: where k_proj has large biases (Qwen2, Qwen2.5) a rotation smears them over all channels and per-token
codes collapse (docs/log.md). The defaults therefore rotate V only.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store.base import Fields, TensorCodec


@dataclass(frozen=True)
class Rotated(TensorCodec):
    """`inner` over vectors rotated by `hadamard(head_dim)`."""

    inner: TensorCodec
    head_dim: int

    @property
    def unit(self) -> Literal["token", "block"]:
        return self.inner.unit

    @property
    def block(self) -> int:
        return self.inner.block

    def _matrix(self, like: torch.Tensor) -> torch.Tensor:
        return hadamard(self.head_dim).to(like.device)

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
