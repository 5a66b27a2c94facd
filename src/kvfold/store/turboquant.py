"""TurboQuant: a random rotation, then the best levels for what a rotated coordinate looks like: `turboquant(3)`.

Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate (arXiv 2504.19874), algorithm 1. For an
orthogonal random Π every coordinate of Π x / |x| has the same known distribution, so that one table of Lloyd-Max levels serves
every vector, with no calibration:

    x ≈ |x| / sqrt(D) · Πᵀ levels[c],   c_j nearest to (Π x)_j sqrt(D) / |x|
    E |x - x̂|² <= sqrt(3) π / 2 · 4^-bits |x|²  (theorem 1)

Π is folded into the query and out of the output, the norm into the score and the probability.

Differs from the paper in that it has no second stage: QJL's bit makes inner products unbiased (algorithm 2) but adds variance,
which softmax amplifies. Outlier channels get no bits of their own (their 2.5 and 3.5 bits do that). Norms are 8-bit codes on a
logarithmic grid unless `norms=half`; 4 sinks are dense.

Keys that share a large offset (k_proj biases of Qwen2) have directions that are far from evenly spread, and the rotation smears
the offset over all channels: there `mixed(k=int4, v=turboquant(3))` is the way (docs/log.md).
"""

from dataclasses import dataclass
from typing import Literal

from kvfold.registry import register
from kvfold.site import Site
from kvfold.store import levels
from kvfold.store.base import KVCodec, Store
from kvfold.store.rotation import Rotated
from kvfold.store.scales import Scales
from kvfold.store.table import Table


@register("store", "turboquant")
@dataclass(frozen=True)
class TurboQuant(Store):
    """Rotated Lloyd-Max codes of 2, 3 or 4 bits with a norm for each token."""

    bits: Literal[2, 3, 4] = 3
    norms: Scales = "log8"
    rotation: Literal["random", "hadamard"] = "random"
    sink: int = 4
    window: int = 0

    def codec(self, site: Site) -> KVCodec:
        table = levels.on_a_sphere(self.bits, site.head_dim)
        codec = Rotated(Table(table, "token", site.head_dim, scales=self.norms, fit="norm"), site.head_dim, self.rotation)
        return KVCodec(codec, codec)
