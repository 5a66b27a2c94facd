"""Encoded tokens of one layer, in blocks of a pool: writing them, thinning them out, and keeping them close together."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from kvfold import kernels
from kvfold.attention import dispatch
from kvfold.attention.dispatch import Located
from kvfold.attention.reference import Query, Tile
from kvfold.block_view import BlockView
from kvfold.pool import BlockPool, PoolPart
from kvfold.segment import Run, Segment
from kvfold.store.base import Fields, KVCodec

Summarize = Callable[[torch.Tensor, torch.Tensor | None], Fields]
"""Keys `[..., T, D]` of whole blocks, and the scores `[..., T]` of their tokens if they have any, to fields `page.*`."""


class Blocks(Segment):
    """Encoded tokens in blocks of a pool; each row owns a list of blocks.

    Two ways to know the slots: rows that lose no token are contiguous, and a start and a length say it all; rows that
    a keep policy thins out hold a slot for every place, -1 where a token has gone, and new tokens fill such holes
    first.

    A codec whose unit is the token moves tokens between blocks without loss. One whose unit is the block (K per
    channel) encodes whole blocks; when enough holes have come together, the emptiest blocks are decoded, merged and
    encoded again.

    With `summarize` every block is written as a whole, together with what a read stage wants to know of it.
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
        self.lengths = [0] * num_rows if contiguous else []
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
        """`[R, width] long`: the slot of every place, -1 where there is no token."""
        return self._view(PoolPart({}, self.pool.table, self.pool.table, None), None, self.codec).slots()

    def score(self) -> torch.Tensor:
        """`[R, width] float32`: the keep policy's number for every place."""
        return self.pool.score[self.pool.table.clamp_min(0)].flatten(1)

    def set_score(self, score: torch.Tensor) -> None:
        present = self.pool.table >= 0
        self.pool.own()
        self.pool.score[self.pool.table[present]] = score.view(*present.shape, -1)[present]

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of one block: its fields, its slots and scores, and its place in the table."""
        probe = torch.zeros(1, 1, self.codec.block, head_dim, device=self.pool.device)
        fields = sum(x.nbytes for x in self.codec.encode(probe, probe).values())
        return fields + self.codec.block * (4 + 4 * self.pool.scored) + self.pool.table.itemsize

    def counts(self) -> torch.Tensor:
        """`[R] long`: tokens of each row."""
        if self.contiguous:
            return torch.tensor(self.lengths, device=self.pool.device)
        return (self.slots() >= 0).sum(1)

    def tiles(self) -> Iterator[Tile]:
        for view in self.parts():
            yield from view.tiles()

    def locate(self, head_dim: int) -> Located | None:
        pool = self.pool
        family = kernels.serving(pool.device.type)
        if family is None or not pool.in_one_place or not pool.fields or not family.supports(self.codec):
            return None
        mark = family, pool.mark()
        if self._described is None or self._described[0] != mark:
            slots = pool.slots if pool.has_slots else None
            self._described = mark, family.describe_blocks(self.codec, pool.fields, pool.table, slots, head_dim)
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
        return k.flatten(1, 2), v.flatten(1, 2), self.slots()

    # -- what changes ----------------------------------------------------------------------------------------------------

    def append(self, run: Run, positions: torch.Tensor | None = None) -> None:
        """Stores a run. For a codec whose unit is the block, every row brings whole blocks (or none).

        `positions [R, N] int` are RoPE's of the run's tokens, for a codec that needs them.
        """
        if run.width == 0:
            return
        if self.contiguous and not self._continues(run):
            self._keep_slots()
        if self.unit == "token":
            self._write_tokens(run, positions)
        else:
            self._write_blocks(run)

    def drop(self, gone: torch.Tensor) -> None:
        """Removes the tokens that `gone [R, width] bool` marks; whole blocks are given back at once."""
        if self.contiguous:
            self._keep_slots()
        self.pool.own()
        places = self.pool.places(torch.arange(self.width, device=gone.device).expand_as(gone))
        self.pool.slots.view(-1)[places[gone & (self.slots() >= 0)]] = -1

    def tidy(self) -> None:
        """Gives back every block that the tokens of a row can do without."""
        if self.contiguous or self.width == 0:
            return
        live = (self.slots().view(*self.pool.table.shape, -1) >= 0).sum(-1)
        needed = (live.sum(1) + self.pool.block - 1) // self.pool.block
        for row in torch.nonzero((self.pool.table >= 0).sum(1) > needed).flatten().tolist():
            self._merge(row, None)
        self.pool.shrink()

    def crop(self, end: int) -> Run | None:
        """Removes all tokens in slots >= `end`. What is left of a cut block of shared scales comes back, dense."""
        if not self.contiguous:
            self.drop(self.slots() >= end)
            self.tidy()
            return None
        assert self.starts is not None
        kept = [max(0, min(n, end - start)) for start, n in zip(self.starts, self.lengths, strict=True)]
        rest = None
        if self.unit == "block":
            whole = [n // self.pool.block * self.pool.block for n in kept]
            if whole != kept:
                rest = self._cut_blocks(whole, kept)
            kept = whole
        self.lengths = kept
        self.pool.cut([-(-n // self.pool.block) for n in kept])
        return rest

    def select_rows(self, rows: torch.Tensor) -> None:
        """Other rows, in another order, repeated or left out: blocks are shared until one of their rows writes."""
        self.pool.select_rows(rows)
        if self.starts is not None:
            self.starts = [self.starts[r] for r in rows.tolist()]
            self.lengths = [self.lengths[r] for r in rows.tolist()]

    def restore(self, state: dict[str, torch.Tensor], starts: list[int] | None, lengths: list[int]) -> None:
        """Takes over the `state` of another one's pool, its starts and lengths; this one must be new."""
        self.pool.restore(state)
        self.starts, self.lengths = starts, lengths

    # -- how ---------------------------------------------------------------------------------------------------------------

    def _continues(self, run: Run) -> bool:
        """Whether the run goes on where each row ends; an empty row starts anywhere."""
        assert self.starts is not None
        counts, firsts = run.counts().tolist(), run.slots[:, 0].tolist()
        lasts = run.slots.amax(1).tolist()
        for r, count in enumerate(counts):
            if count == 0:
                continue
            if self.lengths[r] == 0:
                self.starts[r] = firsts[r]
            if firsts[r] != self.starts[r] + self.lengths[r] or lasts[r] - firsts[r] != count - 1:
                return False
        return True

    def _cut_blocks(self, whole: list[int], kept: list[int]) -> Run:
        """The tokens from place `whole[r]` to `kept[r]` of each row, decoded: less than a block."""
        pool = self.pool
        start = torch.tensor(whole, device=pool.device)[:, None]
        count = torch.tensor(kept, device=pool.device)[:, None] - start
        ids = pool.table.gather(1, (start // pool.block).clamp_max(pool.table.shape[1] - 1))[:, 0].clamp_min(0)
        k, v = self.codec.decode(pool.read(ids))
        offset = torch.arange(pool.block, device=pool.device)
        slots = torch.tensor(self.starts, device=pool.device)[:, None] + start + offset
        present = offset < count
        return Run(k, v, slots.masked_fill(~present, -1).int()).where(present)

    def _keep_slots(self) -> None:
        """From a start and a length to a slot for every place."""
        slots = self.slots().view(*self.pool.table.shape, self.pool.block)
        self.pool.keep_slots(slots)
        self.starts, self.lengths = None, []

    def _write_tokens(self, run: Run, positions: torch.Tensor | None) -> None:
        pool = self.pool
        counts = run.counts()
        place = self._next_places(counts, run.width) if self.contiguous else self._free_places(counts, run.width)
        encoded = dispatch.encode(self.codec, run.k, run.v, positions)
        slots, score = run.slots, run.score
        if bool((counts == run.width).all()):
            addresses = pool.places(place).flatten()
            written = {name: x.flatten(0, 1) for name, x in encoded.items()}
            slots, score = slots.flatten(), None if score is None else score.flatten()
        else:
            valid = torch.arange(run.width, device=pool.device) < counts[:, None]
            addresses = pool.places(torch.where(valid, place, 0))[valid]
            written = {name: x[valid] for name, x in encoded.items()}
            slots, score = slots[valid], None if score is None else score[valid]
        pool.write_tokens(addresses, written)
        self._note(addresses, slots, score)

    def _note(self, addresses: torch.Tensor, slots: torch.Tensor, score: torch.Tensor | None) -> None:
        """Writes the slots and scores of new tokens, where they are kept."""
        if self.pool.has_slots:
            self.pool.slots.view(-1)[addresses] = slots.int()
        if self.pool.scored and score is not None:
            self.pool.score.view(-1)[addresses] = score

    def _next_places(self, counts: torch.Tensor, width: int) -> torch.Tensor:
        """`[R, width]`: the places after the last token of each row, for `counts [R]` new ones."""
        pool = self.pool
        before, self.lengths = self.lengths, [n + c for n, c in zip(self.lengths, counts.tolist(), strict=True)]
        num_blocks = [-(-n // pool.block) for n in self.lengths]
        if num_blocks != [-(-n // pool.block) for n in before]:
            pool.extend(num_blocks)
        pool.own(first_column=min(before) // pool.block)
        rank = torch.arange(width, device=pool.device)
        return torch.tensor(before, device=pool.device)[:, None] + rank

    def _free_places(self, counts: torch.Tensor, width: int) -> torch.Tensor:
        """`[R, width]`: the first holes of each row; new blocks where `counts [R]` new tokens don't find enough."""
        pool = self.pool
        pool.own()
        missing = (counts - self._free().sum(1)).clamp_min(0)
        if bool(missing.any()):
            has = (pool.table >= 0).sum(1)
            pool.extend((has + (missing + pool.block - 1) // pool.block).tolist())
        free = self._free()
        # The first ones are the highest of (all - place) among the free ones. A row may have fewer than the widest needs.
        num_places = free.shape[1]
        ranked = torch.where(free, num_places - torch.arange(num_places, device=pool.device), 0)
        place = num_places - ranked.topk(min(width, num_places), dim=1).values
        return torch.nn.functional.pad(place, (0, width - place.shape[1]))

    def _free(self) -> torch.Tensor:
        """`[R, width] bool`: places of a row's blocks that hold no token."""
        return (self.slots() < 0) & (self.pool.table.repeat_interleave(self.pool.block, 1) >= 0)

    def _write_blocks(self, run: Run) -> None:
        pool = self.pool
        counts = run.counts().tolist()
        uniform = len(set(counts)) == 1
        if self.contiguous:
            whole = [n // pool.block for n in self.lengths]
            if uniform:
                pool.append_blocks(whole, self._encode_blocks(run.k, run.v, run.score))
            else:
                for r, count in enumerate(counts):
                    if count:
                        row = run.rows(torch.tensor([r], device=pool.device))
                        score = None if row.score is None else row.score[:, :count]
                        encoded = self._encode_blocks(row.k[:, :count], row.v[:, :count], score)
                        pool.append_row_blocks(r, encoded)
            self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
            return
        if uniform and counts[0] % pool.block == 0 and not bool(self._free().any()):
            before = torch.tensor(pool.num_blocks(), device=pool.device)[:, None] * pool.block
            pool.append_blocks(pool.num_blocks(), self._encode_blocks(run.k, run.v, run.score))
            addresses = pool.places(before + torch.arange(run.width, device=pool.device)).flatten()
            self._note(addresses, run.slots.flatten(), None if run.score is None else run.score.flatten())
            return
        for r, count in enumerate(counts):
            if count:
                row = run.rows(torch.tensor([r], device=pool.device))
                self._merge(r, row.where(row.slots >= 0))

    def _encode_blocks(self, k: torch.Tensor, v: torch.Tensor, score: torch.Tensor | None = None) -> Fields:
        """`[R, n, D]` to fields `[R, ceil(n / T), ...]`; a last block that is not full repeats its last token."""
        block = self.pool.block
        rows, num_tokens, head_dim = k.shape
        if short := -num_tokens % block:
            k = torch.cat([k, k[:, -1:].expand(-1, short, -1)], 1)
            v = torch.cat([v, v[:, -1:].expand(-1, short, -1)], 1)
            score = None if score is None else torch.cat([score, score[:, -1:].expand(-1, short)], 1)
        k = k.reshape(rows, -1, block, head_dim)
        fields = dispatch.encode(self.codec, k, v.reshape(rows, -1, block, head_dim))
        if self.summarize:
            fields |= self.summarize(k, None if score is None else score.reshape(rows, -1, block))
        return fields

    def _merge(self, row: int, fresh: Run | None) -> None:
        """Brings a row's tokens and `fresh` ones into as few blocks as can be, by rewriting only the emptiest blocks."""
        pool = self.pool
        pool.own()
        ids = [i for i in pool.table[row].tolist() if i >= 0]
        index = torch.tensor(ids, dtype=torch.long, device=pool.device)
        live = (pool.slots[index] >= 0).sum(1).tolist() if ids else []
        num_fresh = fresh.width if fresh is not None else 0
        extra = -(-(sum(live) + num_fresh) // pool.block) - len(ids)
        chosen: list[int] = []
        load = num_fresh
        for i in sorted(range(len(ids)), key=live.__getitem__):
            if load <= pool.block * (len(chosen) + extra):
                break
            chosen.append(i)
            load += live[i]
        freed = [ids[i] for i in chosen]
        old = torch.tensor(freed, dtype=torch.long, device=pool.device)
        places = (old[:, None] * pool.block + torch.arange(pool.block, device=pool.device)).flatten()
        places = places[pool.slots.view(-1)[places] >= 0]
        slots = pool.slots.view(-1)[places]
        score = pool.score.view(-1)[places] if pool.scored else None
        if not len(places) and fresh is None:
            pool.replace_row_blocks(row, freed, 0)
            return
        if self.unit == "token":
            assert fresh is None
            moved = pool.read_tokens(places)
            pool.replace_row_blocks(row, freed, -(-len(places) // pool.block))
            target = pool.tail_places(row, len(places))
            pool.write_tokens(target, moved)
        else:
            parts = [self._decode_places(places)] if len(places) else []
            if fresh is not None:
                parts.append((fresh.k[0].float(), fresh.v[0].float()))
                slots = torch.cat([slots, fresh.slots[0]])
                if score is not None and fresh.score is not None:
                    score = torch.cat([score, fresh.score[0]])
            k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            order = slots.argsort()
            slots = slots[order]
            score = None if score is None else score[order]
            of_row = None if score is None else score[None]
            encoded = self._encode_blocks(k[None, order], v[None, order], of_row)
            pool.replace_row_blocks(row, freed, 0)
            pool.append_row_blocks(row, encoded)
            target = pool.tail_places(row, len(slots))
        self._note(target, slots, score)

    def _decode_places(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Single tokens, dense: `[n, D]` twice."""
        ids, inverse = (places // self.pool.block).unique(return_inverse=True)
        k, v = self.codec.decode(self.pool.read(ids))
        offset = places % self.pool.block
        return k[inverse, offset], v[inverse, offset]
