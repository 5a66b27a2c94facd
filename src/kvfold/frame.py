"""Coordinates in which a layer holds its keys and values: a basis and an origin for each KV head.

Attention does not change with them. With k' = (k - m) E and q' = q E^-T, q' · k' = q · k - q · m, and what is missing is the
same for every token, so that the softmax does not see it. With v' = (v - m) E, Σ p_t v_t = (Σ p_t v'_t) E^-1 + m, as Σ p_t = 1.
What is done to queries and outputs costs D² multiplications a head, however long the context.

A frame belongs to the model, as its weights do: it holds nothing of the tokens.
"""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Frame:
    """The coordinates of one layer.

    Attributes:
        k_origin, v_origin: `[Hkv, D] float32`, what is taken off.
        k_basis, v_basis: `[Hkv, D, D] float32`, invertible: column c makes coordinate c.
        k_dual, v_inverse: `[Hkv, D, D] float32`: E^-T for queries, E^-1 for outputs.
    """

    k_origin: torch.Tensor
    k_basis: torch.Tensor
    k_dual: torch.Tensor
    v_origin: torch.Tensor
    v_basis: torch.Tensor
    v_inverse: torch.Tensor

    @staticmethod
    def of(k_origin: torch.Tensor, k_basis: torch.Tensor, v_origin: torch.Tensor, v_basis: torch.Tensor) -> "Frame":
        """From origins `[Hkv, D]` and bases `[Hkv, D, D]`. torch.linalg.LinAlgError when a basis has no inverse."""
        k_inverse, v_inverse = (torch.linalg.inv(basis.double()).float() for basis in (k_basis, v_basis))
        return Frame(k_origin.float(), k_basis.float(), k_inverse.mT.contiguous(), v_origin.float(), v_basis.float(), v_inverse)

    @property
    def nbytes(self) -> int:
        """Bytes that stand beside the model's weights."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """`[B, Hkv, N, D]` into the frame; the type stays."""
        return ((k.float() - self._at(self.k_origin, k)[:, None]) @ self._at(self.k_basis, k)).to(k.dtype)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        """`[B, Hkv, N, D]` into the frame; the type stays."""
        return ((v.float() - self._at(self.v_origin, v)[:, None]) @ self._at(self.v_basis, v)).to(v.dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """`[B * Hkv, M, D] float32`, the queries of each KV head, into the frame."""
        return (q.unflatten(0, (-1, len(self.k_dual))) @ self._at(self.k_dual, q)).flatten(0, 1)

    def outputs(self, out: torch.Tensor) -> torch.Tensor:
        """`[B * Hkv, M, D] float32` out of the frame."""
        by_head = out.unflatten(0, (-1, len(self.v_inverse)))
        return (by_head @ self._at(self.v_inverse, out) + self._at(self.v_origin, out)[:, None]).flatten(0, 1)

    @staticmethod
    def _at(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.to(like.device)
