"""Keys and values of the prompt itself in few dimensions: `lowrank(50%)`.

K and V of a text lie near a subspace that changes slowly (ShadowKV, arXiv 2410.21465, section 3.1; Eigen Attention, arXiv
2408.05646, section 3): X ≈ Z Bᵀ with the principal directions B of the block's own keys (after RoPE) and values. Attention
folds B into the query and out of the output, q · x_t = (q B) · z_t, and works on r numbers a token.

Differs from both in that there is nothing to calibrate and keys are taken as they are, after RoPE: every `tokens` tokens get
a basis of their own. It costs D · r numbers for each, so that blocks are long, and up to `tokens` - 1 recent tokens wait
dense.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import KVCodec, Store, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.subspace import Subspace

HALF = Percent(0.5)


@register("store", "lowrank")
@dataclass(frozen=True)
class LowRank(Store):
    """A share of the dimensions for K and V, in halves or integers."""

    rank: Percent = HALF
    tokens: Literal[64, 128, 256, 512, 1024] = 256
    codes: Literal["half", "int8", "int4"] = "int8"
    sink: int = 4
    window: int = 0

    def check(self) -> None:
        if not self.rank.value:
            raise PlanError("lowrank: a rank of 0% holds nothing; 50% keeps half of the dimensions")

    def codec(self, site: Site) -> KVCodec:
        codec = Subspace(self._coordinates(), self.rank.of(site.head_dim), self.tokens)
        return KVCodec(codec, codec)

    def _coordinates(self) -> TensorCodec:
        if self.codes == "half":
            return DenseCodec(torch.float16)
        # Directions differ in size, so each has a scale of its own.
        return Affine(int(self.codes.removeprefix("int")), "channel", 64)
