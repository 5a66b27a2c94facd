"""Tokens as they are, in the model's own type: what `full` holds, and the oracle's idea of a codec."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.base import Fields, KVCodec, Store, TensorCodec


@dataclass(frozen=True)
class DenseCodec(TensorCodec):
    """The identity. `dtype` is the model's."""

    dtype: torch.dtype

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token"

    def encode(self, x: torch.Tensor) -> Fields:
        return {"x": x.to(self.dtype)}

    def decode(self, fields: Fields) -> torch.Tensor:
        return fields["x"].float()

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return q @ fields["x"].float().mT

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return p @ fields["x"].float()


@register("store", "dense")
@dataclass(frozen=True)
class Dense(Store):
    """Keeps K and V in the model's own type."""

    sink: int = 0
    window: int = 0

    def codec(self, site: Site) -> KVCodec:
        return KVCodec(DenseCodec(site.dtype), DenseCodec(site.dtype))
