"""Token omission via attention: what the newest token looks at least goes: `tova(25%)`.

Oren et al., Transformers are Multi-State RNNs (arXiv 2401.06104), section 3.2: at every step the token with the
lowest attention score of the last query, averaged over all heads of the layer, is dropped. Recency needs no rule of
its own.

Differs from the paper in that after a prompt's chunk many tokens go at once, ranked by the chunk's last query.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.keep.base import NO_TOKENS, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "tova")
@dataclass(frozen=True)
class Tova(Keep):
    """Keeps the tokens with the highest attention of the last query; all heads of a layer keep the same."""

    budget: Budget
    sink: int = 0
    recent: Share = NO_TOKENS
    layers: LayerSplit = UNIFORM
    alike: ClassVar[bool] = True

    def observed(self, num_queries: int) -> int:
        return 1

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return mass

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        rows, width = score.shape
        if ctx.aligned:
            by_head = score.view(-1, ctx.num_heads, width)
            return by_head.mean(1, keepdim=True).expand_as(by_head).reshape(rows, width)
        # Heads keep the same tokens, but need not hold them at the same places: compare by slot.
        order = ctx.slots.argsort(dim=1, stable=True)
        by_slot = score.gather(1, order).view(-1, ctx.num_heads, width)
        mean = by_slot.mean(1, keepdim=True).expand_as(by_slot).reshape(rows, width)
        return torch.empty_like(score).scatter_(1, order, mean)
