"""GEAR: codes, a few outliers, and a low rank part for what both miss: `gear(int4, rank=4, outliers=1%)`.

Kang et al., GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (arXiv 2403.05527),
equation 5 and algorithm 1:

    X ≈ D̂ + L + S,   S the outliers of X,   D̂ = quantized X - S,   L = A Bᵀ of rank r ≈ X - S - D̂, one for each KV head

K's outliers are those of a channel, V's those of a token. Folded: D̂ as its codec does, L as two skinny products (q B) Aᵀ, S
as a sparse product.

Differs from the paper in that its buffer of new tokens leaves in blocks: A and B belong to `buffer` tokens, where the paper has
one pair for the whole prompt and small ones for what follows, so B weighs more (rank 4 over 64 tokens of 64 channels is 2
bits an element, over 256 tokens 1.25); outliers are at least one a line. Any codec can do the quantizing.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import AroundStore, KVCodec, Store, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.integer import Int4
from kvfold.store.outliers import ONE_PERCENT, Outliers
from kvfold.store.residual import Residual
from kvfold.store.rotation import Rotated
from kvfold.store.scales import Axis
from kvfold.store.subspace import Subspace
from kvfold.store.table import Table


@register("store", "gear")
@dataclass(frozen=True)
class Gear(AroundStore):
    """Another codec, with its outliers and its largest errors repaired."""

    codes: Store = field(default_factory=Int4)
    rank: int = 4
    outliers: Percent = ONE_PERCENT
    buffer: Literal[64, 128, 256] = 64
    factors: Literal["half", "int8"] = "half"

    def check(self) -> None:
        super().check()
        if self.rank > self.buffer:
            raise PlanError(f"gear: a rank of {self.rank} is more than the {self.buffer} tokens of its buffer")
        if self.rank == 0 and not self.outliers.value:
            raise PlanError("gear: rank=0 and outliers=0% repair nothing; write the codec alone")

    def codec(self, site: Site) -> KVCodec:
        if self.rank > site.head_dim:
            raise PlanError(f"gear: a rank of {self.rank} is more than the head dim of {site.head_dim}")
        codec = self.codes.codec(site)
        if codec.positional:
            raise PlanError(f"gear can't repair {self.codes.name}, which has to know the positions of keys")
        return KVCodec(self._repaired(codec.k), self._repaired(codec.v))

    def _repaired(self, codec: TensorCodec) -> TensorCodec:
        if isinstance(codec, Rotated):
            return Rotated(self._repaired(codec.inner), codec.head_dim, codec.rotation)
        if self.outliers.value:
            codec = Outliers(codec, self.outliers, _axis(codec))
        if not self.rank:
            return codec
        factor: TensorCodec = DenseCodec(torch.float16)
        if self.factors == "int8":
            factor = Affine(8, "channel", 64, symmetric=True)
        return Residual(codec, Subspace(factor, self.rank, self.buffer))


def _axis(codec: TensorCodec) -> Axis:
    """Outliers belong to those numbers that share a scale."""
    return codec.axis if isinstance(codec, (Affine, Table)) else "token"
