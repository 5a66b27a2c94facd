"""`int8`, `int4`, `int2`: the codecs to use when nothing else is known, with everything adjustable.

The defaults are the best that were found by KL on real models at no more than 8.5, 4.5 and 2.5 bits an element with everything
counted, and that hold on models with large k_proj biases; docs/log.md has the comparison.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import KVCodec, Store, TensorCodec
from kvfold.store.rotation import Rotated
from kvfold.store.scales import Axis, Scales

Group = Literal[16, 32, 64, 128]


@dataclass(frozen=True)
class _Integer(Store):
    k_axis: Axis = "channel"
    v_axis: Axis = "token"
    k_group: Group = 64
    v_group: Group = 64
    scales: Scales = "log8"
    symmetric: Literal["none", "k", "v", "kv"] = "v"
    rotate: Literal["none", "k", "v", "kv"] = "v"
    sink: int = 4
    window: int = 0
    bits: ClassVar[int]

    def codec(self, site: Site) -> KVCodec:
        k: TensorCodec = Affine(self.bits, self.k_axis, self.k_group, "k" in self.symmetric, self.scales)
        v: TensorCodec = Affine(self.bits, self.v_axis, self.v_group, "v" in self.symmetric, self.scales)
        if "k" in self.rotate:
            k = Rotated(k, site.head_dim)
        if "v" in self.rotate:
            v = Rotated(v, site.head_dim)
        return KVCodec(k, v)


@register("store", "int8")
@dataclass(frozen=True)
class Int8(_Integer):
    """8-bit integers."""

    bits: ClassVar[int] = 8


@register("store", "int4")
@dataclass(frozen=True)
class Int4(_Integer):
    """4-bit integers, two to a byte."""

    bits: ClassVar[int] = 4


@register("store", "int2")
@dataclass(frozen=True)
class Int2(_Integer):
    """2-bit integers, four to a byte."""

    bits: ClassVar[int] = 2
