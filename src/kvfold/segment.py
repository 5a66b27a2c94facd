"""Where cached tokens live: a `Run` of dense ones, and `Blocks` (kvfold.blocks) of encoded ones.

Both hold tokens by row, a row being one KV head of one sequence (row = sequence * num_kv_heads + head). Rows may differ in
length: padding is never stored, and every head may keep other tokens. Both answer `attend(query)` and `mass(query, lse)`; their
`tiles` are what attention reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kvfold import kernels
from kvfold.attention import dispatch, reference
from kvfold.attention.dispatch import Located
from kvfold.attention.reference import Partial, Query, Tile
from kvfold.store.base import KVCodec, part
from kvfold.store.dense import DenseCodec

TILE_TOKENS = 1024
"""Tokens a tile: enough for efficient products, few enough for its temporaries to stay in a core's cache."""


class Segment(ABC):
    """What both kinds share: attention over their tiles."""

    codec: KVCodec

    @property
    @abstractmethod
    def width(self) -> int:
        """Places a row, with or without a token."""

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """What the reference reads, oldest tokens first."""

    @abstractmethod
    def locate(self, head_dim: int) -> Located | None:
        """Where the tokens lie, for the compiled kernels; None when these can't read them."""

    def attend(self, query: Query) -> Partial:
        return dispatch.attend([(self, query)])

    def mass(self, query: Query, lse: torch.Tensor) -> torch.Tensor:
        """`[R, G, N]`: attention received by each token, in the order of the tiles."""
        return dispatch.mass(self, query, lse)

    def products(self, q: torch.Tensor) -> torch.Tensor:
        """`q · k_t` with every key, `[R, M, D] float32` to `[R, M, N]`; anything where there is no token."""
        folded = self.codec.k.fold_query(q)
        return torch.cat([reference.products(folded, self.codec.k, part("k", tile.fields)) for tile in self.tiles()], -1)

    def weighted_keys(self, weights: torch.Tensor) -> torch.Tensor:
        """`Σ_t w_t k_t`, `[R, M, N] float32` to `[R, M, D]`; weights are 0 where there is no token."""
        total = weights.new_zeros(())
        start = 0
        for tile in self.tiles():
            end = start + tile.slots.shape[1]
            total = total + reference.combine(weights[..., start:end].contiguous(), self.codec.k, part("k", tile.fields))
            start = end
        return self.codec.k.unfold_output(total)

    def value_norms(self) -> torch.Tensor:
        """`|v_t|`, `[R, N] float32`; anything where there is no token."""
        return torch.cat([self.codec.v.norms(part("v", tile.fields)).flatten(1) for tile in self.tiles()], 1)


ROOM = 16
"""A run that grows token by token gets memory for so many at once."""


