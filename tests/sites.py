"""Attention layers without a model: what codecs that ask for weights are tested on."""

from dataclasses import dataclass

import torch

from kvfold.rope import Rope
from kvfold.site import Projections, Site


@dataclass(frozen=True)
class RandomLayer:
    """Random projections from 4 times as many numbers, with biases, and a plain RoPE."""

    head_dim: int
    num_kv_heads: int
    k_normed: bool = False

    def rope(self) -> Rope:
        return Rope(10000.0 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim))

    def projections(self) -> Projections:
        generator = torch.Generator().manual_seed(0)
        k, v = torch.randn(2, self.num_kv_heads, self.head_dim, 4 * self.head_dim, generator=generator)
        k_bias, v_bias = torch.randn(2, self.num_kv_heads, self.head_dim, generator=generator)
        return Projections(k, v, k_bias, v_bias, self.k_normed)


def site(head_dim: int, dtype: torch.dtype = torch.float32, num_kv_heads: int = 1, k_normed: bool = False) -> Site:
    """A layer of random weights."""
    return Site(head_dim, dtype, num_kv_heads, num_kv_heads, model=RandomLayer(head_dim, num_kv_heads, k_normed))
