"""Numbers that share a scale: how they are grouped, how scales are stored, and how they are folded.

A vector of codes c stands for x ≈ s · c + z, where c are integers (`affine`) or the levels of a table (`table`). Folding, for a
query q and probabilities p:

    scales per token     q · x_t   = s_t (q · c_t) + z_t Σq             Σ p_t x_t = Σ (p_t s_t) c_t + Σ p_t z_t
    scales per channel   q · x_t   = (q ∘ s) · c_t + q · z              Σ p_t x_t = s ∘ Σ p_t c_t + z Σ p_t

Scales in half precision cost 0.25 bits an element in groups of 64. As `log8` they are 8-bit codes on a logarithmic grid: per
channel 2^(-c/24) of the block's largest scale, which is kept in half precision (double quantization, as in QLoRA, arXiv
2305.14314, section 3); per token 2^(12 - c/8), with nothing else to keep.
"""

import functools
from typing import Literal

import torch

from kvfold.store.base import Fields
from kvfold.store.constants import sent

Axis = Literal["token", "channel"]
Scales = Literal["half", "log8"]

# Half precision rounds by at most 2^-11 of a number; a little more makes 'outwards' safe against the second rounding.
_ROUND = 1.001 * 2.0**-11
_TINY = 2.0**-24  # smallest positive half: keeps scales above zero

# The grids of 8-bit scales, in codes an octave: 256 codes span 10 octaves below a block's largest scale, or 32 below 2^12.
PER_OCTAVE = {"channel": 24.0, "token": 8.0}
LARGEST_OF_TOKEN = 2.0**12


def channel_group(head_dim: int, group: int) -> int:
    """The smallest divisor of `head_dim` that is at least `group`: 64 of 128, but 80 of 80."""
    return next(g for g in range(min(group, head_dim), head_dim + 1) if head_dim % g == 0)


def grouped(x: torch.Tensor, axis: Axis, group: int) -> torch.Tensor:
    """`[..., T, D]` to `[..., T, D/g, g]` (token) or `[..., T/g, g, D]` (channel); `over(axis)` is the axis of g."""
    *lead, num_tokens, head_dim = x.shape
    if axis == "token":
        width = channel_group(head_dim, group)
        return x.view(*lead, num_tokens, head_dim // width, width)
    return x.view(*lead, num_tokens // group, group, head_dim)


def over(axis: Axis) -> int:
    """The axis of `grouped` along which numbers share a scale."""
    return -1 if axis == "token" else -2


# -- storing -----------------------------------------------------------------------------------------------------------------


def store_scale(scale: torch.Tensor, axis: Axis, scales: Scales, *, nearest: bool) -> Fields:
    """Scales, `[..., T, D/g]` or `[..., T/g, D] float32`, as the fields `scale` and, per channel as log8, `base [..., 1]`.

    Halves are rounded up, so that nothing is clipped; codes of log8 too, unless `nearest`.
    """
    if scales == "half":
        return {"scale": half_above(scale)}
    if axis == "token":
        return {"scale": _log_codes(scale, torch.full_like(scale, LARGEST_OF_TOKEN), axis, nearest)}
    base = half_above(scale.amax((-2, -1))).unsqueeze(-1)
    return {"scale": _log_codes(scale, base.float().unsqueeze(-1), axis, nearest), "base": base}


def load_scale(fields: Fields, axis: Axis, scales: Scales) -> torch.Tensor:
    """What `store_scale` stored, in float32."""
    if scales == "half":
        return fields["scale"].float()
    largest = fields["base"].float().unsqueeze(-1) if "base" in fields else LARGEST_OF_TOKEN
    return sent(fields["scale"].device, scale_grid, axis)[fields["scale"].int()] * largest


def largest_clip(axis: Axis, scales: Scales) -> float:
    """By how much of itself a range may shrink where its scale is rounded to the nearest code."""
    return 2 ** (0.5 / PER_OCTAVE[axis]) - 1 if scales == "log8" else 0.0


def _log_codes(scale: torch.Tensor, largest: torch.Tensor, axis: Axis, nearest: bool) -> torch.Tensor:
    bounds = sent(scale.device, scale_bounds, axis, nearest)
    return torch.bucketize(largest / scale.clamp_min(_TINY / 256), bounds, right=True).to(torch.uint8)


@functools.cache
def scale_grid(axis: Axis) -> torch.Tensor:
    """`[256] float32`: what each `log8` code is of the largest scale; a table, so that all kernels have the same bits."""
    return (torch.arange(256, dtype=torch.float64) / -PER_OCTAVE[axis]).exp2().float()


@functools.cache
def scale_bounds(axis: Axis, nearest: bool) -> torch.Tensor:
    """`[255] float32`, rising: the `log8` code of a scale is how many of these `largest / scale` is not below."""
    # Nearest, or above: that is a little more than whole steps, against the rounding of the ratio.
    above = 0.5 if nearest else 1 + 1e-3
    return ((torch.arange(255, dtype=torch.float64) + above) / PER_OCTAVE[axis]).exp2().float()


def half(x: torch.Tensor) -> torch.Tensor:
    """To half precision; what is beyond its range becomes its largest number."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()


def half_above(x: torch.Tensor) -> torch.Tensor:
    """Rounded up; half a smallest step covers the numbers so small that halves lie evenly."""
    return half((x * (1 + _ROUND) + _TINY / 2).clamp_min(_TINY))


def half_below(x: torch.Tensor) -> torch.Tensor:
    """Rounded down, whatever the sign."""
    return half(x - x.abs() * _ROUND - _TINY)


# -- folding -----------------------------------------------------------------------------------------------------------------


def dot(q: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: Axis) -> torch.Tensor:
    """`q · (s c_t + z)`: `q [..., M, D]`, `codes [..., T, D]` to `[..., M, T]`; scale and zero as `store_scale` has them."""
    if axis == "token":
        scores: torch.Tensor | float = 0.0
        for g, (q_g, codes_g) in enumerate(zip(_chunks(q, scale), _chunks(codes, scale), strict=True)):
            scores = scores + scale[..., None, :, g] * (q_g @ codes_g.mT)
            if zero is not None:
                scores = scores + zero[..., None, :, g] * q_g.sum(-1, keepdim=True)
        assert isinstance(scores, torch.Tensor)
        return scores
    parts = []
    for g, codes_g in enumerate(codes.chunk(scale.shape[-2], dim=-2)):
        part = (q * scale[..., g, None, :]) @ codes_g.mT
        parts.append(part if zero is None else part + (q * zero[..., g, None, :]).sum(-1, keepdim=True))
    return torch.cat(parts, dim=-1)


def combine(p: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: Axis) -> torch.Tensor:
    """`Σ p_t (s c_t + z)`: `p [..., M, T]`, `codes [..., T, D]` to `[..., M, D]`."""
    if axis == "token":
        parts = []
        for g, codes_g in enumerate(_chunks(codes, scale)):
            part = (p * scale[..., None, :, g]) @ codes_g
            parts.append(part if zero is None else part + p @ zero[..., :, g, None])
        return torch.cat(parts, dim=-1)
    out: torch.Tensor | float = 0.0
    num_groups = scale.shape[-2]
    for g, (p_g, codes_g) in enumerate(zip(p.chunk(num_groups, dim=-1), codes.chunk(num_groups, dim=-2), strict=True)):
        out = out + scale[..., g, None, :] * (p_g @ codes_g)
        if zero is not None:
            out = out + zero[..., g, None, :] * p_g.sum(-1, keepdim=True)
    assert isinstance(out, torch.Tensor)
    return out


def _chunks(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.chunk(scale.shape[-1], dim=-1)
