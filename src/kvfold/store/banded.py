"""`banded(2.5)`: as many bits an element as asked for, where they do most good; calibrated, the best quality per byte here.

With `calibrated=true` a layer's tokens are held in coordinates that `kvfold calibrate` made for this very model: uncorrelated,
and weighted by what an error costs (kvfold.lab.calibrate). Bits go to layers, to K or V, and to coordinates by reverse
water-filling (kvfold.store.allocation), the codes are those of kvfold.store.bands. It is transform coding, as in KVTC
(arXiv 2511.01815), but of a cache that is attended to as it lies.

Without a calibration every channel of K has the same bits, every one of V the same or one fewer, and V is rotated: nothing is
known of the model then but that a few entries of K stand out.

Differs from KVTC in that keys keep their rotary positions, coordinates are weighted by the loss and not by the error alone,
bases are one for each head, and codes have fixed lengths, so that attention reads them as they are.
"""

from dataclasses import dataclass
from typing import Literal

from kvfold.calibration import Calibration
from kvfold.errors import PlanError
from kvfold.frame import Frame
from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.allocation import allocate, even
from kvfold.store.bands import Bands
from kvfold.store.base import KVCodec, Store
from kvfold.store.rotation import Rotated

Bits = Literal["1", "1.25", "1.5", "1.75", "2", "2.25", "2.5", "2.75", "3", "3.25", "3.5", "3.75", "4", "4.5", "5", "5.5", "6"]


@register("store", "banded")
@dataclass(frozen=True)
class Banded(Store):
    """A mean number of bits an element, scales and outliers of a block counted; dense tokens come on top.

    Args:
        bits: K and V together.
        calibrated: use this model's calibration; an error where there is none.
        outliers: entries of K that are mended in each block of 64 tokens and head.
    """

    bits: Bits = "2.5"
    calibrated: bool = False
    outliers: int = 4
    sink: int = 4
    window: int = 0

    def check(self) -> None:
        if self.outliers > 64:
            raise PlanError(f"banded: outliers={self.outliers} is more than one a token; write 64 or fewer")

    def codec(self, site: Site) -> KVCodec:
        if not self.calibrated:
            k, v = even(site.head_dim, float(self.bits), self.outliers)
            rotated = Rotated(Bands((v,) * site.head_dim), site.head_dim)
            return KVCodec(Bands((k,) * site.head_dim, self.outliers, exact_zeros=True), rotated)
        known = self._calibration(site)
        k_bits, v_bits = allocate(known.k_loss, known.v_loss, float(self.bits), self.outliers)[site.layer]
        return KVCodec(Bands(k_bits, self.outliers), Bands(v_bits))

    def frame(self, site: Site) -> Frame | None:
        return self._calibration(site).frame(site.layer) if self.calibrated else None

    @staticmethod
    def _calibration(site: Site) -> Calibration:
        if site.model is None:
            raise PlanError("'banded(calibrated=true)' belongs to a model: attach it to one")
        return site.model.calibration()
