"""Tokens at random, beside pinned ones: the baseline that every eviction method must beat: `random(25%)`.

A token's rank is a hash of its position, head, layer and seed: the same run keeps the same tokens, whatever the chunks and
the padding were. By default it pins what h2o pins (half the budget for recent tokens) and 4 sinks; give it the pins of whatever
it is compared with.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.keep.base import HALF, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "random")
@dataclass(frozen=True)
class Random(Keep):
    """Keeps the first `sink`, the last `recent` and a random choice of the others."""

    budget: Budget
    recent: Share = HALF
    sink: int = 4
    seed: int = 0
    layers: LayerSplit = UNIFORM
    scored: ClassVar[bool] = False

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        heads = torch.arange(ctx.slots.shape[0], device=ctx.slots.device)[:, None] % ctx.num_heads
        x = _mix(_mix(_mix(ctx.positions.long() + self.seed) + heads) + ctx.layer)
        return (x & 0xFFFFFF).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finalizer of MurmurHash3."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
