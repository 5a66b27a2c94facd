"""Some blocks of a pool as a segment: what attention reads, and what it need not read."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from kvfold import kernels
from kvfold.attention.dispatch import Located
from kvfold.attention.reference import Tile
from kvfold.segment import TILE_TOKENS, Segment
from kvfold.store.base import Fields, KVCodec


class BlockView(Segment):
    """Blocks of every row, read as they lie. It holds nothing: the tensors are their pool's, and must outlive it.

    Attributes:
        fields: name to `[F, T, *]` or `[F, *]`.
        index: `[R, c] long`, the blocks of each row as places in the fields, left-aligned, -1 after its last.
        columns: `[R, c] long`, the columns of the row's table that these blocks are; None for all of them.
        slots: `[F, T] int32`, -1 where there is no token; or None where every block but a row's last is full.
        starts, lengths: without slots, the first slot and the number of tokens of each row.
    """

    def __init__(
        self,
        codec: KVCodec,
        fields: Fields,
        index: torch.Tensor,
        columns: torch.Tensor | None,
        slots: torch.Tensor | None,
        starts: Sequence[int] = (),
        lengths: Sequence[int] = (),
    ):
        self.codec, self.fields, self.index, self.columns, self.block_slots = codec, fields, index, columns, slots
        self.starts, self.lengths = starts, lengths
        self._described: tuple[ModuleType, Any] | None = None

    @property
    def width(self) -> int:
        return self.index.shape[1] * self.codec.block

    def slots(self) -> torch.Tensor:
        """`[R, width] long`: the slot of every place, -1 where there is no token."""
        device = self.index.device
        if self.block_slots is not None:
            slots = self.block_slots[self.index.clamp_min(0)].long().masked_fill(self.index[..., None] < 0, -1)
            return slots.flatten(1)
        place = torch.arange(self.width, device=device)
        starts = torch.tensor(self.starts, device=device)[:, None]
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        return torch.where(place < lengths, starts + place, -1)

    def tiles(self) -> Iterator[Tile]:
        slots = self.slots()
        block = self.codec.block
        columns = max(1, TILE_TOKENS // block)
        for start in range(0, self.index.shape[1], columns):
            index = self.index[:, start : start + columns].clamp_min(0)
            flat = index.flatten()
            fields = {name: x.index_select(0, flat).view(*index.shape, *x.shape[1:]) for name, x in self.fields.items()}
            end = (start + columns) * block
            whole = self.block_slots is None and min(self.lengths) >= min(end, self.width)
            yield Tile(fields, slots[:, start * block : end], whole=whole)

    def locate(self, head_dim: int) -> Located | None:
        family = kernels.serving(self.index.device.type)
        if family is None or not self.fields or not family.supports(self.codec):
            return None
        if self._described is None or self._described[0] is not family:
            self._described = (
                family,
                family.describe_blocks(self.codec, self.fields, self.index, self.block_slots, head_dim),
            )
        descriptor = self._described[1]
        return None if descriptor is None else Located(descriptor, self.starts, self.lengths)
