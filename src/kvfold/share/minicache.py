"""Pairs of layers hold one direction a token, and a magnitude each: `minicache(start=50%)`.

Liu et al., MiniCache: KV Cache Compression in Depth Dimension for Large Language Models (arXiv 2405.14366), sections 4.1 to
4.3. From the middle on, neighbouring layers have keys and values of much the same direction. For a pair of layers l, l + 1 and
a token's vectors x, y (K and V alike), with Ω the angle between them and t = `weight`:

    e = sin((1 - t) Ω) / sin Ω · x / |x|  +  sin(t Ω) / sin Ω · y / |y|        (SLERP, equation 3)
    x' = |x| e        y' = |y| e                                                  (equation 4)

Tokens whose directions are far apart are kept as they are, in both layers.

Folding, with e held by any codec: q · x'_t = |x_t| (q · e_t) and Σ p_t x'_t = Σ (p_t |x_t|) e_t.

Differs from the paper: of every so many waiting tokens a fixed share is kept (`keep`: those with the largest Ω of K and V
together), where the paper draws a line between the least and the largest angle of the whole prompt; so merged tokens fill
blocks, and bytes are known beforehand. Magnitudes are half precision. Tokens wait, dense and counted, until there are enough
of them for a block.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.share.base import Sharing
from kvfold.store.base import AroundCodec, Fields, KVCodec


@register("share", "minicache")
@dataclass(frozen=True)
class MiniCache(Sharing):
    """Pairs of layers from `start` on are merged, but for the share `keep` of the tokens."""

    start: Percent = Percent(0.5)
    keep: Percent = Percent(0.05)
    weight: Percent = Percent(0.6)
    merges: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 2

    def check(self) -> None:
        super().check()
        if self.keep.value > 0.5:
            raise PlanError(f"minicache: keep={self.keep} leaves too little to merge; give at most 50%")

    def num_kept(self, block: int) -> int:
        """Tokens that stay as they are beside every `block` merged ones: at most the share `keep` of both."""
        return math.floor(self.keep.value * block / (1 - self.keep.value) + 1e-9)


def slerp(x: torch.Tensor, y: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions between those of `x` and `y [..., D]`, `[..., D] float32` of length one, and the angles, `[...]`.

    Directions that are opposite have no middle: there it is that of x or y, whichever weighs more.
    """
    x, y = torch.nn.functional.normalize(x.float(), dim=-1), torch.nn.functional.normalize(y.float(), dim=-1)
    angle = 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))  # exact for small angles too, unlike arccos
    sine = angle.sin()
    degenerate = sine < 1e-4
    safe = torch.where(degenerate, 1.0, sine)
    a = torch.where(degenerate, 1 - weight, ((1 - weight) * angle).sin() / safe)
    b = torch.where(degenerate, weight, (weight * angle).sin() / safe)
    return torch.nn.functional.normalize(a[..., None] * x + b[..., None] * y, dim=-1), angle


@dataclass(frozen=True)
class Directions(AroundCodec):
    """`inner` over directions, with two magnitudes a token: fields `norm0`, `norm1 [..., T] float16`.

    What is encoded is `[..., T, D + 2]`, the magnitudes behind the direction; what is read are the vectors of layer `side`.
    """

    head_dim: int
    side: Literal[0, 1] = 0

    def encode(self, x: torch.Tensor) -> Fields:
        norms = x[..., self.head_dim :].float().clamp(0, torch.finfo(torch.float16).max).half()
        return {**self.inner.encode(x[..., : self.head_dim]), "norm0": norms[..., 0], "norm1": norms[..., 1]}

    def decode(self, fields: Fields) -> torch.Tensor:
        norms = torch.stack([fields["norm0"].float(), fields["norm1"].float()], -1)
        return torch.cat([self.inner.decode(fields), norms], -1)

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.inner.dot(q, fields) * self._norm(fields)

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.inner.combine(p * self._norm(fields), fields)

    def _norm(self, fields: Fields) -> torch.Tensor:
        return fields[f"norm{self.side}"].float().unsqueeze(-2)


def directions(codec: KVCodec, head_dim: int, side: Literal[0, 1]) -> KVCodec:
    """A codec of vectors as one of directions; both sides write the same fields."""
    return KVCodec(Directions(codec.k, head_dim, side), Directions(codec.v, head_dim, side))
