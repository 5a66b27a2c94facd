"""The attention that future queries are expected to pay: `expected(25%)`.

Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution
(arXiv 2510.00636), section 3. Queries before their rotation are taken as normally distributed, with the mean μ and the
covariance Σ of those seen so far; the next `future` positions turn them by R̄, the mean of their rotations. Then

    z_t = μ'·k_t + k_t^T Σ' k_t / 2,   μ' = R̄ μ,  Σ' = R̄ Σ R̄^T        (q scaled by 1/sqrt(D))
    score_t = mean over the group's heads of softmax_t(z) · |v_t|

Queries are turned back by the positions at which they stand. With Σ' = A A^T the quadratic form is a sum of D squared products
q · k, so that encoded keys are read by folding. μ and Σ are held for each query head, and counted: with `covariance=false` only
μ, which is D times smaller.

Differs from the paper in that the softmax is over the tokens that can go (sinks are no part of it), that sums over all
queries so far take the place of those of one prompt, and that scores are brought up to date once in `refresh` tokens: those
that came since stay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.errors import PlanError
from kvfold.keep.base import NO_TOKENS, UNSCORED, Keep, KeepContext, Share, State
from kvfold.registry import register
from kvfold.rope import Rope


@register("keep", "expected")
@dataclass(frozen=True)
class Expected(Keep):
    """Keeps the tokens with the largest expected attention times the norm of their value."""

    budget: Budget
    sink: int = 4
    recent: Share = NO_TOKENS
    future: int = 512
    covariance: bool = True
    refresh_every: int = 64
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM
    needs_rope: ClassVar[bool] = True
    reads_vectors: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.future < 1 or self.refresh_every < 1:
            raise PlanError("expected: future and refresh_every are numbers of tokens, 1 or more")

    def initial_state(self, num_rows: int, num_groups: int, head_dim: int) -> State:
        state = {
            "num_queries": torch.zeros(num_rows),
            "q_sum": torch.zeros(num_rows, num_groups, head_dim),
            "scored_at": torch.full((num_rows,), -self.refresh_every),
        }
        if self.covariance:
            state["q_outer"] = torch.zeros(num_rows, num_groups, head_dim, head_dim)
        return state

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        return torch.full(k.shape[:2], UNSCORED, device=k.device)

    def learn(self, q: torch.Tensor, positions: torch.Tensor, ctx: KeepContext) -> None:
        # The first queries are outliers, as their keys are; the authors leave them out as well.
        counts = (positions >= ctx.num_sinks).float()
        q = _rope(ctx).rotate(q, -positions[:, None]) * counts[:, None, :, None]
        ctx.state["num_queries"] += counts.sum(1)
        ctx.state["q_sum"] += q.sum(2)
        if self.covariance:
            ctx.state["q_outer"] += q.mT @ q

    def refresh(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        state = ctx.state
        due = ctx.over & (ctx.num_real - state["scored_at"] >= self.refresh_every) & (state["num_queries"] > 0)
        if not bool(due.any()):
            return score
        state["scored_at"] = torch.where(due, ctx.num_real, state["scored_at"])
        return torch.where(due[:, None], self._expect(ctx), score)

    def _expect(self, ctx: KeepContext) -> torch.Tensor:
        """The score of every token, `[R, N]`."""
        num_queries = ctx.state["num_queries"].clamp_min(1)[:, None, None]
        mean = ctx.state["q_sum"] / num_queries
        first = ctx.num_real[:, None]
        logits = ctx.tokens.products(_rope(ctx).rotate_mean(mean, first, self.future))
        if self.covariance:
            spread = ctx.state["q_outer"] / num_queries[..., None] - mean[..., None] * mean[..., None, :]
            factor = _rope(ctx).rotate_mean(_root(spread).mT, first[..., None], self.future)
            for group in range(factor.shape[1]):  # a head at a time: D products with every key are many numbers
                logits[:, group] += ctx.tokens.products(factor[:, group].contiguous()).square_().sum(1) / 2
        expected = logits.masked_fill((ctx.slots < 0)[:, None], -torch.inf).softmax(-1).mean(1)
        return expected * ctx.tokens.value_norms()


def _root(spread: torch.Tensor) -> torch.Tensor:
    """A with `A A^T = spread`, `[..., D, D]` both; a little is added to the diagonal against rounding."""
    size = spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.cholesky_ex(spread + (1e-4 * size + 1e-12) * torch.eye(spread.shape[-1], device=spread.device))[0]


def _rope(ctx: KeepContext) -> Rope:
    assert ctx.rope is not None, "the layer gives it to a policy whose needs_rope is set"
    return ctx.rope
