"""KIVI: K in groups per channel, V in groups per token, the newest tokens dense: `kivi(int2)`.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750), section 3.3 and
Algorithm 1. The defaults are the paper's: groups of 32 and a residual of 128 tokens in full precision. Two bits with
a half precision scale and zero for 32 numbers are 3 bits.

Differs from the paper in that K and V leave the residual together, in blocks of 64 tokens, so that it holds `residual` to
`residual + 63` of both. The paper's holds `residual` values, but empties of keys whenever it has filled: 0 to `residual - 1`.
At 128 that is 32 dense values and 96 dense keys less, on average, than here.
"""

from dataclasses import dataclass
from typing import Literal

from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import KVCodec, Store


@register("store", "kivi")
@dataclass(frozen=True)
class Kivi(Store):
    """K per channel, V per token, asymmetric, with a dense residual."""

    codes: Literal["int2", "int4", "int8"] = "int2"
    group: Literal[16, 32, 64, 128] = 32
    residual: int = 128
    sink: int = 0

    @property
    def window(self) -> int:
        return self.residual

    def codec(self, site: Site) -> KVCodec:
        bits = int(self.codes.removeprefix("int"))
        return KVCodec(Affine(bits, "channel", self.group), Affine(bits, "token", self.group))
