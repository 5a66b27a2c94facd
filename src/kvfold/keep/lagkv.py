"""Tokens that stand out from what follows them: `lagkv(25%)`.

Liang et al., LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important (arXiv 2504.04704), section 3:
needs no attention. The sequence after the sinks is cut into partitions of `lag` tokens; each is judged by the next one, whose
smallest and largest values per channel are its measure, and then keeps its best tokens.

    s_t(x) = softmax_t( std_c( (x_tc - min_c) / (max_c - min_c) ) ),  min and max over the next partition
    score_t = rank within the partition of (s_t(K) + s_t(V)) / 2

The last whole partition, and what has come after it, is not judged yet and stays. As a score is a rank, every partition keeps
the same share, as in the paper.

Differs from the paper in that the budget is that of all tokens, the last partition included, so that judged partitions keep
less than the budget's share; and in that an older partition is thinned out again when a fixed budget shrinks its part. A
token is read twice in its life, when its partition is judged and when it judges: that is done on decoded vectors, a partition
at a time.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.errors import PlanError
from kvfold.keep.base import NO_TOKENS, UNSCORED, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "lagkv")
@dataclass(frozen=True)
class LagKV(Keep):
    """Keeps the tokens that differ most in their channels, measured by the partition after their own."""

    budget: Budget
    lag: int = 128
    sink: int = 4
    recent: Share = NO_TOKENS
    layers: LayerSplit = UNIFORM
    reads_vectors: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.lag < 1:
            raise PlanError("lagkv: lag=0 is no partition; give at least 1 token")

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        return torch.full(k.shape[:2], UNSCORED, device=k.device)

    def refresh(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        partition = torch.div(ctx.positions - ctx.num_sinks, self.lag, rounding_mode="floor")
        is_new = (score >= UNSCORED) & (ctx.slots >= 0) & ctx.over[:, None]
        num_whole = torch.div(ctx.num_real - ctx.num_sinks, self.lag, rounding_mode="floor")
        due = is_new & (partition < num_whole[:, None] - 1)
        if not bool(due.any()):
            return score
        score = score.clone()
        for row, number in torch.stack([due.nonzero()[:, 0], partition[due].long()], 1).unique(dim=0).tolist():
            places = (due[row] & (partition[row] == number)).nonzero()[:, 0]
            following = ((partition[row] == number + 1) & (ctx.slots[row] >= 0)).nonzero()[:, 0]
            if len(following):
                score[row, places] = self._judge(row, places, following, ctx)
        return score

    def _judge(self, row: int, places: torch.Tensor, following: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """`[n]`, from 0 for the first to go up to 1 for the last."""
        judged = ctx.tokens.vectors(row, places)
        measure = ctx.tokens.vectors(row, following)
        sums = torch.zeros(len(places), device=places.device)
        for x, reference in zip(judged, measure, strict=True):
            low, high = reference.aminmax(dim=0)
            sums += ((x - low) / (high - low).clamp_min(1e-12)).std(dim=-1).softmax(0)
        return sums.argsort(stable=True).argsort().float() / len(places)
