"""Bands: channels differ in the number of their bits, from none to six.

Transform coding: in coordinates where channels are uncorrelated and an error in one is as bad as in another, the least error
at a given rate gives a channel of variance λ about log2(λ) / 2 more bits than one of variance 1, and none to those below a
threshold (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3). KVTC (arXiv 2511.01815)
does this for caches at rest, KVTuner (arXiv 2502.04420) chooses bits by layer. Levels are those of Lloyd and Max for a normal
distribution.

Channels are ordered, so that those with the same bits form a band: lines of b-bit codes into a table of 2^b levels. Folded, for
a query q and probabilities p (l: levels of the codes):

    q · x_t ≈ (q ∘ s) · l_t + q · z + Σ_j q_dj r_j [t = t_j]        Σ p_t x_t ≈ s ∘ Σ p_t l_t + z Σ p_t + Σ_j p_tj r_j e_dj

K has a few tokens that nearly everything looks at (" the" near the start of a text, in SmolLM2), and these stand far outside in
one or two channels. The entries of a block with the largest weighted errors are therefore mended: r_j is the error itself, in
half precision, at token t_j and channel d_j; a handful for each 64 tokens, 32 bits each.
"""

import functools
import itertools
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from kvfold.store.base import Fields, TensorCodec
from kvfold.store.constants import sent, vector
from kvfold.store.pack import pack, unpack

MOST_BITS = 6

_PER_OCTAVE = 8.0
_MIDDLE = 128.0
_ZERO_STEPS = 16.0


