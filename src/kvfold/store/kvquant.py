"""KVQuant: levels where the numbers are, and outliers apart: `kvquant(3)`.

Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization (arXiv 2401.18079): K per
channel (section 3.1), non-uniform levels shared by vectors that are scaled to the same range (section 3.3), the outliers of
every vector kept sparse (section 3.4), the first tokens dense (section 3.5).

    x ≈ s · levels[c] + z + sparse,   levels by k-means

Differs from the paper in that levels are fitted to each block of 64 tokens and KV head as it is encoded, by plain k-means,
where the paper calibrates them for a layer on a text, weighted by sensitivity; outliers are at least one of 64, so that
fields have a fixed shape; and keys are quantized after RoPE. Before RoPE they have steadier channels, but then every cached
key has to be turned to its position for every query: it does not fold.
"""

from dataclasses import dataclass
from typing import Literal

from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.base import KVCodec, Store, TensorCodec
from kvfold.store.fitted import Fitted
from kvfold.store.outliers import ONE_PERCENT, Outliers
from kvfold.store.scales import Axis, Scales


@register("store", "kvquant")
@dataclass(frozen=True)
class KVQuant(Store):
    """Fitted levels and sparse outliers, K per channel, V per token."""

    bits: Literal[2, 3, 4] = 3
    outliers: Percent = ONE_PERCENT
    group: Literal[16, 32, 64, 128] = 64
    scales: Scales = "log8"
    sink: int = 4
    window: int = 0

    def codec(self, site: Site) -> KVCodec:
        return KVCodec(self._side("channel"), self._side("token"))

    def _side(self, axis: Axis) -> TensorCodec:
        fitted = Fitted(self.bits, axis, self.group, self.scales)
        return Outliers(fitted, self.outliers, axis) if self.outliers.value else fitted
