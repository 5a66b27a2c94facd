"""Encoded tokens of one layer, in blocks of a pool: writing them, thinning them out, and keeping them close together."""

import torch

from kvfold.attention import dispatch
from kvfold.block_reader import BlockReader
from kvfold.segment import Run, join
from kvfold.store.base import Fields


class Blocks(BlockReader):
    """Encoded tokens in blocks of a pool; each row owns a list of blocks.

    Two ways to know the slots: rows that lose no token are contiguous, and a start and a length say it all; rows that
    a keep policy thins out hold a slot for every place, -1 where a token has gone, and new tokens fill such holes
    first.

    A codec whose unit is the token moves tokens between blocks without loss. One whose unit is the block (K per
    channel) encodes whole blocks; when enough holes have come together, new tokens fill them, and their blocks are
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
        """Gives back every block that the tokens of a row can do without, and its memory."""
        if self.contiguous or self.width == 0:
            return
        for row, (num_tokens, num_blocks) in enumerate(zip(self.lengths, self.pool.num_blocks(), strict=True)):
            if num_blocks > -(-num_tokens // self.pool.block):
                self._merge(row)
        self.pool.shrink(idle=0)  # a budget of bytes has no place for them

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
            self.pool.slots.view(-1)[addresses] = slots.flatten().int()
        if self.pool.scored and score is not None:
            self.pool.score.view(-1)[addresses] = score.flatten()

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

    def _merge(self, row: int, fresh: Run | None = None) -> None:
        """Brings a row's tokens and `fresh` ones into as few blocks as can be.

        Where there are more blocks than needed, the emptiest are given back and their tokens come along as fresh ones. These
        fill new blocks where more are needed, and then the holes of those that have most.
        """
        pool = self.pool
        pool.own()
        ids = pool.table[row, : pool.num_blocks()[row]]
        live = (pool.slots[ids] >= 0).sum(1)
        num_fresh = fresh.width if fresh is not None else 0
        num_new = -(-(int(live.sum()) + num_fresh) // pool.block) - len(ids)
        released = ids[live.argsort(stable=True)[: max(0, -num_new)]]
        if self.unit == "token":
            self._move_tokens(row, released)
        else:
            self._encode_again(row, released, fresh, max(0, num_new))

    def _move_tokens(self, row: int, released: torch.Tensor) -> None:
        """Moves the tokens of the blocks `released [n]` into holes of others, as they are, and gives the blocks back."""
        pool = self.pool
        moved = self._addresses(released)
        fields, slots = pool.read_tokens(moved), pool.slots.view(-1)[moved]
        score = pool.score.view(-1)[moved] if pool.scored else None
        pool.replace_row_blocks(row, released.tolist(), 0)
        target = self._holes(row, len(moved))
        pool.write_tokens(target, fields)
        self._note(target, slots, score)

    def _encode_again(self, row: int, released: torch.Tensor, fresh: Run | None, num_new: int) -> None:
        """The same for tokens that share numbers, with `fresh` ones; `num_new` new blocks are filled before any holes."""
        pool = self.pool
        moved = self._addresses(released)
        if len(moved):
            k, v = self._decode_places(moved)
            score = pool.score.view(-1)[moved][None] if pool.scored else None
            old = Run(k[None], v[None], pool.slots.view(-1)[moved][None], score)
            fresh = old if fresh is None else join(old, fresh)
        pool.replace_row_blocks(row, released.tolist(), 0)
        if fresh is None:
            return
        in_new, in_holes = fresh.split(torch.tensor([pool.block * num_new], device=pool.device))
        if in_new.width:
            pool.append_row_blocks(row, self._encode_blocks(in_new.k, in_new.v, in_new.score))
            self._note(pool.tail_places(row, in_new.width), in_new.slots, in_new.score)
        if in_holes.width:
            holes = self._holes(row, in_holes.width)
            self._rewrite(holes, in_holes)
            self._note(holes, in_holes.slots, in_holes.score)

    def _addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """Where the tokens of the blocks `ids [n]` are."""
        block, offset = torch.nonzero(self.pool.slots[ids] >= 0, as_tuple=True)
        return ids[block] * self.pool.block + offset

    def _holes(self, row: int, num: int) -> torch.Tensor:
        """`num` addresses without a token, in as few of a row's blocks as can be."""
        pool = self.pool
        ids = pool.table[row, : pool.num_blocks()[row]]
        free = pool.slots[ids] < 0
        order = free.sum(1).argsort(descending=True, stable=True)
        block, offset = torch.nonzero(free[order], as_tuple=True)
        return (ids[order[block]] * pool.block + offset)[:num]

    def _rewrite(self, addresses: torch.Tensor, run: Run) -> None:
        """Encodes blocks anew with the tokens of a run of one row at `addresses [N]`, and all other places as they are.

        A channel whose least and largest numbers are still those of before has the same scale, so that codes of other tokens
        come out as they were. For this, places that have lost their token go on holding it until they find another. What a
        codec holds token by token is not encoded again at all.
        """
        pool = self.pool
        ids, inverse = (addresses // pool.block).unique(return_inverse=True)
        at = inverse * pool.block + addresses % pool.block
        before = pool.read(ids)
        decoded = (x.flatten(0, 1) for x in self.codec.decode(before))
        k, v = (x.index_copy(0, at, new[0].float()) for x, new in zip(decoded, (run.k, run.v), strict=True))
        score = None if run.score is None else pool.score[ids].flatten().index_copy(0, at, run.score[0])[None]
        fields = {name: x[0] for name, x in self._encode_blocks(k[None], v[None], score).items()}
        changed = torch.zeros(len(k), dtype=torch.bool, device=pool.device).index_fill(0, at, True).view(-1, pool.block)
        for side, codec in (("k.", self.codec.k), ("v.", self.codec.v)):
            for name in [name for name in fields if name.startswith(side) and codec.unit == "token"]:
                of_token = changed.view(*changed.shape, *[1] * (fields[name].dim() - 2))
                fields[name] = torch.where(of_token, fields[name], before[name])
        pool.write(ids, fields)
