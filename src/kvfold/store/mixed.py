"""One codec for K and another for V: `mixed(k=int8, v=int4)`.

K needs more bits than V: its errors are amplified by the softmax, those of V are averaged by it (KIVI, arXiv
2402.02750, section 3.2; KVTuner, arXiv 2502.04420, measures it layer by layer).
"""

from dataclasses import dataclass, field

from kvfold.errors import PlanError
from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.base import KVCodec, Store
from kvfold.store.integer import Int4, Int8


@register("store", "mixed")
@dataclass(frozen=True)
class Mixed(Store):
    """K as the first codec holds it, V as the second does."""

    k: Store = field(default_factory=Int8)
    v: Store = field(default_factory=Int4)

    @property
    def sink(self) -> int:
        return max(self.k.sink, self.v.sink)

    @property
    def window(self) -> int:
        return max(self.k.window, self.v.window)

    def check(self) -> None:
        self.k.check()
        self.v.check()

    def codec(self, site: Site) -> KVCodec:
        codec = KVCodec(self.k.codec(site).k, self.v.codec(site).v)
        if codec.positional and codec.unit == "block":
            raise PlanError(f"mixed: {self.k.name} encodes token by token, but {self.v.name} holds V in whole blocks")
        return codec
