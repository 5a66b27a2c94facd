"""Encoded tokens of one layer, in blocks of a pool: reading them, wherever the pool holds them."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from kvfold import kernels
from kvfold.attention.dispatch import Located
from kvfold.attention.reference import Query, Tile
from kvfold.block_view import BlockView
from kvfold.pool import BlockPool, PoolPart
from kvfold.segment import Segment
from kvfold.store.base import Fields, KVCodec

Summarize = Callable[[torch.Tensor, torch.Tensor | None], Fields]
"""Keys `[..., T, D]` of whole blocks, and the scores `[..., T]` of their tokens if they have any, to fields `page.*`."""


class BlockReader(Segment):
    """What can be asked of blocks; `kvfold.blocks.Blocks` is what changes them.

    Attributes:
        starts, lengths: the first slot (where rows are contiguous, else None) and the number of tokens of each row.
    """

    def __init__(
        self,
        codec: KVCodec,
        num_rows: int,
        device: torch.device,
        *,
        contiguous: bool,
        scored: bool,
        pool: Callable[..., BlockPool] = BlockPool,
        summarize: Summarize | None = None,
    ):
        self.codec, self.summarize = codec, summarize
        self.pool = pool(num_rows, codec.block, device, slots=not contiguous, scored=scored)
        self.starts: list[int] | None = [0] * num_rows if contiguous else None
        self.lengths = [0] * num_rows  # tokens of each row
        self._described: tuple[Any, Any] | None = None

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> Literal["token", "block"]:
        """What is written at a time."""
        return "block" if self.summarize else self.codec.unit

    @property
    def contiguous(self) -> bool:
        return self.starts is not None

    @property
    def width(self) -> int:
        """Places a row, tokens or not: columns of the table times the block."""
        return self.pool.table.shape[1] * self.pool.block

    def slots(self) -> torch.Tensor:
        """`[R, width] int32`: the slot of every place, -1 where there is no token."""
        pool = self.pool
        if self.starts is None:
            slots = self._by_row(pool.slots)
            return slots if pool.full else slots.masked_fill(~self._present(), -1)
        place = torch.arange(self.width, dtype=torch.int32, device=pool.device)
        starts = torch.tensor(self.starts, dtype=torch.int32, device=pool.device)[:, None]
        lengths = torch.tensor(self.lengths, device=pool.device)[:, None]
        return torch.where(place < lengths, starts + place, -1)

    def score(self) -> torch.Tensor:
        """`[R, width] float32`: the keep policy's number for every place."""
        return self._by_row(self.pool.score)

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers of a pool, `[P, T]`, as rows have them: `[R, width]`."""
        table = self.pool.table
        return x.index_select(0, table.clamp_min(0).flatten()).view(len(table), -1)

    def _present(self) -> torch.Tensor:
        """`[R, width] bool`: places that belong to a block of the row."""
        return (self.pool.table >= 0).repeat_interleave(self.pool.block, 1)

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of one block: its fields, its slots and scores, and its place in the table."""
        probe = torch.zeros(1, 1, self.codec.block, head_dim, device=self.pool.device)
        fields = sum(x.nbytes for x in self.codec.encode(probe, probe).values())
        return fields + self.codec.block * (4 + 4 * self.pool.scored) + self.pool.table.itemsize

    def counts(self) -> torch.Tensor:
        """`[R] long`: tokens of each row."""
        return torch.tensor(self.lengths, device=self.pool.device)

    def num_tokens(self) -> list[int]:
        """The same, as numbers."""
        return self.lengths

    def tiles(self) -> Iterator[Tile]:
        for view in self.parts():
            yield from view.tiles()

    def locate(self, head_dim: int) -> Located | None:
        pool = self.pool
        family = kernels.serving(pool.device.type)
        if family is None or not pool.in_one_place or not pool.fields:
            return None
        mark = family, pool.mark()
        if self._described is None or self._described[0] != mark:
            descriptor = None
            if family.supports(self.codec):
                slots = pool.slots if pool.has_slots else None
                descriptor = family.describe_blocks(self.codec, pool.fields, pool.table, slots, head_dim)
            self._described = mark, descriptor
        if self._described[1] is None:
            return None
        if self.starts is None:
            return Located(self._described[1])
        return Located(self._described[1], self.starts, self.lengths)

    def parts(self, columns: torch.Tensor | None = None, codec: KVCodec | None = None) -> Iterator[BlockView]:
        """What attention reads, part by part; each is valid until the next is asked for.

        Args:
            columns: `[R, n] long`, columns of the table in order, -1 after a row's last; None for all.
            codec: one that reads the fields in another way than the one that writes them.
        """
        table = self.pool.table
        if columns is not None:
            table = table.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, -1)
        for part in self.pool.located(table):
            mine = part.columns
            if columns is not None:
                mine = columns if mine is None else columns.gather(1, mine.clamp_min(0)).masked_fill(mine < 0, -1)
            yield self._view(part, mine, codec or self.codec)

    def mass(self, query: Query, lse: torch.Tensor) -> torch.Tensor:
        if self.pool.in_one_place:
            return super().mass(query, lse)
        rows, num_columns = self.pool.table.shape
        received = query.q.new_zeros(rows, query.num_groups, num_columns + 1, self.pool.block)
        for view in self.parts():
            assert view.columns is not None
            columns = view.columns.masked_fill(view.columns < 0, num_columns)  # one too many, for what is none
            mass = view.mass(query, lse).view(rows, query.num_groups, -1, self.pool.block)
            received.scatter_(2, columns[:, None, :, None].expand_as(mass), mass)
        return received[:, :, :-1].flatten(2)

    def _view(self, part: PoolPart, columns: torch.Tensor | None, codec: KVCodec) -> BlockView:
        """The blocks of a part, which are `columns [R, c]` of the table (None: all)."""
        if self.starts is None:
            return BlockView(codec, part.fields, part.index, columns, self.pool.slots_in(part))
        if columns is None:
            return BlockView(codec, part.fields, part.index, None, None, self.starts, self.lengths)
        left = torch.tensor(self.lengths, device=columns.device)[:, None] - columns * self.pool.block
        tokens = left.clamp(0, self.pool.block).masked_fill(columns < 0, 0).sum(1)
        # Slots tell queries what is younger, or outside of a strict window; without a keep policy all that is held is seen.
        return BlockView(codec, part.fields, part.index, columns, None, [0] * len(self.lengths), tokens.tolist())

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens decoded, `[R, width, D] float32` twice, and their slots: for tests, never for attention."""
        k, v = self.codec.decode(self.pool.read(self.pool.table.clamp_min(0)))
        return k.flatten(1, 2), v.flatten(1, 2), self.slots().long()

    def products(self, q: torch.Tensor) -> torch.Tensor:
        return super().products(q) if self.pool.in_one_place else self._gathered(lambda view: view.products(q))

    def weighted_keys(self, weights: torch.Tensor) -> torch.Tensor:
        if self.pool.in_one_place:
            return super().weighted_keys(weights)
        by_block = weights.unflatten(-1, (-1, self.pool.block))
        total = weights.new_zeros(())
        for view in self.parts():
            assert view.columns is not None
            at = view.columns.clamp_min(0)[:, None, :, None].expand(-1, weights.shape[1], -1, self.pool.block)
            mine = by_block.gather(2, at).masked_fill(view.columns[:, None, :, None] < 0, 0.0)
            total = total + view.weighted_keys(mine.flatten(2))
        return total

    def value_norms(self) -> torch.Tensor:
        if self.pool.in_one_place:
            return super().value_norms()
        return self._gathered(lambda view: view.value_norms()[:, None])[:, 0]

    def vectors(self, row: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of single tokens of a row, decoded: `places [n] long` to `[n, D] float32` twice."""
        block = self.pool.block
        return self._decode_places(self.pool.table[row, places // block] * block + places % block)

    def _gathered(self, of_view: Callable[[BlockView], torch.Tensor]) -> torch.Tensor:
        """`[R, G, width]`, put together from what `of_view` says of each part, `[R, G, its places]`; 0 where none is."""
        rows, num_columns = self.pool.table.shape
        whole: torch.Tensor | None = None
        for view in self.parts():
            assert view.columns is not None
            numbers = of_view(view).unflatten(-1, (-1, self.pool.block))
            if whole is None:
                whole = numbers.new_zeros(rows, numbers.shape[1], num_columns + 1, self.pool.block)
            columns = view.columns.masked_fill(view.columns < 0, num_columns)  # one too many, for what is none
            whole.scatter_(2, columns[:, None, :, None].expand_as(numbers), numbers)
        assert whole is not None
        return whole[:, :, :-1].flatten(2)

    def _decode_places(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Single tokens, dense: `[n, D]` twice."""
        ids, inverse = (places // self.pool.block).unique(return_inverse=True)
        k, v = self.codec.decode(self.pool.read(ids))
        offset = places % self.pool.block
        return k[inverse, offset], v[inverse, offset]