@dataclass(frozen=True)
class Bands(TensorCodec):
    """Codes whose bits differ by channel, with a scale and an offset for each channel of a block of 64 tokens.

    Args:
        bits: of each channel, in descending order; sum(bits) * 8 bytes a block.
        outliers: entries of a block that are mended.
        exact_zeros: offsets in half precision. Without it they are small multiples of the scale, which suits channels whose
            mean has been taken off; a channel with a mean of many standard deviations gets as coarse a scale as that needs.

    Fields: `codes [..., Σ bits * 8] uint8`, channel by channel; `scale [..., C] uint8`, the channel's standard deviation as
    2^((c - 128) / 8), raised where its mean is beyond 7.9 of it; `zero [..., C] int8`, the mean in sixteenths of the scale, or
    the mean itself, half (and the scale is not raised); `place [..., outliers] int16`, token * D + channel; `value` at these
    places, half.

    Round trip: the nearest level is chosen for every number; mended places are within 2^-11 of the error that they mend.
    """

    bits: tuple[int, ...]
    outliers: int = 0
    exact_zeros: bool = False

    def __post_init__(self) -> None:
        if any(not 0 <= b <= MOST_BITS for b in self.bits) or list(self.bits) != sorted(self.bits, reverse=True):
            raise ValueError(f"bits go from {MOST_BITS} at most down to 0 at least, not {self.bits}")

    @property
    def num_coded(self) -> int:
        """C, the channels that have codes."""
        return sum(b > 0 for b in self.bits)

    def bands(self) -> list[tuple[int, slice]]:
        """Bits and channels of each band."""
        found, start = [], 0
        for bits, run in itertools.groupby(self.bits):
            stop = start + len(list(run))
            if bits:
                found.append((bits, slice(start, stop)))
            start = stop
        return found

    @property
    def unit(self) -> Literal["token", "block"]:
        return "block"

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        coded = x[..., : self.num_coded]
        mean = coded.mean(-2)
        spread = (coded - mean[..., None, :]).square().mean(-2).sqrt()
        fields = {"scale": _log_code(spread if self.exact_zeros else torch.maximum(spread, mean.abs() / 7.9))}
        in_steps = mean / _from_log(fields["scale"]) * _ZERO_STEPS
        fields["zero"] = _half(mean) if self.exact_zeros else in_steps.round().clamp(-127, 127).to(torch.int8)
        scale, zero = self._scale_zero(fields)
        scaled = ((coded - zero[..., None, :]) / scale[..., None, :]).mT
        lines = [_pack(_nearest(scaled[..., channels, :], bits), bits).flatten(-2) for bits, channels in self.bands()]
        fields["codes"] = torch.cat([x.new_empty(*x.shape[:-2], 0, dtype=torch.uint8), *lines], dim=-1)
        if self.outliers:
            error = (x - self._dense(fields)).flatten(-2)
            weight = torch.tensor([2.0**b for b in self.bits], device=x.device).repeat(x.shape[-2])
            place = (error.abs() * weight).topk(self.outliers).indices
            fields |= {"place": place.to(torch.int16), "value": _half(error.gather(-1, place))}
        return fields

    def decode(self, fields: Fields) -> torch.Tensor:
        x = self._dense(fields)
        if self.outliers:
            x = x.flatten(-2).scatter_add(-1, fields["place"].long(), fields["value"].float()).view_as(x)
        return x

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        scale, zero = self._scale_zero(fields)
        coded = q[..., : self.num_coded]
        scores = (coded * scale[..., None, :]) @ self._levels(fields).mT + (coded * zero[..., None, :]).sum(-1, keepdim=True)
        if not self.outliers:
            return scores
        token, channel, value = self._sparse(fields, q.shape[-2])
        return scores.scatter_add(-1, token, q.take_along_dim(channel, -1) * value)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        scale, zero = self._scale_zero(fields)
        out = (p @ self._levels(fields)) * scale[..., None, :] + p.sum(-1, keepdim=True) * zero[..., None, :]
        out = self._padded(out)
        if not self.outliers:
            return out
        token, channel, value = self._sparse(fields, p.shape[-2])
        return out.scatter_add(-1, channel, p.take_along_dim(token, -1) * value)

    def _levels(self, fields: Fields) -> torch.Tensor:
        """`[..., T, C] float32`: the levels of the codes."""
        codes, start, parts = fields["codes"], 0, []
        for bits, channels in self.bands():
            num = channels.stop - channels.start
            line = self.block * bits // 8
            band = codes[..., start : start + num * line].unflatten(-1, (num, line))
            parts.append(_table(bits, codes.device)[_unpack(band, bits).int()].mT)
            start += num * line
        return torch.cat([torch.empty(*codes.shape[:-1], self.block, 0, device=codes.device), *parts], dim=-1)

    def _dense(self, fields: Fields) -> torch.Tensor:
        scale, zero = self._scale_zero(fields)
        return self._padded(self._levels(fields) * scale[..., None, :] + zero[..., None, :])

    def _scale_zero(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _from_log(fields["scale"])
        zero = fields["zero"].float()
        return scale, zero if self.exact_zeros else zero / _ZERO_STEPS * scale

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., C]` to `[..., D]`: zeros for the channels without codes."""
        return torch.nn.functional.pad(x, (0, len(self.bits) - self.num_coded))

    def _sparse(self, fields: Fields, num_vectors: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token, channel and value of each outlier, `[..., M, outliers]` all."""
        place = fields["place"].long()[..., None, :]
        place = place.expand(*place.shape[:-2], num_vectors, -1)
        return place // len(self.bits), place % len(self.bits), fields["value"].float()[..., None, :]


# -- levels and numbers ------------------------------------------------------------------------------------------------------


@functools.cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least squared error for a standard normal variable (Max 1960; Lloyd 1982).

    Each level is the mean of what is nearest to it: (φ(a) - φ(b)) / (Φ(b) - Φ(a)) between bounds a and b.
    """
    normal = NormalDist()
    levels = [normal.inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)]
    for _ in range(5000):
        bounds = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        density = [0.0, *(normal.pdf(x) for x in bounds), 0.0]
        below = [0.0, *(normal.cdf(x) for x in bounds), 1.0]
        before, levels = levels, [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(2**bits)]
        if max(abs(a - b) for a, b in zip(before, levels, strict=True)) < 1e-7:
            break
    return tuple(levels)


@functools.cache
def distortion(bits: int) -> float:
    """The mean squared error of `normal_levels` on a standard normal variable: 1 without bits."""
    if bits == 0:
        return 1.0
    levels, normal = normal_levels(bits), NormalDist()
    below = [0.0, *(normal.cdf((a + b) / 2) for a, b in itertools.pairwise(levels)), 1.0]
    # Levels are conditional means, so that E (x - l)² = E x² - E l².
    return 1.0 - sum(level**2 * (below[i + 1] - below[i]) for i, level in enumerate(levels))


def _table(bits: int, device: torch.device) -> torch.Tensor:
    return sent(device, vector, normal_levels(bits))


def _nearest(x: torch.Tensor, bits: int) -> torch.Tensor:
    levels = _table(bits, x.device)
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As `pack`; codes of 5 and 6 bits are a plane of 4 bits and one of the rest, behind it."""
    return pack(codes, bits) if bits <= 4 else torch.cat([pack(codes & 15, 4), pack(codes >> 4, bits - 4)], dim=-1)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits <= 4:
        return unpack(packed, bits)
    num_low = packed.shape[-1] // bits * 4
    return unpack(packed[..., :num_low], 4) | unpack(packed[..., num_low:], bits - 4) << 4


def _log_code(scale: torch.Tensor) -> torch.Tensor:
    code = scale.clamp_min(torch.finfo(torch.float32).tiny).log2() * _PER_OCTAVE + _MIDDLE
    return code.round().clamp(0, 255).to(torch.uint8)


def _from_log(code: torch.Tensor) -> torch.Tensor:
    return ((code.float() - _MIDDLE) / _PER_OCTAVE).exp2()


def _half(x: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()
