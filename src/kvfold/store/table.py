"""Codes that name the levels of a table: x ≈ s · levels[c] + z.

What NF4, FP4 and Lloyd-Max quantizers (the best levels for a known distribution) have in common. A table of 2^bits entries fits
into a register, and is looked up as codes are loaded; the rest folds as for integers (kvfold.store.scales):

    scales per token     q · x_t   = s_t (q · l_t) + z_t Σq             l_t = levels[c_t]
    scales per channel   q · x_t   = (q ∘ s) · l_t + q · z
"""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from kvfold.site import Site
from kvfold.store import scales as of
from kvfold.store.base import Fields, KVCodec, Store, TensorCodec
from kvfold.store.constants import sent, vector
from kvfold.store.pack import pack, unpack
from kvfold.store.rotation import Rotated
from kvfold.store.scales import Axis, Scales

Fit = Literal["largest", "norm"]


@dataclass(frozen=True)
class Table(TensorCodec):
    """Codes of 2, 3 or 4 bits into fixed levels, with a scale for each group.

    Args:
        levels: 4, 8 or 16 numbers, ascending, the first below and the last above zero.
        axis, group, scales: as for Affine.
        offset: a half precision z for each scale. Without it z is zero.
        fit: where scales come from. `largest`: the ends of the group fall on the ends of the table, and nothing is clipped.
            `norm`: s is the group's root mean square (its standard deviation, with an offset): levels are those of a
            distribution with variance 1.
        refits: how often scales (and offsets) are fitted anew to the chosen levels by least squares, and levels chosen anew.

    Fields as Affine's: codes `[..., T, D * bits / 8]` per token and `[..., D, T * bits / 8]` per channel, as `pack` lays them;
    `scale`, `base` (log8 per channel) and `zero` (with an offset).

    Round trip, `largest` without refits: |x - decode(encode(x))| <= s · (largest gap between levels) / 2. The nearest level is
    always chosen.
    """

    levels: tuple[float, ...]
    axis: Axis = "token"
    group: int = 64
    offset: bool = False
    scales: Scales = "half"
    fit: Fit = "largest"
    refits: int = 0

    def __post_init__(self) -> None:
        if len(self.levels) not in (4, 8, 16) or any(a > b for a, b in pairwise(self.levels)):
            raise ValueError(f"a table has 4, 8 or 16 levels in ascending order, not {self.levels}")
        if not self.levels[0] < 0 < self.levels[-1]:
            raise ValueError(f"a table reaches from below zero to above it, not from {self.levels[0]} to {self.levels[-1]}")

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token" if self.axis == "token" else "block"

    @property
    def block(self) -> int:
        return max(64, self.group) if self.axis == "channel" else 64

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        fields = self.fit_scales(x)
        codes = self._nearest(of.grouped(x, self.axis, self.group), fields).view_as(x)
        return {"codes": pack(self._lines(codes), self.bits)} | fields

    def fit_scales(self, x: torch.Tensor) -> Fields:
        """All fields but the codes, which are then the nearest levels: `x [..., T, D] float32`."""
        grouped = of.grouped(x, self.axis, self.group)
        fields = self._store(*self._fit(grouped), nearest=self._clips_little())
        for _ in range(self.refits):
            levels = self._levels(x)[self._nearest(grouped, fields).int()]
            fields = self._store(*_least_squares(grouped, levels, of.over(self.axis), self.offset), nearest=True)
        return fields

    def load_scales(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and, where there are offsets, these: `[..., T, D/g]` or `[..., T/g, D] float32`."""
        return of.load_scale(fields, self.axis, self.scales), fields["zero"].float() if self.offset else None

    def middles(self, like: torch.Tensor) -> torch.Tensor:
        """Between neighbouring levels, `[2^bits - 1] float32`: a code is how many of these are below its number."""
        levels = self._levels(like)
        return (levels[1:] + levels[:-1]) / 2

    def decode(self, fields: Fields) -> torch.Tensor:
        values = self._values(fields)
        scale, zero = self.load_scales(fields)
        over = of.over(self.axis)
        scaled = of.grouped(values, self.axis, self.group) * scale.unsqueeze(over)
        return (scaled if zero is None else scaled + zero.unsqueeze(over)).view_as(values)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.dot(q, self._values(fields), *self.load_scales(fields), self.axis)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.combine(p, self._values(fields), *self.load_scales(fields), self.axis)

    def _lines(self, codes: torch.Tensor) -> torch.Tensor:
        """What shares its scales lies together, as in Affine."""
        return codes if self.axis == "token" else codes.mT.contiguous()

    def _levels(self, like: torch.Tensor) -> torch.Tensor:
        return sent(like.device, vector, self.levels)

    def _values(self, fields: Fields) -> torch.Tensor:
        """The levels of the codes, `[..., T, D] float32`."""
        return self._levels(fields["codes"])[self._lines(unpack(fields["codes"], self.bits)).int()]

    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and offsets of groups, without their axis."""
        over = of.over(self.axis)
        if self.fit == "norm":
            zero = of.half(grouped.mean(over)) if self.offset else None
            centred = grouped if zero is None else grouped - zero.float().unsqueeze(over)
            return centred.square().mean(over).sqrt(), zero
        low, high = grouped.amin(over), grouped.amax(over)  # aminmax takes ten times as long
        first, last = self.levels[0], self.levels[-1]
        if not self.offset:
            return torch.maximum(high / last, low / first), None
        zero = of.half((low * last - high * first) / (last - first))
        return torch.maximum((high - zero.float()) / last, (low - zero.float()) / first), zero

    def _store(self, scale: torch.Tensor, zero: torch.Tensor | None, *, nearest: bool) -> Fields:
        fields = of.store_scale(scale, self.axis, self.scales, nearest=nearest)
        return fields if zero is None else fields | {"zero": zero}

    def _clips_little(self) -> bool:
        """Whether scales may be rounded to the nearest: the ends then move by less than half the gap to their neighbours."""
        if self.fit == "norm":
            return True
        ends = self.levels[1] - self.levels[0], self.levels[-1] - self.levels[-2]
        return of.largest_clip(self.axis, self.scales) * max(-self.levels[0], self.levels[-1]) < min(ends) / 2

    def _nearest(self, grouped: torch.Tensor, fields: Fields) -> torch.Tensor:
        """Codes of the levels that are nearest, in the shape of `grouped`."""
        over = of.over(self.axis)
        scale, zero = self.load_scales(fields)
        scaled = (grouped if zero is None else grouped - zero.unsqueeze(over)) / scale.unsqueeze(over)
        return torch.bucketize(scaled.contiguous(), self.middles(scaled), out_int32=True).to(torch.uint8)


def _least_squares(x: torch.Tensor, levels: torch.Tensor, over: int, offset: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The s (and z) that bring `s · levels + z` nearest to x along an axis; s is 0 where a group has one level only."""
    tiny = torch.finfo(torch.float32).tiny
    if not offset:
        return ((x * levels).sum(over) / levels.square().sum(over).clamp_min(tiny)).clamp_min(0), None
    x_mean, mean = x.mean(over, keepdim=True), levels.mean(over, keepdim=True)
    spread = (levels - mean).square().sum(over)
    scale = (((x - x_mean) * (levels - mean)).sum(over) / spread.clamp_min(tiny)).clamp_min(0)
    return scale, of.half(x_mean.squeeze(over) - scale * mean.squeeze(over))


@dataclass(frozen=True)
class TableStore(Store):
    """K and V by the same levels, with everything else adjustable: what `nf4` and `fp4` share.

    The defaults are int4's: K per channel with an offset, as keys are not centred, V rotated and per token without.
    """

    k_axis: Axis = "channel"
    v_axis: Axis = "token"
    k_group: Literal[16, 32, 64, 128] = 64
    v_group: Literal[16, 32, 64, 128] = 64
    scales: Scales = "log8"
    offset: Literal["none", "k", "v", "kv"] = "k"
    rotate: Literal["none", "k", "v", "kv"] = "v"
    sink: int = 4
    window: int = 0

    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The table."""

    def codec(self, site: Site) -> KVCodec:
        k: TensorCodec = Table(self.levels(), self.k_axis, self.k_group, "k" in self.offset, self.scales)
        v: TensorCodec = Table(self.levels(), self.v_axis, self.v_group, "v" in self.offset, self.scales)
        if "k" in self.rotate:
            k = Rotated(k, site.head_dim)
        if "v" in self.rotate:
            v = Rotated(v, site.head_dim)
        return KVCodec(k, v)
