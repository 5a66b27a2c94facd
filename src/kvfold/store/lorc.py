"""LoRC: keys before RoPE and values as coordinates in the subspace that the layer's projection writes to: `lorc(75%,
last=50%)`.

Zhang et al., LoRC: Low-Rank Compression for LLMs KV Cache with a Progressive Compression Strategy (arXiv 2410.03111). With the
singular value decomposition W = U Σ Vᵀ of a head's projection, k = W x + b is near U_r z + b, z = U_rᵀ (k - b) its first r
coordinates; early layers keep more of them than late ones, as errors grow on their way through the layers.

    values   Σ p_t v_t = U_r Σ p_t z_t + b Σ p_t
    keys     q · k_t = q · R(pos_t) (U_r z_t + b)

Values fold: attention works on r numbers a token. Keys don't: the rotation R stands between the query and U_r and differs
from token to token, so a tile of keys is expanded and rotated each time it is attended to, r D multiplications a token and KV
head where folding would take r for each query. Memory is really freed, and time is what it costs (docs/log.md). To rotate
them, each token keeps its position (4 bytes a token and KV head).

Differs from the paper in that ranks fall evenly from the first layer to the last, where the paper interpolates by the
logarithm of cumulative condition numbers, which is close to a line; heads are decomposed one by one, as kvfold stores them;
biases are taken out first; and U is orthonormal, so that the coordinates can be stored in 8 bits (`codes=int8`).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import Percent
from kvfold.registry import register
from kvfold.rope import Rope
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import AroundCodec, Fields, KVCodec, PositionalCodec, Store, join, part
from kvfold.store.dense import DenseCodec

_MOST, _LEAST = Percent(0.75), Percent(0.5)


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Of each KV head of a layer: what its projection can write, but for its smallest singular values.

    Attributes:
        basis: `[Hkv, D, r] half`, orthonormal columns but for rounding.
        bias: `[Hkv, D] half` or None.
    """

    basis: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(weight: torch.Tensor, bias: torch.Tensor | None, rank: int) -> "Subspaces":
        """The first `rank` left singular vectors of each head's `weight [Hkv, D, hidden]`."""
        weight = weight.float()
        vectors = torch.linalg.eigh(weight @ weight.mT).eigenvectors  # by ascending eigenvalues
        return Subspaces(vectors[..., -rank:].flip(-1).half().contiguous(), None if bias is None else bias.half())

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Coordinates of `x [R, ..., T, D]`, `[R, ..., T, r]`; row r belongs to head r modulo Hkv."""
        return (x if self.bias is None else x - self._of_rows(self.bias[:, None], x)) @ self._of_rows(self.basis, x)

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """Vectors of coordinates: the way back."""
        x = z @ self._of_rows(self.basis, z).mT
        return x if self.bias is None else x + self._of_rows(self.bias[:, None], z)

    def expand_sum(self, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The vector of `z = Σ p_t z_t`, `weight [..., 1] = Σ p_t`: biases count as often as weights say."""
        x = z @ self._of_rows(self.basis, z).mT
        return x if self.bias is None else x + weight * self._of_rows(self.bias[:, None], z)

    def tensors(self) -> Fields:
        return {"basis": self.basis} if self.bias is None else {"basis": self.basis, "bias": self.bias}

    def _of_rows(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`x [Hkv, a, b]` for the rows of `like [R, ..., T, *]`: `[R, ..., a, b] float32` to be broadcast."""
        heads = torch.arange(like.shape[0], device=x.device) % len(x)
        return x[heads].float().view(-1, *[1] * (like.dim() - 3), *x.shape[1:])


@dataclass(frozen=True, eq=False)
class LatentValues(AroundCodec):
    """Vectors as coordinates in their head's subspace, which `inner` holds.

    Fields: inner's, for vectors of r numbers.

    Round trip: with exact coordinates, the part of x - b outside of the subspace is lost and nothing else.
    """

    subspaces: Subspaces

    def encode(self, x: torch.Tensor) -> Fields:
        return self.inner.encode(self.subspaces.project(x.float()))

    def decode(self, fields: Fields) -> torch.Tensor:
        return self.subspaces.expand(self.inner.decode(fields))

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        basis = self.subspaces._of_rows(self.subspaces.basis, q)
        scores = self.inner.dot(q @ basis, fields)
        if self.subspaces.bias is None:
            return scores
        return scores + q @ self.subspaces._of_rows(self.subspaces.bias[:, None], q).mT

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return self.subspaces.expand_sum(self.inner.combine(p, fields), p.sum(-1, keepdim=True))

    def constants(self) -> Fields:
        return self.subspaces.tensors()


@dataclass(frozen=True, eq=False)
class LatentKeys(AroundCodec, PositionalCodec):
    """Keys turned back to position 0, as coordinates in their head's subspace.

    Fields: inner's for vectors of r numbers as `z.*`, and `position [..., T, 1] int32`.

    Round trip: as LatentValues', on the key before its rotation.
    """

    subspaces: Subspaces
    rope: Rope

    def encode_at(self, x: torch.Tensor, positions: torch.Tensor) -> Fields:
        positions = positions.expand(x.shape[:-1])
        before = self.rope.rotate(x.float(), -positions)
        fields = join("z", self.inner.encode(self.subspaces.project(before)))
        return fields | {"position": positions.int().unsqueeze(-1)}

    def decode(self, fields: Fields) -> torch.Tensor:
        before = self.subspaces.expand(self.inner.decode(part("z", fields)))
        return self.rope.rotate(before, fields["position"].squeeze(-1))

    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        return q @ self.decode(fields).mT  # one tile of keys at a time

    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        return p @ self.decode(fields)

    def constants(self) -> Fields:
        return self.subspaces.tensors()


@register("store", "lorc")
@dataclass(frozen=True)
class LoRC(Store):
    """A share of the dimensions, from `rank` in the first layer to `last` in the last one."""

    rank: Percent = _MOST
    last: Percent = _LEAST
    codes: Literal["half", "int8"] = "half"
    sink: int = 4
    window: int = 0

    def check(self) -> None:
        if not self.rank.value or not self.last.value:
            raise PlanError("lorc: a rank of 0% holds nothing; 50% keeps half of the dimensions")

    def codec(self, site: Site) -> KVCodec:
        if site.model is None:
            raise PlanError("lorc needs the model's projections, and this cache belongs to no model")
        projections = site.model.projections()
        if projections.k_normed:
            raise PlanError("lorc: this model normalises its keys after the projection, so that they leave its subspace")
        rank = self.rank_of(site)
        inner = DenseCodec(torch.float16) if self.codes == "half" else Affine(8, "token", rank, scales="log8")
        return KVCodec(
            LatentKeys(inner, Subspaces.of(projections.k, projections.k_bias, rank), site.model.rope()),
            LatentValues(inner, Subspaces.of(projections.v, projections.v_bias, rank)),
        )

    def rank_of(self, site: Site) -> int:
        """Dimensions that a layer keeps: on a line from `rank` to `last`."""
        depth = site.layer / max(1, site.num_layers - 1)
        return Percent(self.rank.value + (self.last.value - self.rank.value) * depth).of(site.head_dim)
