"""Where cached tokens live: a `Run` of dense ones, and `Blocks` of encoded ones.

Both hold tokens by row, a row being one KV head of one sequence (row = sequence * num_kv_heads + head). Rows may differ in
length: padding is never stored, and every head may keep other tokens. Both answer `attend(query)` and `mass(query, lse)`; their
`tiles` are what attention reads.
"""

from collections.abc import Iterator

import torch

from kvfold.attention import dispatch
from kvfold.attention.dispatch import Located
from kvfold.attention.reference import Partial, Query, Tile
from kvfold.blocks import BlockPool
from kvfold.kernels import cpu
from kvfold.store.base import KVCodec
from kvfold.store.dense import DenseCodec

TILE_TOKENS = 1024
"""Tokens a tile: enough for efficient products, few enough for its temporaries to stay in a core's cache."""


class Segment:
    """What both kinds share: attention over their tiles."""

    codec: KVCodec

    @property
    def width(self) -> int:
        """Places a row, with or without a token."""
        raise NotImplementedError

    def tiles(self) -> Iterator[Tile]:
        raise NotImplementedError

    def locate(self, head_dim: int) -> Located | None:
        """Where the tokens lie, for the compiled kernels; None when these can't read them."""
        raise NotImplementedError

    def attend(self, query: Query) -> Partial:
        return dispatch.attend([(self, query)])

    def mass(self, query: Query, lse: torch.Tensor) -> torch.Tensor:
        """`[R, G, N]`: attention received by each token, in the order of the tiles."""
        return dispatch.mass(self, query, lse)


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
        self._descriptor: cpu.Descriptor | None = None

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
        if not cpu.supports_dense(self.k.dtype):
            return None
        if self._descriptor is None:  # what a run holds never changes
            self._descriptor = cpu.describe_run(self.k, self.v, self.slots)
        return Located(self._descriptor)

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
        """The first `at [R] long` tokens of every row, and the rest."""
        first = torch.arange(self.width, device=at.device) < at[:, None]
        return self.where(first), self.where(~first)

    def rows(self, rows: torch.Tensor) -> "Run":
        """The run of other rows (beams, a smaller batch)."""
        score = None if self.score is None else self.score[rows]
        return Run(self.k[rows], self.v[rows], self.slots[rows], score, whole=self.whole)

    def owned(self) -> "Run":
        """The same run in memory of its own, not as a view of something larger that would be kept alive."""

        def own(x: torch.Tensor) -> torch.Tensor:
            return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)

        score = None if self.score is None else own(self.score)
        return Run(own(self.k), own(self.v), own(self.slots), score, whole=self.whole)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k.float(), self.v.float(), self.slots.long()

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


