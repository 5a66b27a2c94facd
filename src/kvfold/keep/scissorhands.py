"""Tokens that were important stay important: `scissorhands(25%)`.

Liu et al., Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time
(arXiv 2305.17118), Algorithms 1 and 2: a token is important to a query that gives it at least the average attention, and
those that have been so least often within the last `window` queries go.

    score_t = #{ i in the last `window` queries : softmax(q_i K^T)_t >= 1 / (tokens that i sees) }

Differs from the paper in that only as many tokens go as the budget asks for (the paper drops half of the cache at once, and
then lets it grow again), and in that the window slides smoothly: after n queries an old count has faded by n / window. The
attention of a group's query heads is averaged first, or `group=max`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.errors import PlanError
from kvfold.keep.base import GroupReduce, Keep, KeepContext, Measure, Share
from kvfold.registry import register

_TEN = Share(10, False)


@register("keep", "scissorhands")
@dataclass(frozen=True)
class Scissorhands(Keep):
    """Keeps the `recent` tokens, and those that most of the last `window` queries gave their attention to."""

    budget: Budget
    window: int = 400
    recent: Share = _TEN
    sink: int = 0
    group: GroupReduce = "mean"
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM
    measure: ClassVar[Measure] = "hits"

    def check(self) -> None:
        super().check()
        if self.window < 1:
            raise PlanError("scissorhands: window=0 remembers nothing; give at least 1")

    def observed(self, num_queries: int) -> int:
        return min(num_queries, self.window)

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return score * ctx.fade(self.window) + mass
