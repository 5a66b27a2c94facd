"""Uniform integer codes with a scale, and a zero point or none: int8, int4 and int2.

x ≈ s · c + z, with c in 0 … 2^bits - 1. KIVI (arXiv 2402.02750, section 3) found that K wants its scales per channel, as
a few channels are large in every token, and V per token. The default `int4` and `int8` follow from measurements in
docs/log.md.

Folding, for a query q and probabilities p (c: codes):

    scales per token     q · x_t   = s_t (q · c_t) + z_t Σq             Σ p_t x_t = Σ (p_t s_t) c_t + Σ p_t z_t
    scales per channel   q · x_t   = (q ∘ s) · c_t + q · z              Σ p_t x_t = s ∘ Σ p_t c_t + z Σ p_t

Differs from KIVI in that scales and zeros are rounded outwards before the codes are computed, so that no value is clipped
and the error is at most half a step of the numbers that are really stored.

Scales in half precision cost 0.25 bits an element in groups of 64. With `scales="log8"` they are 8-bit codes on a
logarithmic grid: per channel 2^(-c/24) of the block's largest step, which is kept in half precision (double
quantization, as in QLoRA, arXiv 2305.14314, section 3); per token 2^(12 - c/8), with nothing else to keep. They are
rounded to the nearest where the ends of the range then move by less than half a step (up to 4 bits), else upwards.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.store.base import Fields, TensorCodec
from kvfold.store.pack import pack, unpack

# Half precision rounds by at most 2^-11 of a number; a little more makes 'outwards' safe against the second rounding.
_ROUND = 1.001 * 2.0**-11
_TINY = 2.0**-24  # smallest positive half: keeps steps above zero

# The grids of 8-bit scales, in codes an octave: 256 codes span 10 octaves below a block's largest step, or 32 below 2^12.
_PER_OCTAVE = {"channel": 24.0, "token": 8.0}
_LARGEST_TOKEN_STEP = 2.0**12

Axis = Literal["token", "channel"]
Scales = Literal["half", "log8"]


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
    def reach(self) -> float:
        """How many steps a level can be from the number that is stored for it."""
        return self._middle() if self.symmetric else 2 * self._middle()

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
        fields = self._store_scale(step.squeeze(over))
        if not self.symmetric:
            fields["zero"] = zero.squeeze(over)
        scale, start = (y.unsqueeze(over) for y in self._scale_zero(fields))
        codes = ((grouped - start) / scale).round_().clamp_(0, levels).to(torch.uint8).view_as(x)
        return {"codes": pack(self._lines(codes), self.bits)} | fields

    def decode(self, fields: Fields) -> torch.Tensor:
        codes = self._lines(unpack(fields["codes"], self.bits)).float()
        over = -1 if self.axis == "token" else -2
        scale, zero = (y.unsqueeze(over) for y in self._scale_zero(fields))
        return (self._grouped(codes) * scale + zero).view_as(codes)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        codes = self._lines(unpack(fields["codes"], self.bits)).float()
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
        codes = self._lines(unpack(fields["codes"], self.bits)).float()
        scale, zero = self._scale_zero(fields)
        if self.axis == "token":
            parts = []
            for g, codes_g in enumerate(_chunks(codes, scale)):
                offset = p @ zero[..., :, g, None]
                parts.append((p * scale[..., None, :, g]) @ codes_g + offset)
            return torch.cat(parts, dim=-1)
        out: torch.Tensor | float = 0.0
        num_groups = scale.shape[-2]
        for g, (p_g, codes_g) in enumerate(zip(p.chunk(num_groups, dim=-1), codes.chunk(num_groups, dim=-2), strict=True)):
            out = out + scale[..., g, None, :] * (p_g @ codes_g) + zero[..., g, None, :] * p_g.sum(-1, keepdim=True)
        assert isinstance(out, torch.Tensor)
        return out

    def _store_scale(self, step: torch.Tensor) -> Fields:
        """Steps, `[..., T, D/g]` or `[..., T/g, D]`, rounded up to what is stored."""
        if self.scales == "half":
            return {"scale": _half_above(step)}
        if self.axis == "token":
            return {"scale": self._log_codes(step, torch.full_like(step, _LARGEST_TOKEN_STEP))}
        base = _half_above(step.amax((-2, -1))).unsqueeze(-1)
        return {"scale": self._log_codes(step, base.float().unsqueeze(-1)), "base": base}

    def _log_codes(self, step: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Codes of scales on the grid: the nearest, or where that could clip by more than half a step the next above."""
        bounds = scale_bounds(self).to(step.device)
        return torch.bucketize(largest / step.clamp_min(_TINY / 256), bounds, right=True).to(torch.uint8)

    def _scale_zero(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        scale = fields["scale"]
        if self.scales == "log8":
            largest = fields["base"].float().unsqueeze(-1) if "base" in fields else _LARGEST_TOKEN_STEP
            scale = scale_grid(self.axis).to(scale.device)[scale.int()] * largest
        scale = scale.float()
        return scale, -self._middle() * scale if self.symmetric else fields["zero"].float()

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., T, D]` to `[..., T, D/g, g]` (token) or `[..., T/g, g, D]` (channel)."""
        *lead, num_tokens, head_dim = x.shape
        if self.axis == "token":
            width = channel_group(head_dim, self.group)
            return x.view(*lead, num_tokens, head_dim // width, width)
        return x.view(*lead, num_tokens // self.group, self.group, head_dim)


@functools.cache
def scale_grid(axis: Axis) -> torch.Tensor:
    """`[256] float32`: what each `log8` code is of the largest scale; a table, so that all kernels have the same bits."""
    return (torch.arange(256, dtype=torch.float64) / -_PER_OCTAVE[axis]).exp2().float()


def scale_bounds(codec: Affine) -> torch.Tensor:
    """`[255] float32`, rising: the `log8` code of a scale is how many of these `largest / scale` is not below."""
    clipped_steps = (2 ** (0.5 / _PER_OCTAVE[codec.axis]) - 1) * codec.reach
    # Nearest, or above: that is a little more than the whole octaves, against the rounding of the ratio.
    return _bounds(codec.axis, 0.5 if clipped_steps < 0.5 else 1 + 1e-3)


@functools.cache
def _bounds(axis: Axis, above: float) -> torch.Tensor:
    return ((torch.arange(255, dtype=torch.float64) + above) / _PER_OCTAVE[axis]).exp2().float()


def channel_group(head_dim: int, group: int) -> int:
    """The smallest divisor of `head_dim` that is at least `group`: 64 of 128, but 80 of 80."""
    return next(g for g in range(min(group, head_dim), head_dim + 1) if head_dim % g == 0)


def _chunks(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.chunk(scale.shape[-1], dim=-1)


def _half_above(step: torch.Tensor) -> torch.Tensor:
    """Rounded up; half a smallest step covers the numbers so small that halves lie evenly."""
    return _half((step * (1 + _ROUND) + _TINY / 2).clamp_min(_TINY))


def _half(x: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()
