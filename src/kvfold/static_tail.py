"""The end of a layer's cache on a GPU: a token's step as the same operations on the same memory.

A CUDA graph replays operations without Python. So a step that is to be captured must not know on the host how many tokens
there are: numbers on the device say where the next one goes, and the step adds one to them, as the host does beside it.
Between two events that change more than that (a block is full, a sequence is cropped) all steps are alike; at such an event
the host brings segments and numbers up to date, outside of the graph. Memory stays where it was as far as it can: a graph
holds for as long as `mark` does (kvfold.models.graph).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvfold import kernels
from kvfold.attention import dispatch
from kvfold.blocks import Blocks
from kvfold.kernels import triton
from kvfold.segment import Room, Run
from kvfold.store.dense import DenseCodec
from kvfold.tail import ends_together, until

SPARE = 16
"""A pool that must grow does so by one block in this many, so that graphs hold for longer."""
_SPARE_COLUMNS = 8
_SERIALS = itertools.count()


def next_serial() -> int:
    """A number that no other memory for captured steps has: an address may come back."""
    return next(_SERIALS)


def why_unread(recent: Run, body: Blocks) -> str | None:
    """Why the Triton kernels don't read such segments, or None where they do."""
    if kernels.serving(recent.k.device.type) is not triton:
        return "attention is not Triton's"
    known = triton.supports(body.codec) and triton.supports_dense(recent.k.dtype)
    return None if known and triton.supports_head_dim(recent.k.shape[-1]) else "the Triton kernels don't read its codec"


def room_of(window: int, body: Blocks) -> int:
    """Places for tokens that come: one where a token goes on into the blocks at once, else as many as are dense at the most."""
    return 1 if body.unit == "token" else window + body.pool.block


def suits(k: torch.Tensor, recent: Run, window: int, body: Blocks) -> bool:
    """Whether the room `k [R, N, D]` serves such segments."""
    wanted = len(recent.k), room_of(window, body), recent.k.device, recent.k.dtype
    return (len(k), k.shape[1], k.device, k.dtype) == wanted


