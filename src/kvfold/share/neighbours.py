"""Layers that use their neighbour's keys and values: `share(start=50%)`.

Brandon et al., Reducing Transformer Key-Value Cache Size with Cross-Layer Attention (arXiv 2405.12981), section 3: in a group
of `every` layers only the first computes keys and values, and all of them attend to these with queries of their own.

Differs from the paper in that the model was not trained for it: here the other layers' own keys and values are thrown away.
That costs far more than any codec at the same bytes (docs/log.md); it is what sharing is worth without training, and the
mechanism for models that were trained with it.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.errors import PlanError
from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.share.base import Sharing


@register("share", "share")
@dataclass(frozen=True)
class Share(Sharing):
    """Groups of `every` layers hold the keys and values of their first one."""

    start: Percent = Percent(0.5)
    every: int = 2
    merges: ClassVar[bool] = False

    @property
    def size(self) -> int:
        return self.every

    def check(self) -> None:
        super().check()
        if self.every < 2:
            raise PlanError(f"share: every={self.every} shares nothing; give at least 2")
