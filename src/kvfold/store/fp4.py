"""FP4: 4-bit floats, e2m1.

The element of MXFP4 and NVFP4 (OCP Microscaling Formats, version 1.0, section 5.3.3): x ≈ s · levels[c] with
levels ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}.

Differs from both in the scales, which are kvfold's: groups of 64, 8-bit codes on a logarithmic grid, and an offset for K.
MXFP4 has a power of two for 32 numbers, NVFP4 an 8-bit float for 16.
"""

from dataclasses import dataclass

from kvfold.registry import register
from kvfold.store import levels
from kvfold.store.table import TableStore


@register("store", "fp4")
@dataclass(frozen=True)
class FP4(TableStore):
    """4-bit floats."""

    def levels(self) -> tuple[float, ...]:
        return levels.e2m1()
