"""Two codecs in a row: the second holds what the first one misses.

x ≈ x̂₁ + x̂₂, and so q · x = q · x̂₁ + q · x̂₂ and Σ p x = Σ p x̂₁ + Σ p x̂₂.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store.base import Fields, TensorCodec, join, part


@dataclass(frozen=True)
class Residual(TensorCodec):
    """`first` over the vectors, `second` over its errors. Neither folds anything into the query: a rotation goes around this
    one.

    Fields: those of the two as `first.*` and `second.*`.
    """

    first: TensorCodec
    second: TensorCodec

    @property
    def unit(self) -> Literal["token", "block"]:
        return "block" if "block" in (self.first.unit, self.second.unit) else "token"

    @property
    def block(self) -> int:
        return max(self.first.block, self.second.block)

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        first = self.first.encode(x)
        return join("first", first) | join("second", self.second.encode(x - self.first.decode(first)))

    def decode(self, fields: Fields) -> torch.Tensor:
        return self.first.decode(part("first", fields)) + self.second.decode(part("second", fields))

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.first.dot(q, part("first", fields)) + self.second.dot(q, part("second", fields))

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.first.combine(p, part("first", fields)) + self.second.combine(p, part("second", fields))
