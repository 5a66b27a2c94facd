"""What a codec is: a way to hold K or V in fewer bytes, and to attend without undoing it.

Attention needs two things of a block of tokens X: the products `q · x_t` with a query (for K) and the sum
`Σ p_t x_t` under probabilities (for V). A codec answers both from the codes, with scales, zero points, tables and
rotations folded into q, into the scores, into p or into the output; X itself never exists as a whole.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvfold.frame import Frame
from kvfold.site import Site

Fields = dict[str, torch.Tensor]
"""The tensors that hold encoded tokens: name to `[..., T, *]` (one entry a token) or `[..., *]` (one a block)."""


class TensorCodec(ABC):
    """One way to hold vectors. Stateless: everything that belongs to the data is in the fields.

    Shapes: `...` is any run of leading axes (rows, blocks), T the tokens of a block, D the head dim, M queries.
    """

    @property
    @abstractmethod
    def unit(self) -> Literal["token", "block"]:
        """What can be encoded alone. `token`: every field has a token axis, and tokens can be moved between blocks without
        loss. `block`: tokens share numbers (a scale per channel), so that a block is encoded at once."""

    @property
    def block(self) -> int:
        """Tokens a block; all tokens that share a number are in one block."""
        return 64

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Fields:
        """`[..., T, D] float` to fields. A block whose tail is unused repeats a real token there."""

    @abstractmethod
    def decode(self, fields: Fields) -> torch.Tensor:
        """Fields to `[..., T, D] float32`: the oracle of `dot` and `combine`, and what moves tokens between blocks."""

    @abstractmethod
    def dot(self, q: torch.Tensor, fields: Fields) -> torch.Tensor:
        """`q · x_t` for every token: `[..., M, D] float32` (as `fold_query` returned it) to `[..., M, T] float32`."""

    @abstractmethod
    def combine(self, p: torch.Tensor, fields: Fields) -> torch.Tensor:
        """`Σ_t p_t x_t`: `[..., M, T] float32` to `[..., M, D] float32`, before `unfold_output`."""

    def norms(self, fields: Fields) -> torch.Tensor:
        """`|x_t|`, fields to `[..., T] float32`."""
        return self.decode(fields).norm(dim=-1)

    def constants(self) -> Fields:
        """Tensors of the codec itself, whatever the number of tokens: a basis made from the layer's weights. They count."""
        return {}

    def fold_query(self, q: torch.Tensor) -> torch.Tensor:
        """What is done to queries once, before all blocks (a rotation)."""
        return q

    def unfold_output(self, out: torch.Tensor) -> torch.Tensor:
        """What is done to the output once, after all blocks (the rotation back)."""
        return out


@dataclass(frozen=True, eq=False)
class AroundCodec(TensorCodec):
    """A codec that hands what it makes of vectors to another one, `inner`, and takes its blocks and what it folds."""

    inner: TensorCodec

    @property
    def unit(self) -> Literal["token", "block"]:
        return self.inner.unit

    @property
    def block(self) -> int:
        return self.inner.block

    def fold_query(self, q: torch.Tensor) -> torch.Tensor:
        return self.inner.fold_query(q)

    def unfold_output(self, out: torch.Tensor) -> torch.Tensor:
        return self.inner.unfold_output(out)


class PositionalCodec(TensorCodec):
    """A codec that has to know at which position each vector stands, and keeps it as a field. Its unit is the token."""

    @abstractmethod
    def encode_at(self, x: torch.Tensor, positions: torch.Tensor) -> Fields:
        """`x [..., T, D]` of the positions that RoPE has turned them to, `[..., T] int`, broadcast."""

    def encode(self, x: torch.Tensor) -> Fields:
        """As if the tokens stood at the first positions."""
        return self.encode_at(x, torch.arange(x.shape[-2], device=x.device))


@dataclass(frozen=True)
class KVCodec:
    """A codec for K and one for V, and the dense tokens that go with them."""

    k: TensorCodec
    v: TensorCodec

    @property
    def unit(self) -> Literal["token", "block"]:
        return "block" if "block" in (self.k.unit, self.v.unit) else "token"

    @property
    def block(self) -> int:
        """Tokens a block."""
        return max(self.k.block, self.v.block)

    @property
    def positional(self) -> bool:
        """Whether `encode` needs positions. Values have none."""
        return isinstance(self.k, PositionalCodec)

    def encode(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None) -> Fields:
        """`[..., T, D]` each to one dict of fields, named `k.*` and `v.*`; `positions [..., T] int` if the codec needs them."""
        if isinstance(self.k, PositionalCodec) and positions is not None:
            return join("k", self.k.encode_at(k, positions)) | join("v", self.v.encode(v))
        return join("k", self.k.encode(k)) | join("v", self.v.encode(v))

    def constants(self) -> Fields:
        """The tensors of both codecs that belong to no token."""
        return join("k", self.k.constants()) | join("v", self.v.constants())

    def decode(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k.decode(part("k", fields)), self.v.decode(part("v", fields))


def join(name: str, fields: Fields) -> Fields:
    return {f"{name}.{key}": tensor for key, tensor in fields.items()}


def part(name: str, fields: Fields) -> Fields:
    prefix = f"{name}."
    return {key[len(prefix) :]: tensor for key, tensor in fields.items() if key.startswith(prefix)}


class Store(ABC):
    """The store stage of a plan. Subclasses are frozen dataclasses; their fields are the plan's arguments.

    `sink` and `window`, fields or made from others, are what this method itself wants dense; `protect(...)` in a plan replaces
    them.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def sink(self) -> int:
        """The first tokens that stay dense."""

    @property
    @abstractmethod
    def window(self) -> int:
        """The last tokens that stay dense."""

    @abstractmethod
    def codec(self, site: Site) -> KVCodec:
        """The codecs for a layer. Raises PlanError when the method can't hold vectors of this size."""

    def frame(self, site: Site) -> Frame | None:
        """The coordinates in which a layer holds its tokens under this method; None for the model's own."""
        return None

    def check(self) -> None:  # noqa: B027  (most methods have nothing to check)
        """Raises PlanError when the arguments can't work together."""


class AroundStore(Store):
    """A method around another one, its argument `codes`, whose dense tokens at both ends it takes over."""

    codes: Store

    @property
    def sink(self) -> int:
        return self.codes.sink

    @property
    def window(self) -> int:
        return self.codes.window

    def check(self) -> None:
        self.codes.check()
