"""A pool of equal blocks and the table that says which of them belong to which row.

A block holds T tokens of one row. Memory is one tensor a field, with a block an index of its first axis; it grows by
a sixty-fourth at a time, so that appending costs O(1) a token and at most 1.6 % lies idle, and shrinks when blocks
become free. Rows that are copies of each other (beams) share blocks until one of them writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.store.base import Fields

GROWTH = 64
"""The pool grows by one block in this many, when rows only ever get longer."""


@dataclass(frozen=True)
class PoolPart:
    """Some blocks of every row, and where they lie.

    Attributes:
        fields: name to `[F, *]`.
        index: `[R, c] long`, where each block is in the fields; -1 after a row's last.
        ids: `[R, c] long`, which block of the pool it is.
        columns: `[R, c] long`, its column in the table that was asked for; None if all of them, in order.
    """

    fields: Fields
    index: torch.Tensor
    ids: torch.Tensor
    columns: torch.Tensor | None


class BlockPool:
    """Blocks, and who owns them.

    Attributes:
        table: `[R, C] long`, the block ids of each row, left-aligned, -1 after its last.
        fields: name to `[P, T, *]` (a token) or `[P, *]` (a block), P the capacity.
        summary: name to `[P, *]`, what a read stage knows of a block without reading it (kvfold.read).
        slots: `[P, T] int32`, -1 for places without a token; only if `has_slots`.
        score: `[P, T] float32`; only if `scored`.

    Fields are reached by `read`, `write` and `located` alone, so that a pool may hold them in several places (kvfold.tier).
    """

    def __init__(self, num_rows: int, block: int, device: torch.device, *, slots: bool, scored: bool):
        self.block, self.device, self.scored = block, device, scored
        self.table = torch.empty(num_rows, 0, dtype=torch.long, device=device)
        self.fields: Fields = {}
        self.summary: Fields = {}
        self.slots = torch.empty(0, block if slots else 0, dtype=torch.int32, device=device)
        self.score = torch.empty(0, block if scored else 0, dtype=torch.float32, device=device)
        self.has_slots = slots
        self.shared = False
        self._capacity = 0
        self._free: list[int] = []
        self._counts: list[int] | None = None  # blocks of each row, until the table changes

    in_one_place = True
    """Whether `fields` holds every block, by its id."""

    @property
    def disk_bytes(self) -> int:
        """Bytes in files."""
        return 0

    # -- reading ---------------------------------------------------------------------------------------------------------

    def places(self, place: torch.Tensor) -> torch.Tensor:
        """From places within rows, `[R, n] long`, to addresses in the pool (block id * T + offset)."""
        ids = self.table.gather(1, place // self.block)
        return ids * self.block + place % self.block

    def read(self, ids: torch.Tensor) -> Fields:
        """The fields of the blocks `ids [...]`: `[..., *]`."""
        flat = ids.flatten()
        return {name: x.index_select(0, flat).view(*ids.shape, *x.shape[1:]) for name, x in self.fields.items()}

    def read_tokens(self, addresses: torch.Tensor) -> Fields:
        """The fields of single tokens, for a codec whose unit is the token: `[n, *]`."""
        return {name: x.flatten(0, 1)[addresses] for name, x in self.fields.items()}

    def located(self, table: torch.Tensor) -> Iterator[PoolPart]:
        """Where the blocks `table [R, C]` lie (-1: none), part by part; a part is valid until the next is asked for."""
        yield PoolPart(self.fields, table, table, None)

    def slots_in(self, part: PoolPart) -> torch.Tensor:
        """`[F, T] int32`: slots in the order of a part's fields."""
        if part.index is part.ids:
            return self.slots
        slots = self.slots.new_full((next(iter(part.fields.values())).shape[0], self.block), -1)
        present = part.index >= 0
        slots[part.index[present]] = self.slots[part.ids[present]]
        return slots

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {**self.fields, **self.summary}
        named["table"] = self.table
        if self.has_slots:
            named["slots"] = self.slots
        if self.scored:
            named["score"] = self.score
        return named

    def mark(self) -> tuple[int, ...]:
        """Changes whenever a tensor is replaced by another: what knows their addresses must then look again."""
        tensors = [*self.fields.values(), self.slots, self.table]
        return (*(x.data_ptr() for x in tensors), self._capacity, self.table.shape[1], len(self.table))

    def num_blocks(self) -> list[int]:
        """Blocks of each row."""
        if self._counts is None:
            self._counts = (self.table >= 0).sum(1).tolist()
        return list(self._counts)

    @property
    def full(self) -> bool:
        """Whether every place of the table names a block."""
        return all(n == self.table.shape[1] for n in self.num_blocks())

    # -- writing ---------------------------------------------------------------------------------------------------------

    def write_tokens(self, addresses: torch.Tensor, encoded: Fields) -> None:
        """Fields with one entry a token, `[n, *]`, to `n` addresses."""
        self._ensure({name: x.unsqueeze(0) for name, x in encoded.items()}, per_token=True)
        for name, x in encoded.items():
            self.fields[name].view(-1, *x.shape[1:]).index_copy_(0, addresses, x)

    def write(self, ids: torch.Tensor, encoded: Fields) -> None:
        """Whole blocks `[n, *]` to `ids [n]`; those fields that are a summary go to the others."""
        self._ensure(encoded, per_token=False)
        for name, x in encoded.items():
            (self.summary if is_summary(name) else self.fields)[name][ids] = x

    def append_blocks(self, num_before: list[int], encoded: Fields) -> None:
        """The same number of whole blocks for every row, `[R, n, ...]`; row r has `num_before[r]` blocks so far."""
        num_new = next(iter(encoded.values())).shape[1]
        self.extend([n + num_new for n in num_before])
        columns = torch.tensor(num_before, device=self.device)[:, None] + torch.arange(num_new, device=self.device)
        ids = self.table.gather(1, columns)
        self.write(ids.flatten(), {name: x.flatten(0, 1) for name, x in encoded.items()})

    def append_row_blocks(self, row: int, encoded: Fields) -> None:
        """Blocks for one row, `[1, n, ...]`."""
        num_new = next(iter(encoded.values())).shape[1]
        before = self.num_blocks()
        has = before[row]
        before[row] += num_new
        self.extend(before)
        self.write(self.table[row, has : has + num_new], {name: x[0] for name, x in encoded.items()})

    def extend(self, num_blocks: list[int]) -> None:
        """Gives every row as many blocks as `num_blocks` says; rows that have them already keep them."""
        has = self.num_blocks()
        width = max(self.table.shape[1], *num_blocks)
        if width > self.table.shape[1]:
            wider = self.table.new_full((self.table.shape[0], width), -1)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        # Column by column, so that rows of equal length lie in the pool as they are read.
        wanted = [(c, r) for r, n in enumerate(num_blocks) for c in range(has[r], n)]
        if not wanted:
            return
        wanted.sort()
        columns, rows = torch.tensor(wanted, device=self.device).T
        self.table[rows, columns] = torch.tensor(self._allocate(len(wanted)), device=self.device)
        self._counts = None

    def reserve(self, num: int, step: int) -> None:
        """Memory for `num` more blocks; where it has to grow for that, by `step` at least."""
        if len(self._free) < num:
            self._grow(self._capacity + max(num, step))

    def cut(self, num_blocks: list[int]) -> None:
        """Takes away the blocks of each row beyond `num_blocks`."""
        keep = torch.tensor(num_blocks, device=self.device)[:, None]
        columns = torch.arange(self.table.shape[1], device=self.device)
        self.table = self.table.masked_fill(columns >= keep, -1)[:, : max(num_blocks)].contiguous()
        self._counts = None
        self._collect()
        self.shrink()

    def replace_row_blocks(self, row: int, freed: list[int], num_new: int) -> None:
        """Takes the blocks `freed` from a row, closes the gap and adds `num_new` empty ones at its end."""
        kept = [i for i in self.table[row].tolist() if i >= 0 and i not in freed]
        self._free.extend(freed)
        if self.has_slots and freed:
            self.slots[torch.tensor(freed, device=self.device)] = -1
        self.table[row] = -1
        self.table[row, : len(kept)] = torch.tensor(kept, dtype=torch.long, device=self.device)
        self._counts = None
        if num_new:
            has = self.num_blocks()
            has[row] += num_new
            self.extend(has)

    def tail_places(self, row: int, num_tokens: int) -> torch.Tensor:
        """Addresses in the last blocks of a row, `num_tokens` of them from the start of the first such block."""
        num = -(-num_tokens // self.block)
        has = self.num_blocks()[row]
        ids = self.table[row, has - num : has]
        return (ids[:, None] * self.block + torch.arange(self.block, device=self.device)).flatten()[:num_tokens]

    def spill(self, num_real: list[int], *dense: Any) -> None:
        """Moves blocks to where a plan wants them, after a chunk; this pool has one place only (see kvfold.tier.pool)."""

    # -- sharing ---------------------------------------------------------------------------------------------------------

    def select_rows(self, rows: torch.Tensor) -> None:
        fewer = len(rows) < self.table.shape[0]
        self.table = self.table[rows.to(self.device)]
        self._counts = None
        used = self.table[self.table >= 0]
        self.shared = len(used.unique()) < len(used)
        self._collect()
        if fewer:  # beams that are only reordered will need the free blocks at the next token
            self.shrink()

    def own(self, first_column: int = 0) -> None:
        """Copies shared blocks from `first_column` on, so that every row can write to its own."""
        if not self.shared:
            return
        seen: set[int] = set(self.table[:, :first_column].flatten().tolist())
        copies: list[tuple[int, int, int]] = []
        for r, ids in enumerate(self.table[:, first_column:].tolist()):
            for c, i in enumerate(ids, start=first_column):
                if i < 0:
                    continue
                if i in seen:
                    copies.append((r, c, i))
                seen.add(i)
        if copies:
            rows, columns, old = torch.tensor(copies, device=self.device).T
            new = torch.tensor(self._allocate(len(copies)), device=self.device)
            self._copy(old, new)
            self.table[rows, columns] = new
        self.shared = first_column > 0

    def keep_slots(self, slots: torch.Tensor) -> None:
        """From now on a slot is kept for every place; `slots [R, C, T]` are today's."""
        self.own()
        self.has_slots = True
        self.slots = torch.full((self._capacity, self.block), -1, dtype=torch.int32, device=self.device)
        present = self.table >= 0
        self.slots[self.table[present]] = slots[present].int()

    def take_scores(self) -> None:
        """Gives the memory of `score` back, for as long as someone else holds what was in it."""
        self.score = self.score[:0].clone()

    def give_scores(self) -> None:
        """The memory again, with zeros."""
        self.score = self.score.new_zeros(self._capacity, self.block)

    # -- memory ----------------------------------------------------------------------------------------------------------

    def shrink(self, idle: int | None = None) -> None:
        """Moves the used blocks together and gives the rest back, when more than `idle` of them are free (or an eighth)."""
        if len(self._free) <= (self._capacity // 8 if idle is None else idle):
            return
        used, self.table = self._renumbered()
        width = int((self.table >= 0).sum(1).max()) if self.table.numel() else 0
        self.table = self.table[:, :width].contiguous()
        self._select(used)
        self._capacity, self._free = len(used), []

    def _renumbered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids of the used blocks, in order, and the table with their place among them instead."""
        used = self.table[self.table >= 0].unique()
        place = torch.full((self._capacity,), -1, dtype=torch.long, device=self.device)
        place[used] = torch.arange(len(used), device=self.device)
        return used, place[self.table.clamp_min(0)].masked_fill(self.table < 0, -1) if len(used) else self.table

    def _collect(self) -> None:
        """Finds the blocks that no row owns."""
        used = set(self.table.flatten().tolist())
        self._free = [i for i in range(self._capacity) if i not in used]
        if self.has_slots and self._free:
            self.slots[torch.tensor(self._free, device=self.device)] = -1

    def state(self) -> dict[str, torch.Tensor]:
        """What `tensors` names, without the idle blocks: what a saved cache holds."""
        used, table = self._renumbered()
        state = {**self.read(used), **{name: x[used] for name, x in self.summary.items()}, "table": table}
        if self.has_slots:
            state["slots"] = self.slots[used]
        if self.scored:
            state["score"] = self.score[used]
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over what `state` gave; the pool must be new."""
        self.table = state["table"]
        self._counts = None
        used = self.table[self.table >= 0]
        self._capacity = int(used.max()) + 1 if len(used) else 0
        self.shared = self._capacity < len(used)
        held = {name: x for name, x in state.items() if name not in ("table", "slots", "score")}
        self.summary = {name: x for name, x in held.items() if is_summary(name)}
        self.fields = {name: x for name, x in held.items() if not is_summary(name)}
        self.has_slots = "slots" in state
        self.slots = state.get("slots", self.slots.new_empty(self._capacity, 0))
        self.score = state.get("score", self.score.new_empty(self._capacity, 0))

    def _allocate(self, num: int) -> list[int]:
        if (short := num - len(self._free)) > 0:
            slack = 0 if self.has_slots else self._capacity // GROWTH
            self._grow(self._capacity + max(short, slack))
        taken, self._free = self._free[:num], self._free[num:]
        return taken

    def _grow(self, capacity: int) -> None:
        before = self._capacity
        self._resize_fields(capacity)
        self.summary = {name: resized(x, capacity) for name, x in self.summary.items()}
        self.slots, self.score = resized(self.slots, capacity), resized(self.score, capacity)
        self.slots[before:] = -1
        self.score[before:] = 0
        self._capacity = capacity
        self._free.extend(range(before, capacity))

    # -- where fields lie ------------------------------------------------------------------------------------------------

    def _resize_fields(self, capacity: int) -> None:
        self.fields = {name: resized(x, capacity) for name, x in self.fields.items()}

    def _ensure(self, encoded: Fields, per_token: bool) -> None:
        """Makes the tensors at the first write, when the codec has shown what it needs."""
        for name, x in encoded.items():
            held = self.summary if is_summary(name) else self.fields
            if name not in held:
                shape = (self.block, *x.shape[2:]) if per_token else x.shape[1:]
                held[name] = torch.zeros(self._num_held(name), *shape, dtype=x.dtype, device=self.device)

    def _num_held(self, name: str) -> int:
        """Blocks that the tensor of a field has room for."""
        return self._capacity

    def _select(self, used: torch.Tensor) -> None:
        """Only the blocks `used`, in that order, are left."""
        self.fields = {name: x[used] for name, x in self.fields.items()}
        self._select_known(used)

    def _select_known(self, used: torch.Tensor) -> None:
        """The part of `_select` for what is known of blocks without reading them."""
        self.summary = {name: x[used] for name, x in self.summary.items()}
        self.slots, self.score = self.slots[used], self.score[used]

    def _copy(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """What the blocks `old [n]` hold, to the blocks `new [n]` as well."""
        self.write(new, self.read(old))
        for x in (*self.summary.values(), self.slots, self.score):
            x[new] = x[old]


def is_summary(name: str) -> bool:
    """Whether a field is a read stage's, by its name."""
    return name.startswith("page.")


def resized(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """The first `capacity` entries of x, zeros after its own."""
    larger = x.new_zeros(capacity, *x.shape[1:])
    larger[: x.shape[0]] = x
    return larger
