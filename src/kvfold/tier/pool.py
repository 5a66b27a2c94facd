"""A pool whose blocks lie in several places: the device, the host's memory, a file.

Ids, the table, slots, scores and summaries are as in any pool, and stay on the device; only fields move. Whole blocks move as
they are, so that what is read is bit for bit what was written.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kvfold.budget import Room
from kvfold.errors import KvfoldError, PlanError
from kvfold.pool import BlockPool, PoolPart, is_summary
from kvfold.store.base import Fields
from kvfold.tier.shelf import DiskShelf, MemoryShelf, Shelf
from kvfold.tier.stage import Reader, Request, Stage
from kvfold.tier.tier import Tier

DEVICE, HOST, DISK = 0, 1, 2
STAGED_TOKENS = 4096
"""Tokens a row that come to the device at a time."""
IDLE = 1 / 8
"""The share of a place's memory that may be free, so that the next blocks find room; none where a budget counts bytes."""


class FullError(KvfoldError):
    """All tiers of a plan are full."""


class Dense(Protocol):
    """What the pool must know of the dense tokens beside it."""

    def counts(self) -> torch.Tensor: ...

    def tensors(self) -> Fields: ...


class TieredPool(BlockPool):
    """A pool of blocks in up to three places.

    Attributes:
        where: `[P] int8`, the place of each block: DEVICE, HOST or DISK; -1 for blocks that were never written.
        at: `[P] long`, the index of each block in its place. Both on the CPU.
        predictable: whether each step reads every block, so that the next layer's can be fetched ahead.
    """

    in_one_place = False

    def __init__(
        self,
        num_rows: int,
        block: int,
        device: torch.device,
        *,
        slots: bool,
        scored: bool,
        tier: Tier,
        stage: Stage,
        layer: int,
        num_layers: int,
        predictable: bool = True,
    ):
        super().__init__(num_rows, block, device, slots=slots, scored=scored)
        self.tier, self.stage, self.num_layers, self.predictable = tier, stage, num_layers, predictable
        self.shelves: dict[int, Shelf] = {DEVICE: MemoryShelf(device)}
        if tier.host.used:
            self.shelves[HOST] = MemoryShelf(torch.device("cpu"), pinned=device.type == "cuda")
        if tier.disk.used:
            self.shelves[DISK] = DiskShelf(f"layer-{layer:02d}.blocks")
        self.fields = self._device.fields
        self.where = torch.zeros(0, dtype=torch.int8)
        self.at = torch.zeros(0, dtype=torch.long)
        self._mark = 0
        stage.enter(layer, self)

    @property
    def _device(self) -> MemoryShelf:
        shelf = self.shelves[DEVICE]
        assert isinstance(shelf, MemoryShelf)
        return shelf

    @property
    def disk_bytes(self) -> int:
        shelf = self.shelves.get(DISK)
        return shelf.nbytes if isinstance(shelf, DiskShelf) else 0

    def tensors(self) -> dict[str, torch.Tensor]:
        named = super().tensors() | {"where": self.where, "at": self.at}
        named |= self.stage.tensors()
        if isinstance(host := self.shelves.get(HOST), MemoryShelf):
            named |= {f"host.{name}": x for name, x in host.fields.items()}
        if isinstance(disk := self.shelves.get(DISK), DiskShelf):
            named["disk.checksums"] = disk.checksums
        return named

    # -- reading ---------------------------------------------------------------------------------------------------------

    def read(self, ids: torch.Tensor) -> Fields:
        wanted, inverse = ids.flatten().cpu().unique(return_inverse=True)
        held = {name: x.new_zeros(len(wanted), *x.shape[1:]) for name, x in self.fields.items()}
        near = self.where[wanted] == DEVICE
        for name, x in held.items():
            x[near.to(self.device)] = self.fields[name][self.at[wanted[near]].to(self.device)]
        far = torch.nonzero(self.where[wanted] > DEVICE).flatten()
        far = far[(self.where[wanted[far]].long() * 2**40 + self.at[wanted[far]]).argsort()]
        if len(far):
            came = {name: torch.empty(len(far), *x.shape[1:], dtype=x.dtype) for name, x in self.fields.items()}
            self.reader(wanted[far])(came)
            for name, x in came.items():
                held[name][far.to(self.device)] = x.to(self.device)
        inverse = inverse.to(self.device)
        return {name: x[inverse].view(*ids.shape, *x.shape[1:]) for name, x in held.items()}

    def read_tokens(self, addresses: torch.Tensor) -> Fields:
        blocks = self.read(addresses // self.block)
        row = torch.arange(len(addresses), device=self.device)
        return {name: x[row, addresses % self.block] for name, x in blocks.items()}

    def reader(self, ids: torch.Tensor) -> Reader:
        """What brings the blocks `ids [n]` from below the device; those of the host come first in `ids`."""
        where, at = self.where[ids], self.at[ids]
        jobs = [(self.shelves[place], at[where == place]) for place in (HOST, DISK) if bool((where == place).any())]

        def read(out: Fields) -> None:
            start = 0
            for shelf, places in jobs:
                end = start + len(places)
                shelf.get(places, {name: x[start:end] for name, x in out.items()})
                start = end

        return read

    def located(self, table: torch.Tensor) -> Iterator[PoolPart]:
        where = self._in_table(self.where, table)
        if bool((where == DEVICE).any()):
            columns = _left_aligned(where == DEVICE)
            ids = _gather(table, columns)
            yield PoolPart(self.fields, self._in_table(self.at, ids).to(table.device), ids, columns.to(table.device))
        parts = self._far_parts(table, where)
        follower = None
        for i, columns in enumerate(parts):
            ids = _gather(table, columns)
            request = self._request(ids)
            fields = self.stage.fetch(self, request)
            if i + 1 < len(parts):
                self.stage.expect(self, self._request(_gather(table, parts[i + 1])))
            elif self.predictable and (follower := self.stage.after(self)) and (first := follower.first_request()):
                self.stage.expect(follower, first)
            place = torch.full((self._capacity,), -1, dtype=torch.long)
            place[request.ids] = torch.arange(len(request.ids))
            yield PoolPart(fields, self._in_table(place, ids).to(table.device), ids, columns.to(table.device))

    def first_request(self) -> Request | None:
        """What a step that reads everything asks for first; None when all is on the device."""
        parts = self._far_parts(self.table, self._in_table(self.where, self.table))
        return self._request(_gather(self.table, parts[0])) if parts else None

    def _far_parts(self, table: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
        """Columns `[R, c]` of the blocks below the device, a stage full at a time."""
        far = where > DEVICE
        if not bool(far.any()):
            return []
        return list(_left_aligned(far).split(max(1, STAGED_TOKENS // self.block), dim=1))

    def _request(self, ids: torch.Tensor) -> Request:
        ids = ids[ids >= 0].cpu().unique()
        order = (self.where[ids].long() * 2**40 + self.at[ids]).argsort()
        return Request(ids[order], self._mark)

    def _in_table(self, known: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """What is known of each block of a table, -1 where there is none."""
        table = table.cpu()
        return known[table.clamp_min(0)].masked_fill(table < 0, -1) if len(known) else table

    # -- writing ---------------------------------------------------------------------------------------------------------

    def write(self, ids: torch.Tensor, encoded: Fields) -> None:
        self._ensure(encoded, per_token=False)
        places = self._bring(ids, fresh=True)
        for name, x in encoded.items():
            if is_summary(name):
                self.summary[name][ids] = x
            else:
                self.fields[name][places] = x

    def write_tokens(self, addresses: torch.Tensor, encoded: Fields) -> None:
        self._ensure({name: x.unsqueeze(0) for name, x in encoded.items()}, per_token=True)
        ids, inverse = (addresses // self.block).unique(return_inverse=True)
        places = self._bring(ids, fresh=False)[inverse] * self.block + addresses % self.block
        for name, x in encoded.items():
            self.fields[name].view(-1, *x.shape[1:])[places] = x

    def _bring(self, ids: torch.Tensor, *, fresh: bool) -> torch.Tensor:
        """Brings blocks to the device, or makes room for them there if they are `fresh`; returns their places."""
        ids = ids.cpu()
        absent = ids[self.where[ids] != DEVICE]
        if len(absent):
            blocks = None if fresh else self.read(absent)
            self._release(absent)
            places = self._device.take(len(absent))
            if blocks:
                self._device.set(places, blocks)
            self.where[absent], self.at[absent] = DEVICE, places
        return self.at[ids].to(self.device)

    def _release(self, ids: torch.Tensor) -> None:
        """Gives back the places of blocks."""
        self._mark += 1
        for place, shelf in self.shelves.items():
            shelf.free(self.at[ids[self.where[ids] == place]])
        self.where[ids] = -1

    def _num_held(self, name: str) -> int:
        return self._capacity if is_summary(name) else self._device.capacity

    def _resize_fields(self, capacity: int) -> None:
        grown = capacity - len(self.where)
        self.where = torch.cat([self.where, torch.full((grown,), -1, dtype=torch.int8)])
        self.at = torch.cat([self.at, torch.zeros(grown, dtype=torch.long)])

    def _select(self, used: torch.Tensor) -> None:
        gone = torch.ones(len(self.where), dtype=torch.bool)
        gone[used.cpu()] = False
        self._release(torch.nonzero(gone).flatten())
        self.where, self.at = self.where[used.cpu()], self.at[used.cpu()]
        self._select_known(used)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        super().restore(state)
        held, self.fields = self.fields, self._device.fields
        self.where = torch.zeros(self._capacity, dtype=torch.int8)
        self.at = torch.arange(self._capacity)
        if held:
            self.at = self._device.put(held)

    # -- moving ----------------------------------------------------------------------------------------------------------

    def spill(self, num_real: list[int], *dense: Dense) -> None:
        """Moves blocks to where the plan wants them: the newest of each row on the device, the oldest as far down as need be.

        Args:
            num_real: tokens seen of each sequence.
            dense: what is on the device in any case.

        Raises:
            FullError: there is no room for a row's tokens.
            PlanError: the device's budget, in bytes, has no room for a single block of each row.
            FileError: the disk is full, or a file damaged.
        """
        idle = torch.tensor([i for i in self._free if self.where[i] >= 0], dtype=torch.long)
        if len(idle):
            self._release(idle)
        if not self.fields:
            return
        counts = (self.table >= 0).sum(1)
        age = (counts[:, None] - 1 - torch.arange(self.table.shape[1], device=self.device)).cpu()
        present = age >= 0
        limit = self._device_room(num_real, dense)
        wanted = torch.zeros(age.shape, dtype=torch.int8)
        for place, room in ((HOST, self.tier.host), (DISK, self.tier.disk)):
            wanted[age >= limit[:, None]] = place
            limit = limit + self._room(room, num_real)
        if bool((present & (age >= limit[:, None])).any()):
            held = int(limit.min()) * self.block
            raise FullError(f"all tiers are full: they hold {held} tokens of a sequence; give one no budget, or drop tokens")
        nearest = torch.full((self._capacity,), DISK + 1, dtype=torch.int8)
        nearest.scatter_reduce_(0, self.table.cpu()[present], wanted[present], "amin")  # beams share blocks
        for place in (DISK, HOST, DEVICE):
            ids = torch.nonzero((nearest == place) & (self.where != place) & (self.where >= 0)).flatten()
            if len(ids):
                self._move(ids, place)
        for place, budget in ((DEVICE, self.tier.device), (HOST, self.tier.host.limit)):
            shelf = self.shelves.get(place)
            free = 0.0 if budget and budget.unit == "bytes" else IDLE
            if isinstance(shelf, MemoryShelf) and (moved := shelf.compact(free)) is not None:
                here = self.where == place
                self.at[here] = moved[self.at[here]]
                self._mark += 1

    def _move(self, ids: torch.Tensor, place: int) -> None:
        blocks = self.read(ids)
        self._release(ids)
        self.at[ids] = self.shelves[place].put(blocks)
        self.where[ids] = place

    def _device_room(self, num_real: list[int], dense: Sequence[Dense]) -> torch.Tensor:
        """`[R]`: blocks that a row may have on the device; one at least, as it is being written."""
        budget = self.tier.device
        num_rows = self.table.shape[0]
        if budget.unit != "bytes":
            tokens = _by_row([budget.tokens(n) for n in num_real], num_rows)
            return ((tokens - sum(run.counts().cpu() for run in dense)) // self.block).clamp_min(1)
        dense_bytes = sum(x.untyped_storage().nbytes() for run in dense for x in run.tensors().values())
        known = [self.table, self.slots, self.score, self.where, self.at, *self.summary.values()]
        columns = min(self.table.shape[1], max(1, STAGED_TOKENS // self.block))
        staged = 2 * columns * num_rows * self._block_bytes()
        staged = max(staged, sum(x.nbytes for x in self.stage.buffers))
        besides = dense_bytes + sum(x.nbytes for x in known) + staged / self.num_layers
        num_blocks = int((budget.value / self.num_layers - besides) // (self._block_bytes() * num_rows))
        if num_blocks < 1:
            least = (besides + self._block_bytes() * num_rows) * self.num_layers
            raise PlanError(f"tier: {budget} is too little for the device: it needs {least / 2**10:.0f}KiB at least")
        return torch.full((num_rows,), num_blocks)

    def _room(self, room: Room, num_real: list[int]) -> torch.Tensor:
        """`[R]`: blocks that a row may have in a place below the device."""
        num_rows = self.table.shape[0]
        if not room.used:
            return torch.zeros(num_rows, dtype=torch.long)
        if room.limit is None:
            return torch.full((num_rows,), 2**40)
        if room.limit.unit == "bytes":
            return torch.full((num_rows,), int(room.limit.value / self.num_layers // (self._block_bytes() * num_rows)))
        return _by_row([room.limit.tokens(n) // self.block for n in num_real], num_rows)

    def _block_bytes(self) -> int:
        return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in self.fields.values())


def _by_row(of_sequence: list[int], num_rows: int) -> torch.Tensor:
    """`[R] long`, from a number for each sequence."""
    return torch.tensor(of_sequence).repeat_interleave(num_rows // len(of_sequence))


def _left_aligned(marked: torch.Tensor) -> torch.Tensor:
    """`[R, c] long`: the marked columns of each row, in order, -1 after its last."""
    counts = marked.sum(1)
    columns = (~marked).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    return columns.masked_fill(torch.arange(columns.shape[1]) >= counts[:, None], -1)


def _gather(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The ids `[R, c]` in those columns of a table, -1 where a column is."""
    columns = columns.to(table.device)
    return table.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, -1)