class Blocks(Segment):
    """Encoded tokens in blocks of a pool; each row owns a list of blocks.

    Two ways to know the slots: rows that lose no token are contiguous, and a start and a length say it all; rows that
    a keep policy thins out hold a slot for every place, -1 where a token has gone, and new tokens fill such holes
    first.

    A codec whose unit is the token moves tokens between blocks without loss. One whose unit is the block (K per
    channel) encodes whole blocks; when enough holes have come together, the emptiest blocks are decoded, merged and
    encoded again.
    """

    def __init__(self, codec: KVCodec, num_rows: int, device: torch.device, *, contiguous: bool, scored: bool):
        self.codec = codec
        self.pool = BlockPool(num_rows, codec.block, device, slots=not contiguous, scored=scored)
        self.starts: list[int] | None = [0] * num_rows if contiguous else None
        self.lengths = [0] * num_rows if contiguous else []
        self._readable = cpu.supports(codec)
        self._described: tuple[tuple[int, ...], cpu.Descriptor] | None = None

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def contiguous(self) -> bool:
        return self.starts is not None

    @property
    def width(self) -> int:
        """Places a row, tokens or not: columns of the table times the block."""
        return self.pool.table.shape[1] * self.pool.block

    def slots(self) -> torch.Tensor:
        """`[R, width] long`: the slot of every place, -1 where there is no token."""
        pool = self.pool
        if self.starts is None:
            slots = pool.slots[pool.table.clamp_min(0)].long().masked_fill(pool.table[..., None] < 0, -1)
            return slots.flatten(1)
        place = torch.arange(self.width, device=pool.device)
        starts = torch.tensor(self.starts, device=pool.device)[:, None]
        lengths = torch.tensor(self.lengths, device=pool.device)[:, None]
        return torch.where(place < lengths, starts + place, -1)

    def score(self) -> torch.Tensor:
        """`[R, width] float32`: the keep policy's number for every place."""
        return self.pool.score[self.pool.table.clamp_min(0)].flatten(1)

    def set_score(self, score: torch.Tensor) -> None:
        present = self.pool.table >= 0
        self.pool.own()
        self.pool.score[self.pool.table[present]] = score.view(*present.shape, -1)[present]

    def counts(self) -> torch.Tensor:
        """`[R] long`: tokens of each row."""
        if self.contiguous:
            return torch.tensor(self.lengths, device=self.pool.device)
        return (self.slots() >= 0).sum(1)

    def tiles(self) -> Iterator[Tile]:
        pool = self.pool
        slots = self.slots()
        columns = max(1, TILE_TOKENS // pool.block)
        for start in range(0, pool.table.shape[1], columns):
            fields = pool.gather(pool.table[:, start : start + columns].clamp_min(0))
            end = (start + columns) * pool.block
            whole = self.contiguous and min(self.lengths) >= min(end, self.width)
            yield Tile(fields, slots[:, start * pool.block : end], whole=whole)

    def locate(self, head_dim: int) -> Located | None:
        pool = self.pool
        if not self._readable or not pool.fields:
            return None
        mark = pool.mark()
        if self._described is None or self._described[0] != mark:
            slots = pool.slots if pool.has_slots else None
            self._described = mark, cpu.describe_blocks(self.codec, pool.fields, pool.table, slots, head_dim)
        if self.starts is None:
            return Located(self._described[1])
        return Located(self._described[1], self.starts, self.lengths)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens decoded, `[R, width, D] float32` twice, and their slots: for tests, never for attention."""
        k, v = self.codec.decode({name: x[self.pool.table.clamp_min(0)] for name, x in self.pool.fields.items()})
        return k.flatten(1, 2), v.flatten(1, 2), self.slots()

    # -- what changes ----------------------------------------------------------------------------------------------------

    def append(self, run: Run) -> None:
        """Stores a run. For a codec whose unit is the block, every row brings whole blocks (or none)."""
        if run.width == 0:
            return
        if self.contiguous and not self._continues(run):
            self._keep_slots()
        if self.codec.unit == "token":
            self._write_tokens(run)
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
        if self.codec.unit == "block":
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
        k, v = self.codec.decode({name: x[ids] for name, x in pool.fields.items()})
        offset = torch.arange(pool.block, device=pool.device)
        slots = torch.tensor(self.starts, device=pool.device)[:, None] + start + offset
        present = offset < count
        return Run(k, v, slots.masked_fill(~present, -1).int()).where(present)

    def _keep_slots(self) -> None:
        """From a start and a length to a slot for every place."""
        slots = self.slots().view(*self.pool.table.shape, self.pool.block)
        self.pool.keep_slots(slots)
        self.starts, self.lengths = None, []

    def _write_tokens(self, run: Run) -> None:
        pool = self.pool
        counts = run.counts()
        place = self._next_places(counts, run.width) if self.contiguous else self._free_places(counts, run.width)
        encoded = self.codec.encode(run.k, run.v)
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
        if pool.has_slots:
            pool.slots.view(-1)[addresses] = slots
        if pool.scored and score is not None:
            pool.score.view(-1)[addresses] = score

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
                pool.append_blocks(whole, self._encode_blocks(run.k, run.v))
            else:
                for r, count in enumerate(counts):
                    if count:
                        row = run.rows(torch.tensor([r], device=pool.device))
                        encoded = self._encode_blocks(row.k[:, :count], row.v[:, :count])
                        pool.append_row_blocks(r, encoded)
            self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
            return
        for r, count in enumerate(counts):
            if count:
                row = run.rows(torch.tensor([r], device=pool.device))
                self._merge(r, row.where(row.slots >= 0))

    def _encode_blocks(self, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[R, n, D]` to fields `[R, ceil(n / T), ...]`; a last block that is not full repeats its last token."""
        block = self.pool.block
        rows, num_tokens, head_dim = k.shape
        if short := -num_tokens % block:
            k = torch.cat([k, k[:, -1:].expand(-1, short, -1)], 1)
            v = torch.cat([v, v[:, -1:].expand(-1, short, -1)], 1)
        return self.codec.encode(k.reshape(rows, -1, block, head_dim), v.reshape(rows, -1, block, head_dim))

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
        if self.codec.unit == "token":
            assert fresh is None
            moved = {name: x.flatten(0, 1)[places] for name, x in pool.fields.items()}
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
            encoded = self._encode_blocks(k[None, order], v[None, order])
            pool.replace_row_blocks(row, freed, 0)
            pool.append_row_blocks(row, encoded)
            target = pool.tail_places(row, len(slots))
        pool.slots.view(-1)[target] = slots.int()
        if score is not None:
            pool.score.view(-1)[target] = score

    def _decode_places(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Single tokens, dense: `[n, D]` twice."""
        ids, inverse = (places // self.pool.block).unique(return_inverse=True)
        k, v = self.codec.decode({name: x[ids] for name, x in self.pool.fields.items()})
        offset = places % self.pool.block
        return k[inverse, offset], v[inverse, offset]