class StaticTail:
    """Sinks, blocks and recent tokens of a layer whose rows end together, and the place of the next one.

    Attributes:
        left: tokens that still fit.
        taken: tokens that have come since it was opened.
        in_body: whether they go into blocks, one by one; otherwise behind the recent ones.
    """

    def __init__(self, recent: Run, window: int, body: Blocks):
        rows, _, head_dim = recent.k.shape
        self.in_body = body.unit == "token"
        self.capacity = room_of(window, body)
        k, v = (x.new_zeros(rows, self.capacity, head_dim) for x in (recent.k, recent.v))
        self.room = Room(k, v, recent.slots.new_full((rows, self.capacity), -1), 0)
        # Where the next token of each row goes, how many tokens its blocks hold, and its slot; and the slot of their first.
        self._numbers = torch.zeros(rows * 2 + 1, dtype=torch.long, device=k.device)
        self._place, self._lengths, self._slot = self._numbers.split((rows, rows, 1))
        self._counting = torch.tensor([1] * rows + [int(self.in_body)] * rows + [1], device=k.device)
        self._rows = torch.arange(rows, device=k.device) * self.capacity
        self._starts = torch.zeros(rows, dtype=torch.int32, device=k.device)
        self._table = torch.empty(rows, 0, dtype=torch.long, device=k.device)
        self._looks: list[tuple[triton.Descriptor, tuple[torch.Tensor, torch.Tensor] | None]] = []  # see triton.Look
        self._serial = next_serial()
        self.mark: tuple[Any, ...] = ()
        self.left = self.taken = 0

    @staticmethod
    def why_not(sink: Run, body: Blocks, recent: Run, window: int, num_seen: int) -> str | None:
        """Why tokens can't come to such segments in steps that are all alike, or None where they can."""
        if why := why_unread(recent, body):
            return why
        if not sink.whole or not ends_together(body, recent, recent.num_tokens(), num_seen):
            return "its rows end at different tokens"
        if body.pool.shared:
            return "its sequences share blocks"
        if body.unit == "token" and window:
            return "each token pushes another one out of its dense window"
        if body.unit == "token" and 0 in body.lengths:
            return "nothing is encoded yet"
        return None

    def suits(self, recent: Run, window: int, body: Blocks) -> bool:
        """Whether its memory serves such segments."""
        return suits(self.room.k, recent, window, body)

    def open(self, sink: Run, body: Blocks, recent: Run, num_seen: int) -> Run:
        """Makes ready for the tokens after these, of which `why_not` says nothing; returns `recent`, now in its memory."""
        rows, pool = len(recent.slots), body.pool
        assert body.starts is not None
        places = counts = recent.num_tokens()
        self.taken, self._first_slot = 0, num_seen
        pool.reserve(rows, rows * (pool.table.shape[1] // SPARE))
        if self.in_body:
            places, has = body.lengths, pool.num_blocks()
            wanted = [max(n, length // pool.block + 1) for n, length in zip(has, places, strict=True)]
            if wanted != has:
                pool.extend(wanted)
            self.left = min(n * pool.block - length for n, length in zip(wanted, places, strict=True))
        else:
            recent = self._hold(recent, [num_seen - n for n in counts])
            self.left = self.capacity - recent.width
        self._starts.copy_(torch.tensor(body.starts))
        self._first = torch.tensor([*places, *body.lengths, num_seen], device=self._numbers.device)
        self._follow(pool.table)
        self._describe(sink, body)
        self.count()
        return recent

    def count(self) -> None:
        """Writes to the device what the host has counted."""
        torch.add(self._first, self._counting, alpha=self.taken, out=self._numbers)

    def take(self) -> None:
        """Says that one more token is there."""
        self.left -= 1
        self.taken += 1

    def remember(self) -> Callable[[], None]:
        """What puts everything back as it is now, after one step: behind the last token nobody looks."""
        return self.count

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What it holds beside the segments; its room is theirs as well for as long as it is open."""
        named = {"table": self._table, "numbers": self._numbers, "starts": self._starts, "rows": self._rows}
        named |= {"counting": self._counting, "first": self._first}
        yield from (named | {"k": self.room.k, "v": self.room.v, "slots": self.room.slots}).items()

    # -- the step --------------------------------------------------------------------------------------------------------

    def attend(self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, softcap: float | None) -> torch.Tensor:
        """Puts a token into its place and attends to all: nothing waits for the device, and nothing comes from the host.

        Args:
            k, v: `[R, 1, D]`, in the model's type.
            q: `[R, G, D] float32`, scaled.

        Returns:
            `[R, G, D] float32`.
        """
        room = self.room
        if self._writes_first:
            self._write(k, v)
            self._lengths.add_(1)
        elif self.in_body:  # attended to as it is, and encoded then
            room.k.copy_(k)
            room.v.copy_(v)
            room.slots.copy_(self._slot.expand_as(room.slots))
        else:
            at = self._rows + self._place
            for held, new in ((room.k, k), (room.v, v)):
                held.view(-1, held.shape[2]).index_copy_(0, at, new[:, 0])
        q = q.contiguous()
        looks = [triton.Look(descriptor, q, None, (), (), spans) for descriptor, spans in self._looks]
        out, _ = triton.attend(looks, self._slot, q.shape[1], softcap, k.dtype)
        if self.in_body and not self._writes_first:
            self._write(k, v)
            self._lengths.add_(1)
        self._place.add_(1)
        self._slot.add_(1)
        return out

    def _write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """A token of each row to its place in their blocks."""
        block = self._codec.block
        ids = self._table.gather(1, (self._place // block)[:, None])[:, 0]
        addresses = ids * block + self._place % block
        for name, x in dispatch.encode(self._codec, k, v).items():
            held = self._fields[name]
            held.view(-1, *held.shape[2:]).index_copy_(0, addresses, x[:, 0])

    # -- memory ----------------------------------------------------------------------------------------------------------

    def _hold(self, recent: Run, firsts: list[int]) -> Run:
        """The recent tokens in this one's room, where each row has slots on from its first."""
        room, width = self.room, recent.width
        if recent.room is not room:
            room.k[:, :width], room.v[:, :width] = recent.k, recent.v
        device = room.slots.device
        room.slots.copy_(torch.tensor(firsts, device=device)[:, None] + torch.arange(self.capacity, device=device))
        return self._held(width, self._first_slot, whole=recent.whole)

    def _held(self, width: int, end: int, *, whole: bool) -> Run:
        """The first `width` places of the room, without slots from `end` on."""
        room = self.room
        room.used = width
        run = Run(room.k[:, :width], room.v[:, :width], room.slots[:, :width], whole=True) if whole else until(room, end, width)
        run.room = room
        return run

    def close(self, recent: Run) -> Run:
        """The recent tokens with those that have come behind them; `recent` is what `open` has returned."""
        return self._held(recent.width + self.taken, self._first_slot + self.taken, whole=recent.whole)

    def _follow(self, table: torch.Tensor) -> None:
        """A table of which blocks can be added to without changing its place."""
        rows, columns = table.shape
        if self._table.shape[1] < columns:
            self._table = table.new_empty(rows, columns + _SPARE_COLUMNS)
        self._table.fill_(-1)
        self._table[:, :columns] = table

    def _describe(self, sink: Run, body: Blocks) -> None:
        """What the kernels are told, unless all lies where it did."""
        fields = body.pool.fields
        held = [self._table, *fields.values(), *([sink.k] if sink.width else [])]
        mark = (self._serial, sink.width, self._table.shape[1], *(x.data_ptr() for x in held))
        if mark == self.mark:
            return
        head_dim = self.room.k.shape[-1]
        self.mark, self._codec, self._fields = mark, body.codec, fields
        sides = body.codec.k, body.codec.v
        alike = all(isinstance(side, DenseCodec) and side.dtype == self.room.k.dtype for side in sides)
        self._writes_first = self.in_body and alike
        runs = ([sink] if sink.width else []) + ([] if self._writes_first else [self.room])
        described: list[Any] = [(triton.describe_run(run.k, run.v, run.slots), None) for run in runs]
        if fields:
            blocks = triton.describe_blocks(body.codec, fields, self._table, None, head_dim)
            described.append((blocks, (self._starts, self._lengths)))
        self._looks = described
