"""8-bit floating point: e4m3 (3 bits of mantissa, up to 448) and e5m2 (2 bits, up to 57344).

x ≈ s_t · f_t with one half precision scale a token, which lands in the score of K and in the probability of V. With
`scale=false` codes hold x itself, as vLLM's fp8 cache does with its default scale of 1 (values beyond the range saturate).
Format: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.registry import register
from kvfold.site import Site
from kvfold.store.base import Fields, KVCodec, Store, TensorCodec

_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(TensorCodec):
    """Fields: `codes [..., T, D]` (float8, held as uint8, which every torch operation can move), `scale [..., T, 1] float16`.

    Round trip: |x - x'| <= max(|x| * 2^-(m + 1), s * smallest / 2), m the bits of mantissa, smallest the format's least
    positive number.
    """

    format: Literal["e4m3", "e5m2"]
    scaled: bool

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token"

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        dtype = _TYPES[self.format]
        largest = torch.finfo(dtype).max
        if not self.scaled:
            return {"codes": x.clamp(-largest, largest).to(dtype).view(torch.uint8)}
        # Rounded up to a half, so that no value goes beyond the format's range.
        scale = x.abs().amax(-1, keepdim=True) / largest * (1 + 2.0**-10) + 2.0**-25
        scale = scale.clamp(2.0**-24, 65504.0).half()
        codes = (x / scale.float()).clamp_(-largest, largest).to(dtype)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, fields: Fields) -> torch.Tensor:
        x = self._floats(fields)
        return x * fields["scale"].float() if self.scaled else x

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        scores = q @ self._floats(fields).mT
        return scores * fields["scale"].float().mT if self.scaled else scores

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        if self.scaled:
            p = p * fields["scale"].float().mT
        return p @ self._floats(fields)

    def _floats(self, fields: Fields) -> torch.Tensor:
        return fields["codes"].view(_TYPES[self.format]).float()


@register("store", "fp8")
@dataclass(frozen=True)
class FP8(Store):
    """8-bit floats, with a scale a token."""

    format: Literal["e4m3", "e5m2"] = "e4m3"
    scale: bool = True
    sink: int = 0
    window: int = 0

    def codec(self, site: Site) -> KVCodec:
        codec = Float8(self.format, self.scale)
        return KVCodec(codec, codec)
