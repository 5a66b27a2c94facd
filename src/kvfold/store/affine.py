"""Uniform integer codes with a scale, and a zero point or none: int8, int4 and int2.

x ≈ s · c + z, with c in 0 … 2^bits - 1. KIVI (arXiv 2402.02750, section 3) found that K wants its scales per channel, as
a few channels are large in every token, and V per token. The default `int4` and `int8` follow from measurements in
docs/log.md.

Folding, for a query q and probabilities p (c: codes):

    scales per token     q · x_t   = s_t (q · c_t) + z_t Σq             Σ p_t x_t = Σ (p_t s_t) c_t + Σ p_t z_t
    scales per channel   q · x_t   = (q ∘ s) · c_t + q · z              Σ p_t x_t = s ∘ Σ p_t c_t + z Σ p_t

Differs from KIVI in that scales and zeros are rounded outwards before the codes are computed, so that no value is clipped
and the error is at most half a step of the numbers that are really stored.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store.base import Fields, TensorCodec
from kvfold.store.pack import pack, unpack

# Half precision rounds by at most 2^-11 of a number; a little more makes 'outwards' safe against the second rounding.
_ROUND = 1.001 * 2.0**-11
_TINY = 2.0**-24  # smallest positive half: keeps steps above zero

Axis = Literal["token", "channel"]


@dataclass(frozen=True)
class Affine(TensorCodec):
    """Integer codes with half precision scales (and zero points when asymmetric).

    Args:
        bits: 8, 4 or 2.
        axis: `token`: a scale for each token and each `group` of its channels. `channel`: a scale for each channel and
            each `group` of tokens.
        group: numbers that share a scale. Along channels it is taken up to the next divisor of the head dim.
        symmetric: no zero point: levels are s · (c - (2^bits - 1) / 2).

    Round trip: |x - decode(encode(x))| <= step / 2, where step is the stored scale.
    """

    bits: int
    axis: Axis = "token"
    group: int = 64
    symmetric: bool = False

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token" if self.axis == "token" else "block"

    @property
    def block(self) -> int:  # type: ignore[override]
        return max(64, self.group) if self.axis == "channel" else 64

    def _middle(self) -> float:
        return (2**self.bits - 1) / 2

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        levels = 2**self.bits - 1
        grouped = self._grouped(x)
        over = -1 if self.axis == "token" else -2
        low, high = grouped.aminmax(dim=over, keepdim=True)
        if self.symmetric:
            step = 2 * torch.maximum(high, -low) / levels
        else:
            zero = _half(low - low.abs() * _ROUND - _TINY)
            step = (high - zero.float()) / levels
        scale = _half((step * (1 + _ROUND)).clamp_min(_TINY))
        start = -self._middle() * scale.float() if self.symmetric else zero.float()
        codes = ((grouped - start) / scale.float()).round_().clamp_(0, levels).to(torch.uint8).view_as(x)
        fields = {"codes": pack(codes, self.bits), "scale": scale.squeeze(over)}
        if not self.symmetric:
            fields["zero"] = zero.squeeze(over)
        return fields

    def decode(self, fields: Fields) -> torch.Tensor:
        codes = unpack(fields["codes"], self.bits).float()
        over = -1 if self.axis == "token" else -2
        scale = fields["scale"].float().unsqueeze(over)
        zero = -self._middle() * scale if self.symmetric else fields["zero"].float().unsqueeze(over)
        return (self._grouped(codes) * scale + zero).view_as(codes)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        codes = unpack(fields["codes"], self.bits).float()
        scale, zero = self._scale_zero(fields)
        if self.axis == "token":
            scores: torch.Tensor | float = 0.0
            for g, (q_g, codes_g) in enumerate(zip(_chunks(q, scale), _chunks(codes, scale), strict=True)):
                product = q_g @ codes_g.mT
                scores = scores + scale[..., None, :, g] * product + zero[..., None, :, g] * q_g.sum(-1, keepdim=True)
            assert isinstance(scores, torch.Tensor)
            return scores
        parts = []
        for g, codes_g in enumerate(codes.chunk(scale.shape[-2], dim=-2)):
            parts.append((q * scale[..., g, None, :]) @ codes_g.mT + (q * zero[..., g, None, :]).sum(-1, keepdim=True))
        return torch.cat(parts, dim=-1)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        codes = unpack(fields["codes"], self.bits).float()
        scale, zero = self._scale_zero(fields)
        if self.axis == "token":
            parts = []
            for g, codes_g in enumerate(_chunks(codes, scale)):
                offset = p @ zero[..., :, g, None]
                parts.append((p * scale[..., None, :, g]) @ codes_g + offset)
            return torch.cat(parts, dim=-1)
        out: torch.Tensor | float = 0.0
        num_groups = scale.shape[-2]
        for g, (p_g, codes_g) in enumerate(
            zip(p.chunk(num_groups, dim=-1), codes.chunk(num_groups, dim=-2), strict=True)
        ):
            out = out + scale[..., g, None, :] * (p_g @ codes_g) + zero[..., g, None, :] * p_g.sum(-1, keepdim=True)
        assert isinstance(out, torch.Tensor)
        return out

    def _scale_zero(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        scale = fields["scale"].float()
        return scale, -self._middle() * scale if self.symmetric else fields["zero"].float()

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., T, D]` to `[..., T, D/g, g]` (token) or `[..., T/g, g, D]` (channel)."""
        *lead, num_tokens, head_dim = x.shape
        if self.axis == "token":
            return x.view(*lead, num_tokens, -1, channel_group(head_dim, self.group))
        return x.view(*lead, -1, self.group, head_dim)


def channel_group(head_dim: int, group: int) -> int:
    """The smallest divisor of `head_dim` that is at least `group`: 64 of 128, but 80 of 80."""
    return next(g for g in range(min(group, head_dim), head_dim + 1) if head_dim % g == 0)


def _chunks(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.chunk(scale.shape[-1], dim=-1)


def _half(x: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()
