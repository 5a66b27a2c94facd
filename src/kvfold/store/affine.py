"""Uniform integer codes with a scale, and a zero point or none: int8, int4 and int2.

x ≈ s · c + z, with c in 0 … 2^bits - 1, folded as kvfold.store.scales says. KIVI (arXiv 2402.02750, section 3) found that K
wants its scales per channel, as a few channels are large in every token, and V per token. The default `int4` and `int8` follow
from measurements in docs/log.md.

Differs from KIVI in that scales and zeros are rounded outwards before the codes are computed, so that no value is clipped
and the error is at most half a step of the numbers that are really stored. Scales as `log8` are rounded to the nearest
where the ends of the range then move by less than half a step (up to 4 bits), else upwards.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store import scales as of
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.pack import pack, unpack
from kvfold.store.scales import Axis, Scales


@dataclass(frozen=True)
class Affine(TensorCodec):
    """Integer codes with half precision scales (and zero points when asymmetric).

    Args:
        bits: 8, 4 or 2.
        axis: `token`: a scale for each token and each `group` of its channels. `channel`: a scale for each channel and
            each `group` of tokens.
        group: numbers that share a scale. Along channels it is taken up to the next divisor of the head dim.
        symmetric: no zero point: levels are s · (c - (2^bits - 1) / 2).
        scales: how scales are stored; per channel `log8` also has a field `base [..., 1]`.

    Codes are `[..., T, D * bits / 8] uint8` per token and `[..., D, T * bits / 8]` per channel: so the codes that share a
    scale lie side by side, and a kernel multiplies a whole vector of them with one number of the query or the probabilities.

    Round trip: |x - decode(encode(x))| <= step / 2, where step is the stored scale.
    """

    bits: int
    axis: Axis = "token"
    group: int = 64
    symmetric: bool = False
    scales: Scales = "half"

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token" if self.axis == "token" else "block"

    @property
    def block(self) -> int:
        return max(64, self.group) if self.axis == "channel" else 64

    def _lines(self, codes: torch.Tensor) -> torch.Tensor:
        """What shares its scales lies together: `[..., T, D]` per token, `[..., D, T]` per channel, and back."""
        return codes if self.axis == "token" else codes.mT.contiguous()

    def _middle(self) -> float:
        return (2**self.bits - 1) / 2

    @property
    def nearest(self) -> bool:
        """Whether log8 scales are rounded to the nearest: the ends of the range then move by less than half a step."""
        return of.largest_clip(self.axis, self.scales) * (self._middle() if self.symmetric else 2 * self._middle()) < 0.5

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        levels = 2**self.bits - 1
        grouped = of.grouped(x, self.axis, self.group)
        over = of.over(self.axis)
        low, high = grouped.aminmax(dim=over, keepdim=True)
        if self.symmetric:
            step = 2 * torch.maximum(high, -low) / levels
        else:
            zero = of.half_below(low)
            step = (high - zero.float()) / levels
        fields = of.store_scale(step.squeeze(over), self.axis, self.scales, nearest=self.nearest)
        if not self.symmetric:
            fields["zero"] = zero.squeeze(over)
        scale, start = (y.unsqueeze(over) for y in self._scale_zero(fields))
        codes = ((grouped - start) / scale).round_().clamp_(0, levels).to(torch.uint8).view_as(x)
        return {"codes": pack(self._lines(codes), self.bits)} | fields

    def decode(self, fields: Fields) -> torch.Tensor:
        codes = self._codes(fields)
        scale, zero = (y.unsqueeze(of.over(self.axis)) for y in self._scale_zero(fields))
        return (of.grouped(codes, self.axis, self.group) * scale + zero).view_as(codes)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.dot(q, self._codes(fields), *self._scale_zero(fields), self.axis)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return of.combine(p, self._codes(fields), *self._scale_zero(fields), self.axis)

    def _codes(self, fields: Fields) -> torch.Tensor:
        """`[..., T, D] float32`."""
        return self._lines(unpack(fields["codes"], self.bits)).float()

    def _scale_zero(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        scale = of.load_scale(fields, self.axis, self.scales)
        return scale, -self._middle() * scale if self.symmetric else fields["zero"].float()
