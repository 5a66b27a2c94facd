"""Keys of low norm receive high attention, so keys of high norm go: `l2norm(25%)`.

Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430), section 3:
needs no attention at all.

Differs from the paper: it leaves the first two layers alone, which is a plan's business (`hybrid`), not this
policy's; the last tokens can be pinned with `recent`.
"""

from dataclasses import dataclass

import torch

from kvfold.budget import Budget, HeadSplit
from kvfold.keep.base import NO_TOKENS, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "l2norm")
@dataclass(frozen=True)
class L2Norm(Keep):
    """Keeps the keys with the smallest L2 norm."""

    budget: Budget
    recent: Share = NO_TOKENS
    sink: int = 0
    heads: HeadSplit = "uniform"

    def first_score(self, k: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return -k.float().norm(dim=-1)

    def update(self, score: torch.Tensor, mass: torch.Tensor, num_queries: int) -> torch.Tensor:
        return score
