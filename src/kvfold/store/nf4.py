"""NF4: 4-bit codes whose levels are quantiles of a normal distribution.

Dettmers et al., QLoRA (arXiv 2305.14314), section 3: x ≈ s · levels[c], s the largest magnitude of a group.

Differs from the paper, which quantizes weights, in that K is quantized per channel and around an offset, and V after a
rotation, like int4; scales are 8-bit codes on a logarithmic grid.
"""

from dataclasses import dataclass

from kvfold.registry import register
from kvfold.store import levels
from kvfold.store.table import TableStore


@register("store", "nf4")
@dataclass(frozen=True)
class NF4(TableStore):
    """4-bit NormalFloat codes."""

    def levels(self) -> tuple[float, ...]:
        return levels.nf4()
