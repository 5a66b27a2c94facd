"""Encoded tokens of one layer, in blocks of a pool: writing them, thinning them out, and keeping them close together."""

import torch

from kvfold.attention import dispatch
from kvfold.block_reader import BlockReader
from kvfold.segment import Run
from kvfold.store.base import Fields


class Blocks(BlockReader):
    """Encoded tokens in blocks of a pool; each row owns a list of blocks.

    Two ways to know the slots: rows that lose no token are contiguous, and a start and a length say it all; rows that
    a keep policy thins out hold a slot for every place, -1 where a token has gone, and new tokens fill such holes
    first.

    A codec whose unit is the token moves tokens between blocks without loss. One whose unit is the block (K per
    channel) encodes whole blocks; when enough holes have come together, the emptiest blocks are decoded, merged and
    encoded again.

    With `summarize` every block is written as a whole, together with what a read stage wants to know of it.
    """

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

    def set_score(self, score: torch.Tensor) -> None:
        self.pool.own()
        self._write_by_row(self.pool.score, score)

    def drop(self, gone: torch.Tensor) -> None:
        """Removes the tokens that `gone [R, width] bool` marks; whole blocks are given back at once."""
        if self.contiguous:
            self._keep_slots()
        self.pool.own()
        slots = self.slots().masked_fill(gone, -1)
        self._write_by_row(self.pool.slots, slots)
        self.lengths = (slots >= 0).sum(1).tolist()

    def replace(
        self, place: torch.Tensor, run: Run, rows: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> None:
        """Overwrites one token of each row (or of `rows [n]`), at `place [n] long`, with the one of `run`.

        For codecs whose unit is the token. `positions [n, 1]` as for `append`.
        """
        pool = self.pool
        if self.contiguous:
            self._keep_slots()
        pool.own()
        table = pool.table if rows is None else pool.table[rows]
        addresses = table.gather(1, (place // pool.block)[:, None])[:, 0] * pool.block + place % pool.block
        encoded = dispatch.encode(self.codec, run.k, run.v, positions)
        pool.write_tokens(addresses, {name: x[:, 0] for name, x in encoded.items()})
        pool.slots.view(-1).index_copy_(0, addresses, run.slots[:, 0])
        if run.score is not None:
            pool.score.view(-1).index_copy_(0, addresses, run.score[:, 0])

    def tidy(self) -> None:
        """Gives back every block that the tokens of a row can do without."""
        if self.contiguous or self.width == 0:
            return
        for row, (num_tokens, num_blocks) in enumerate(zip(self.lengths, self.pool.num_blocks(), strict=True)):
            if num_blocks > -(-num_tokens // self.pool.block):
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
        self.starts = None

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

    def _write_by_row(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """`values [R, width]` to a pool's numbers, `[P, T]`; the pool must own its blocks."""
        ids, by_block = self.pool.table.flatten(), values.reshape(-1, self.pool.block)
        if not self.pool.full:
            ids, by_block = ids[ids >= 0], by_block[ids >= 0]
        x.index_copy_(0, ids, by_block)

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
        self.lengths = [n + c for n, c in zip(self.lengths, counts.tolist(), strict=True)]
        has = pool.num_blocks()
        wanted = [max(h, -(-n // pool.block)) for h, n in zip(has, self.lengths, strict=True)]
        if wanted != has:
            pool.extend(wanted)
        if width == 1:  # the first hole of each row
            return (self.slots() < 0).logical_and_(self._present()).to(torch.uint8).argmax(1, keepdim=True)
        free = self._free()
        # The first ones are the highest of (all - place) among the free ones. A row may have fewer than the widest needs.
        num_places = free.shape[1]
        ranked = torch.where(free, num_places - torch.arange(num_places, device=pool.device), 0)
        place = num_places - ranked.topk(min(width, num_places), dim=1).values
        return torch.nn.functional.pad(place, (0, width - place.shape[1]))

    def _free(self) -> torch.Tensor:
        """`[R, width] bool`: places of a row's blocks that hold no token."""
        return (self.slots() < 0) & self._present()

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
        has_holes = sum(self.lengths) < sum(pool.num_blocks()) * pool.block
        if uniform and counts[0] % pool.block == 0 and not has_holes:
            before = torch.tensor(pool.num_blocks(), device=pool.device)[:, None] * pool.block
            pool.append_blocks(pool.num_blocks(), self._encode_blocks(run.k, run.v, run.score))
            addresses = pool.places(before + torch.arange(run.width, device=pool.device)).flatten()
            self._note(addresses, run.slots.flatten(), None if run.score is None else run.score.flatten())
            self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
            return
        for r, count in enumerate(counts):
            if count:
                row = run.rows(torch.tensor([r], device=pool.device))
                self._merge(r, row.where(row.slots >= 0))
                self.lengths[r] += count

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