@dataclass
class Room:
    """Memory that a run grows into, `[R, capacity, D]` twice and `[R, capacity] int32`.

    Runs are views of it. Only the longest of them, with `used` tokens, may write behind its end; all others copy.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    used: int


class Run(Segment):
    """Dense tokens: sinks, the recent ones, and the chunk that is being processed.

    Attributes:
        k, v: `[R, N, D]` in the model's type.
        slots: `[R, N] int32`; each row's tokens come first, by slot, then -1.
        score: `[R, N] float32`, what the keep policy knows of each token, or None.
        whole: known to have a token at every place; False where nobody has looked.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, score: torch.Tensor | None = None, *, whole: bool = False
    ):
        self.k, self.v, self.slots, self.score, self.whole = k, v, slots, score, whole
        self._described: tuple[ModuleType, Any] | None = None
        self.room: Room | None = None  # what k, v and slots are views of, when the run has grown

    @property
    def codec(self) -> KVCodec:  # type: ignore[override]
        return KVCodec(DenseCodec(self.k.dtype), DenseCodec(self.v.dtype))

    @staticmethod
    def empty(num_rows: int, head_dim: int, dtype: torch.dtype, device: torch.device, scored: bool) -> "Run":
        kv = torch.empty(num_rows, 0, head_dim, dtype=dtype, device=device)
        slots = torch.empty(num_rows, 0, dtype=torch.int32, device=device)
        return Run(kv, kv.clone(), slots, slots.float() if scored else None, whole=True)

    @property
    def width(self) -> int:
        """N: the tokens of the longest row."""
        return self.slots.shape[1]

    def num_tokens(self) -> list[int]:
        """Tokens of each row."""
        if self.whole:
            return [self.width] * len(self.slots)
        counts: list[int] = self.counts().tolist()
        return counts

    def vectors(self, row: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of single tokens of a row: `places [n] long` to `[n, D] float32` twice."""
        return self.k[row, places].float(), self.v[row, places].float()

    def counts(self) -> torch.Tensor:
        """`[R] long`: tokens of each row."""
        if self.whole:
            return torch.full((len(self.slots),), self.width, device=self.slots.device)
        return (self.slots >= 0).sum(1)

    def tiles(self) -> Iterator[Tile]:
        for start in range(0, self.width, TILE_TOKENS):
            span = slice(start, start + TILE_TOKENS)
            fields = {"k.x": self.k[:, None, span], "v.x": self.v[:, None, span]}
            yield Tile(fields, self.slots[:, span].long(), causal=True)

    def locate(self, head_dim: int) -> Located | None:
        family = kernels.serving(self.k.device.type)
        if family is None or not family.supports_dense(self.k.dtype):
            return None
        if self._described is None or self._described[0] is not family:  # what a run holds never changes
            self._described = family, family.describe_run(self.k, self.v, self.slots)
        descriptor = self._described[1]
        return None if descriptor is None else Located(descriptor)

    def where(self, stays: torch.Tensor) -> "Run":
        """Only the tokens that `stays [R, N] bool` marks, in order."""
        stays = stays & (self.slots >= 0)
        counts = stays.sum(1)
        width = int(counts.max()) if self.width else 0
        if width == self.width and bool((counts == width).all()):
            return self
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        run = self.take(order)
        absent = torch.arange(width, device=order.device) >= counts[:, None]
        run.slots = run.slots.masked_fill(absent, -1)
        run.whole = bool((counts == width).all())
        return run

    def take(self, order: torch.Tensor) -> "Run":
        """Tokens by their place: `order [R, n] long`."""
        wide = order[..., None].expand(-1, -1, self.k.shape[-1])
        score = None if self.score is None else self.score.gather(1, order)
        return Run(self.k.gather(1, wide), self.v.gather(1, wide), self.slots.gather(1, order), score)

    def split(self, at: torch.Tensor) -> tuple["Run", "Run"]:
        """The first `at [R] long` tokens of every row, and the rest; views where all rows are cut at the same place."""
        if self.whole and len(places := set(at.tolist())) == 1:
            (place,) = places
            return self._span(0, place), self._span(place, self.width)
        first = torch.arange(self.width, device=at.device) < at[:, None]
        return self.where(first), self.where(~first)

    def _span(self, start: int, end: int) -> "Run":
        score = None if self.score is None else self.score[:, start:end]
        return Run(self.k[:, start:end], self.v[:, start:end], self.slots[:, start:end], score, whole=True)

    def rows(self, rows: torch.Tensor) -> "Run":
        """The run of other rows (beams, a smaller batch)."""
        score = None if self.score is None else self.score[rows]
        return Run(self.k[rows], self.v[rows], self.slots[rows], score, whole=self.whole)

    def owned(self) -> "Run":
        """The same run in memory of its own (and the room it grows into), not as a view of something larger."""

        if self.room is not None:
            return self

        def own(x: torch.Tensor) -> torch.Tensor:
            whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
            return x if whole else x.clone(memory_format=torch.contiguous_format)

        score = None if self.score is None else own(self.score)
        return Run(own(self.k), own(self.v), own(self.slots), score, whole=self.whole)

    def trimmed(self) -> "Run":
        """The same run in memory of its own, without room to grow: for one that seldom does."""
        if self.room is None:
            return self.owned()
        return Run(self.k.contiguous(), self.v.contiguous(), self.slots.contiguous(), self.score, whole=self.whole)

    def grown(self, other: "Run") -> "Run":
        """As `join`, but where a few tokens come behind many the latter are rarely copied: the run keeps room for the next."""
        plain = self.whole and other.whole and self.score is None and other.score is None
        if not plain or other.width >= ROOM or self.width == 0:
            return join(self, other)
        before, after = self.width, self.width + other.width
        room = self.roomy(other.width)
        room.k[:, before:after], room.v[:, before:after], room.slots[:, before:after] = other.k, other.v, other.slots
        return self.longer(other.width)

    def longer(self, num_new: int) -> "Run":
        """This run and the tokens behind it that are in its room already."""
        room = self.room
        assert room is not None
        after = room.used = self.width + num_new
        run = Run(room.k[:, :after], room.v[:, :after], room.slots[:, :after], whole=True)
        run.room = room
        return run

    def roomy(self, num_new: int) -> Room:
        """The room that this run is in, with place for `num_new` tokens behind it that no other run has."""
        width, room = self.width, self.room
        if room is None or room.used != width or width + num_new > room.k.shape[1]:
            rows, _, head_dim = self.k.shape
            capacity = -(-(width + num_new) // ROOM) * ROOM
            k, v = (x.new_empty(rows, capacity, head_dim) for x in (self.k, self.v))
            room = self.room = Room(k, v, self.slots.new_empty(rows, capacity), width)
            k[:, :width], v[:, :width], room.slots[:, :width] = self.k, self.v, self.slots
            self.k, self.v, self.slots = k[:, :width], v[:, :width], room.slots[:, :width]
            self._described = None
        return room

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k.float(), self.v.float(), self.slots.long()

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens, without room for others."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"k": self.k, "v": self.v, "slots": self.slots, "score": self.score}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def join(first: Run, second: Run) -> Run:
    """Both runs, `first` being the older; padding in between is closed up."""
    if first.width == 0:
        return second
    if second.width == 0:
        return first
    score = None
    if first.score is not None and second.score is not None:
        score = torch.cat([first.score, second.score], 1)
    run = Run(
        torch.cat([first.k, second.k], 1),
        torch.cat([first.v, second.v], 1),
        torch.cat([first.slots, second.slots], 1),
        score,
        whole=first.whole and second.whole,
    )
    return run if run.whole else run.where(run.slots >= 0)
