"""The few numbers that are farthest from the others of their line, kept beside any codec: a dense and a sparse part.

SqueezeLLM's decomposition (arXiv 2306.07629, section 4.2), which KVQuant and GEAR use for the cache. A line is a token or,
within a block, a channel; each has the same number n of outliers, so that fields have a fixed shape. Folded, they are a
sparse product:

    lines are channels   scores[t] += q_d r_di  where t = place_di          out[d] += Σ_i p[place_di] r_di
    lines are tokens     scores[t] += Σ_i q[place_ti] r_ti                  out[d] += p_t r_ti  where d = place_ti

r is what the dense part misses in that place.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.percent import Percent
from kvfold.store.base import AroundCodec, Fields, join, part
from kvfold.store.scales import Axis, half

ONE_PERCENT = Percent(0.01)


@dataclass(frozen=True)
class Outliers(AroundCodec):
    """`inner` over vectors without their outliers, and these in half precision.

    Args:
        inner: a codec that folds nothing into the query (a rotation goes around this one).
        share: outliers of each line, rounded up: 1% of 64 numbers is one.
        axis: what a line is: a `token`, or a `channel` of a block.

    Fields: inner's as `rest.*`; `value [..., T, n] half` and `place [..., T, n] uint8` (int16 in lines of more than 256), for
    channels `[..., D, n]`.

    Round trip: as inner's on what is left; in the outliers' places within 2^-11 of what inner misses there.
    """

    share: Percent
    axis: Axis

    @property
    def unit(self) -> Literal["token", "block"]:
        return "token" if self.axis == "token" and self.inner.unit == "token" else "block"

    def encode(self, x: torch.Tensor) -> Fields:
        x = x.float()
        lines = self._lines(x)
        middle = lines.median(-1, keepdim=True).values
        place = (lines - middle).abs().topk(self.share.of(lines.shape[-1])).indices
        rest = lines.scatter(-1, place, middle.expand_as(place))
        fields = self.inner.encode(self._lines(rest).contiguous())
        missing = lines - self._lines(self.inner.decode(fields))
        small = torch.uint8 if lines.shape[-1] <= 256 else torch.int16
        return join("rest", fields) | {"value": half(missing.gather(-1, place)), "place": place.to(small)}

    def decode(self, fields: Fields) -> torch.Tensor:
        value, place = self._sparse(fields)
        return self._lines(self._lines(self.inner.decode(part("rest", fields))).scatter_add(-1, place, value))

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        scores = self.inner.dot(q, part("rest", fields))
        value, place = self._sparse(fields)
        return scores + (_gathered(q, value, place) if self.axis == "token" else _scattered(q, value, place, scores))

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        out = self.inner.combine(p, part("rest", fields))
        value, place = self._sparse(fields)
        return out + (_scattered(p, value, place, out) if self.axis == "token" else _gathered(p, value, place))

    def _lines(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., T, D]` to lines, `[..., T, D]` or `[..., D, T]`, and back."""
        return x if self.axis == "token" else x.mT

    def _sparse(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["value"].float(), fields["place"].long()


def _gathered(vector: torch.Tensor, value: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`Σ_i vector[place_li] value_li` for every line l: `vector [..., M, W]`, `place [..., L, n]` to `[..., M, L]`."""
    lead = torch.broadcast_shapes(vector.shape[:-2], place.shape[:-2])  # one vector may stand for all blocks
    vector = vector.expand(*lead, *vector.shape[-2:])
    flat = place.flatten(-2)[..., None, :].expand(*vector.shape[:-1], -1)
    return (vector.gather(-1, flat).unflatten(-1, place.shape[-2:]) * value[..., None, :, :]).sum(-1)


def _scattered(vector: torch.Tensor, value: torch.Tensor, place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`Σ_l vector_l value_li` to its place: `vector [..., M, L]`, `place [..., L, n]` to `[..., M, W]`, the shape of `like`."""
    terms = (vector[..., None] * value[..., None, :, :]).flatten(-2)
    return torch.zeros_like(like).scatter_add(-1, place.flatten(-2)[..., None, :].expand_as(terms), terms)
