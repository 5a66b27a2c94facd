"""Keys without their projection's bias: `delta(turboquant(3))`.

Where k_proj has a bias (Qwen2, Qwen2.5), keys are `k_t = R(pos_t) (W x_t + b)`, and |b| may be tens of times |W x|. What
differs between tokens is then lost in the steps of codes that have to reach b. Held are the differences

    d_t = k_t - R(pos_t) b = R(pos_t) W x_t,        q · k_t = q · d_t + q · R(pos_t) b

whose codes may be of any kind that holds tokens one by one. The second product needs no codes: its keys are made from the
one vector b of a KV head and the tokens' positions (4 bytes a token and KV head), a tile at a time. Values have nothing of
the sort: a bias of v_proj adds the same vector to every output.

Codes per channel (`int4`) take b into their zero points as far as R leaves it alone, and where b lies in channels that R turns
slowly they do without this; docs/log.md compares.
"""

from dataclasses import dataclass, field

import torch

from kvfold.errors import PlanError
from kvfold.registry import register
from kvfold.rope import Rope
from kvfold.site import Site
from kvfold.store.base import AroundCodec, AroundStore, Fields, KVCodec, PositionalCodec, Store, join, part
from kvfold.store.integer import Int4


@dataclass(frozen=True, eq=False)
class WithoutBias(AroundCodec, PositionalCodec):
    """Keys as `inner` holds their differences to a bias that turns with their positions.

    Fields: inner's as `d.*`, and `position [..., T, 1] int32`.

    Round trip: the error is inner's on `x - R(pos) b`.

    Attributes:
        bias: `[Hkv, D]`, the model's own tensor, so that it is not counted here; row r of a field belongs to head r modulo Hkv.
    """

    bias: torch.Tensor
    rope: Rope

    def encode_at(self, x: torch.Tensor, positions: torch.Tensor) -> Fields:
        positions = positions.expand(x.shape[:-1]).int()
        fields = join("d", self.inner.encode(x.float() - self._turned(positions)))
        return fields | {"position": positions.unsqueeze(-1)}

    def decode(self, fields: Fields) -> torch.Tensor:
        return self.inner.decode(part("d", fields)) + self._turned(fields["position"].squeeze(-1))

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        folded, plain = q.split([q.shape[-1] - self.bias.shape[-1], self.bias.shape[-1]], -1)
        return self.inner.dot(folded, part("d", fields)) + plain @ self._turned(fields["position"].squeeze(-1)).mT

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return p @ self.decode(fields)  # of keys, which nobody adds up but tests

    def fold_query(self, q: torch.Tensor) -> torch.Tensor:
        """Side by side: what the codes want, and the query as it was, for the bias."""
        return torch.cat([self.inner.fold_query(q), q], -1)

    def unfold_output(self, out: torch.Tensor) -> torch.Tensor:
        return out  # decoded before they were added up

    def _turned(self, positions: torch.Tensor) -> torch.Tensor:
        """`R(pos) b`: `[R, ..., T] int` to `[R, ..., T, D] float32`."""
        heads = torch.arange(positions.shape[0], device=self.bias.device) % len(self.bias)
        bias = self.bias[heads].float().view(-1, *[1] * (positions.dim() - 1), self.bias.shape[-1])
        return self.rope.rotate(bias.to(positions.device).expand(*positions.shape, -1), positions)


@register("store", "delta")
@dataclass(frozen=True)
class Delta(AroundStore):
    """Another codec that holds tokens one by one, of keys without their bias."""

    codes: Store = field(default_factory=lambda: Int4(k_axis="token", rotate="kv"))

    def codec(self, site: Site) -> KVCodec:
        if site.model is None:
            raise PlanError("delta needs the model's projections, and this cache belongs to no model")
        projections = site.model.projections()
        if projections.k_bias is None or projections.k_normed:
            raise PlanError(f"delta: this model's keys have no bias to take out; write {self.codes.name} alone")
        codec = self.codes.codec(site)
        if codec.positional or codec.unit == "block":
            how = "knows positions itself" if codec.positional else "holds whole blocks"
            raise PlanError(f"delta takes a codec that holds tokens one by one, as int4(k_axis=token); {self.codes.name} {how}")
        return KVCodec(WithoutBias(codec.k, projections.k_bias.detach(), site.model.rope()), codec.v)
