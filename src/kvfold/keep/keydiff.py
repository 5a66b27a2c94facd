"""Keys that point where all keys point are redundant: `keydiff(25%)`.

Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments (arXiv 2504.15364), section 3: needs no attention. Keys that differ from the others receive more of it.

    score_t = -cos(k_t, mean_j k_j / |k_j|)

The mean is over the tokens that are held, sinks left out, and is taken anew whenever tokens go: a weighted sum of the keys and
one product with each, both folded, so that encoded keys are read as they are. The norm of a key is stored when it comes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.keep.base import NO_TOKENS, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "keydiff")
@dataclass(frozen=True)
class KeyDiff(Keep):
    """Keeps the keys whose direction is farthest from the mean direction. The stored number is 1 / |k_t|."""

    budget: Budget
    recent: Share = NO_TOKENS
    sink: int = 0
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM
    reads_vectors: ClassVar[bool] = True

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        return 1 / k.float().norm(dim=-1).clamp_min(1e-12)

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        inverse_norm = score.masked_fill(ctx.slots < 0, 0.0)
        mean = ctx.tokens.weighted_keys(inverse_norm[:, None])
        direction = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return -ctx.tokens.products(direction)[:, 0] * inverse_norm
