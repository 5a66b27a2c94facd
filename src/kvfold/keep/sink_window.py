"""The first tokens and the last ones: `sink_window(sink=4, window=1020)`.

StreamingLLM: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), section 3.2. Softmax
must put its weight somewhere, and models learn to put it on the first tokens; without them attention falls apart.

With `reindex=true`, as in the paper, positions are those inside the cache: the sinks move up to the window. RoPE is
relative, so instead of touching keys the query is rotated back once for the sinks, by the number of tokens that have
gone in between:

    score of a sink = R(-gone) q_i · R(p_s) k_s        gone = max(0, i + 1 - sink - window)

Differs from the paper in that a prompt is seen through the window from its first token on, so that results don't depend on
how it was cut into chunks, and memory stays bounded while it is read.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.errors import PlanError
from kvfold.keep.base import Keep, KeepContext
from kvfold.registry import register


@register("keep", "sink_window")
@dataclass(frozen=True)
class SinkWindow(Keep):
    """Keeps the first `sink` and the last `window` tokens; `window` may be a share of the context."""

    sink: int = 4
    window: Budget = field(default_factory=lambda: Budget.parse("1020"))
    reindex: bool = True
    layers: LayerSplit = UNIFORM
    scored: ClassVar[bool] = False
    strict: ClassVar[bool] = True

    @property
    def budget(self) -> Budget:  # type: ignore[override]
        if self.window.unit == "tokens":
            total = int(self.window.value) + self.sink
            return Budget(total, "tokens", str(total))
        return self.window

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return ctx.slots.float()

    def check(self) -> None:
        if self.sink < 1:
            raise PlanError("sink_window: without sinks it is a window; write window(…) instead")
