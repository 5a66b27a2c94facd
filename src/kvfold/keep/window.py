"""The last tokens, and nothing else: `window(1024)`.

Longformer (arXiv 2004.05150), section 3.1; StreamingLLM (arXiv 2309.17453) calls it window attention and shows that
it fails once the first tokens are gone. It is here as what other policies must beat.

Every query sees itself and the `budget - 1` tokens before it, also within a chunk: results don't depend on how a
prompt was cut.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, LayerSplit
from kvfold.keep.base import Keep, KeepContext
from kvfold.registry import register


@register("keep", "window")
@dataclass(frozen=True)
class Window(Keep):
    """Keeps the last `budget` tokens."""

    budget: Budget
    layers: LayerSplit = UNIFORM
    scored: ClassVar[bool] = False
    strict: ClassVar[bool] = True

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return ctx.slots.float()
