"""What the end of the prompt looks at: `snapkv(1024)`.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469), section 4 and Listing 1:
the attention of the last `window` queries is summed for each earlier token, smoothed along the sequence by a pool of
`kernel` tokens, and the best are kept beside the window itself.

    score_t = pool_kernel( Σ_{i in the last window queries} softmax(q_i K^T)_t )

Differs from the paper: prompts are read in chunks, each observed by its own last queries, so that memory is bounded;
while text is generated (the paper keeps all of it) the observation slides on: each new query adds its attention and
the older ones fade by 1/window. 4 sinks are pinned: where a text begins with few tokens, `window` of them fill a budget that
is a share, and the first ones would be gone for ever (docs/log.md). Scores belong to KV heads, the mean over the group or
`group=max`. The paper's repository pools by average or maximum; `pool` names it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.errors import PlanError
from kvfold.keep.base import GroupReduce, Keep, KeepContext, Share
from kvfold.registry import register


@register("keep", "snapkv")
@dataclass(frozen=True)
class SnapKV(Keep):
    """Keeps the last `window` tokens and those that they attend to."""

    budget: Budget
    window: int = 32
    kernel: int = 7
    pool: Literal["max", "mean"] = "max"
    sink: int = 4
    group: GroupReduce = "mean"
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM

    @property
    def recent(self) -> Share:  # type: ignore[override]
        return Share(self.window, False)

    def check(self) -> None:
        super().check()
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise PlanError(f"snapkv: kernel={self.kernel} must be odd, so that a pool has a middle")
        if self.window < 1:
            raise PlanError("snapkv: window=0 observes nothing; give at least 1")

    def observed(self, num_queries: int) -> int:
        return min(num_queries, self.window)

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return score * ctx.fade(self.window) + mass

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        order = ctx.slots.argsort(dim=1, stable=True)
        absent = ctx.slots < 0
        by_slot = score.masked_fill(absent, 0.0).gather(1, order)[:, None]
        if self.pool == "max":
            pooled = _max_pool(by_slot, self.kernel)
        else:  # the sums, over as many tokens as there are
            present = (~absent).float().gather(1, order)[:, None]
            sums, counts = (F.avg_pool1d(x, self.kernel, stride=1, padding=self.kernel // 2) for x in (by_slot, present))
            pooled = sums / counts.clamp_min(1e-6)
        return torch.empty_like(score).scatter_(1, order, pooled[:, 0])


def _max_pool(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """The largest of `kernel` neighbours, `[..., N]` both; a few operations that need no threads, as torch's own pool does."""
    size, width = x.shape[-1], 1
    x = F.pad(x, (kernel // 2, kernel // 2), value=-torch.inf)
    while 2 * width <= kernel:
        x = torch.maximum(x[..., :-width], x[..., width:])
        width *= 2
    return torch.maximum(x[..., :size], x[..., kernel - width : kernel - width + size])
