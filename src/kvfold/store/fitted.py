"""A table whose levels are fitted to each block: one-dimensional k-means.

As kvfold.store.table, x ≈ s · levels[c] + z with s and z per token or per channel, but the levels are a field of the block,
found by Lloyd's iteration on all of its numbers after they have been scaled.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store import levels as known
from kvfold.store import scales as of
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.constants import sent, vector
from kvfold.store.pack import pack, unpack
from kvfold.store.scales import Axis, Scales


@dataclass(frozen=True)
class Fitted(TensorCodec):
    """Codes of 2, 3 or 4 bits into levels of the block's own.

    Args:
        bits: 2, 3 or 4.
        axis, group, scales: as for Affine; there is always an offset.
        rounds: Lloyd iterations, which start from the levels of a normal distribution.

    Fields as Table's with an offset, and `levels [..., 2^bits] half`, between -1 and 1.

    Round trip: the nearest level is chosen; the mean squared error of a block falls with each round, rounding of levels aside.
    """

    bits: int
    axis: Axis
    group: int = 64
    scales: Scales = "log8"
    rounds: int = 6

    @property
    def unit(self) -> Literal["token", "block"]:
        return "block"

    @property
    def block(self) -> int:
        return max(64, self.group)

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        over = of.over(self.axis)
        grouped = of.grouped(x, self.axis, self.group)
        low, high = grouped.amin(over), grouped.amax(over)
        zero = of.half((low + high) / 2)
        reach = torch.maximum(high - zero.float(), zero.float() - low)
        fields = of.store_scale(reach, self.axis, self.scales, nearest=True) | {"zero": zero}
        scale, zero = (y.unsqueeze(over) for y in self._scale_zero(fields))
        scaled = ((grouped - zero) / scale).view_as(x)
        levels = self._lloyd(scaled.flatten(-2))
        codes = _nearest(scaled.flatten(-2), levels.float()).view_as(x).to(torch.uint8)
        return {"codes": pack(self._lines(codes), self.bits), "levels": levels} | fields

    def decode(self, fields: Fields) -> torch.Tensor:
        values = self._values(fields)
        scale, zero = (y.unsqueeze(of.over(self.axis)) for y in self._scale_zero(fields))
        return (of.grouped(values, self.axis, self.group) * scale + zero).view_as(values)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.dot(q, self._values(fields), *self._scale_zero(fields), self.axis)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.combine(p, self._values(fields), *self._scale_zero(fields), self.axis)

    def _lines(self, codes: torch.Tensor) -> torch.Tensor:
        return codes if self.axis == "token" else codes.mT.contiguous()

    def _values(self, fields: Fields) -> torch.Tensor:
        """The levels of the codes, `[..., T, D] float32`."""
        codes = self._lines(unpack(fields["codes"], self.bits))
        return fields["levels"].float().gather(-1, codes.flatten(-2).long()).view(codes.shape)

    def _scale_zero(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        return of.load_scale(fields, self.axis, self.scales), fields["zero"].float()

    def _lloyd(self, x: torch.Tensor) -> torch.Tensor:
        """The levels of `x [..., n]`, `[..., 2^bits] half`, ascending."""
        start = sent(x.device, vector, known.on_a_sphere(self.bits, 64))
        levels = start * x.square().mean(-1, keepdim=True).sqrt()
        for _ in range(self.rounds):
            codes = _nearest(x, levels)
            sums = torch.zeros_like(levels).scatter_add(-1, codes, x)
            counts = torch.zeros_like(levels).scatter_add(-1, codes, torch.ones_like(x))
            # Means of neighbouring intervals are in order; a level that nothing is nearest to stays where it is, between them.
            levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
        return levels.half()


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """For `x [..., n]` the places of the nearest of `levels [..., L]`, long."""
    bounds = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(bounds.contiguous(), x.contiguous())
