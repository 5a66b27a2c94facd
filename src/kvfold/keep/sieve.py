"""Lazy promotion and quick demotion, from the caches of the web: `sieve(25%)`.

Zhang et al., SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches (NSDI 2024), section 3. Tokens
stand in a queue by age, and each has a *visited* bit, set by a hit. A hand walks from the oldest to the newest: a visited token
loses its bit and stays, one that is not visited goes, and there the hand waits for the next time. After the newest it starts
again with the oldest. Nothing moves in the queue, so that a token that is used stays where it is, and one that is never used
goes as soon as the hand comes by.

It is new for a KV cache, where a hit has to be defined: a query hits a token when it gives it at least the even share of its
attention, 1 / (tokens that it sees), as the mean over the query heads of the group (or `group=max`). Pinned tokens, the
`recent` ones among them, are no part of the queue: the hand passes them by.

    goes first: the unvisited, in the order in which the hand meets them; when none is left, the visited in the same order

This gives the same tokens as walking one by one, since no token comes in between.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.keep.base import HALF, GroupReduce, Keep, KeepContext, Measure, Share, State
from kvfold.registry import register

_VISITED = 2.0**23
"""More than any position: what a visited token ranks above all others."""


@register("keep", "sieve")
@dataclass(frozen=True)
class Sieve(Keep):
    """Keeps tokens as SIEVE keeps objects. The stored number is the visited bit; the state is the hand, a slot a row."""

    budget: Budget
    recent: Share = HALF
    sink: int = 4
    group: GroupReduce = "mean"
    layers: LayerSplit = UNIFORM
    measure: ClassVar[Measure] = "hits"

    def initial_state(self, num_rows: int, num_groups: int, head_dim: int) -> State:
        return {"hand": torch.zeros(num_rows, dtype=torch.int32)}

    def observed(self, num_queries: int) -> int:
        return num_queries

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return torch.maximum(score, (mass > 0).float())

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return self._way(ctx.slots, ctx) + score * _VISITED

    def settle(self, score: torch.Tensor, stays: torch.Tensor, free: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        went = ~stays & (ctx.slots >= 0)
        way = self._way(ctx.slots, ctx)
        visited = score > 0
        # Once no unvisited token is left, the hand has been all around, and every bit that it met is gone.
        second_round = (went & visited).any(1, keepdim=True)
        last = torch.where(went & (visited | ~second_round), way, -1.0).amax(1, keepdim=True)
        met = free & ((way <= last) | second_round)
        ahead = torch.where(went & (way == last), ctx.slots, -1).amax(1) + 1
        ctx.state["hand"] = torch.where(went.any(1), ahead.to(torch.int32), ctx.state["hand"])
        return score.masked_fill(met & went.any(1, keepdim=True), 0.0)

    def _way(self, slots: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """How far the hand has to walk to a token, around the end, in slots."""
        end = ctx.slots.amax() + 1
        way = slots - ctx.state["hand"][:, None]
        return torch.where(way < 0, way + end, way).float()
