"""The end of a layer's cache while tokens come one by one.

Between two events that change what a layer holds (a block is encoded, a sequence is cropped or reordered), a decode step
only ever does the same: it puts one key and one value behind the last, and attends to all. A `Tail` has what this needs in
one object of the compiled kernels, so that Python does nothing by token and layer but call it (`kvfold.kernels.cpu.step`).
The layer closes its tail before anyone else looks at its segments, and opens another when it can.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kvfold import kernels
from kvfold.attention.dispatch import Located
from kvfold.blocks import Blocks
from kvfold.kernels import cpu
from kvfold.segment import ROOM, Room, Run
from kvfold.store.base import KVCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fp8 import Float8


class Tail:
    """Room for the next tokens of all rows of a layer, behind `recent`, or behind `body` where that is dense.

    Rows begin where their sequences do (padding is on the left) and end together.

    Attributes:
        native: what the compiled step takes.
        left: tokens that still fit.
        taken: tokens that have come since it was opened.
    """

    def __init__(self, segments: list[Located], left: int, in_body: bool, apart: bool = False):
        self.left, self.taken, self.in_body = left, 0, in_body
        self._segments = segments  # they own what the compiled code points to
        self._longer: tuple[Run, int] | None = None  # rows of unequal length with room behind each, and the next slot
        self.native: Any = cpu._native.tail([(s.descriptor.native, s.starts, s.lengths) for s in segments], apart)

    @staticmethod
    def open(sink: Run, body: Blocks, recent: Run, window: int, num_seen: int) -> "Tail | None":
        """A tail of these segments; None where the next token has to go the long way.

        Args:
            window: recent tokens that stay dense.
            num_seen: slots so far.
        """
        head_dim, dtype = recent.k.shape[-1], recent.k.dtype
        if kernels.serving(recent.k.device.type) is not cpu or not cpu.supports_dense(dtype):
            return None
        counts = recent.num_tokens()
        if not sink.whole or not ends_together(body, recent, counts, num_seen):
            return None
        found = [segment.locate(head_dim) for segment in (sink, body) if segment.width]
        segments = [place for place in found if place is not None]
        if len(segments) != len(found):
            return None
        if body.unit == "token" and window == 0:
            left = min(n * body.pool.block - length for n, length in zip(body.pool.num_blocks(), body.lengths, strict=True))
            if left == 0 or 0 in body.lengths or body.pool.shared or not takes_tokens(body.codec, dtype):
                return None
            if all(isinstance(codec, DenseCodec) for codec in (body.codec.k, body.codec.v)):
                return Tail(segments, left, True)
            # A token is attended to as it is, in a run of its own, and encoded then.
            rows = len(recent.slots)
            k, v = torch.empty(2, rows, 1, head_dim, dtype=dtype)
            run = cpu.describe_run(k, v, torch.zeros(rows, 1, dtype=torch.int32))
            alone = Located(run, [0] * rows, [1] * rows)
            return Tail([*segments, alone], left, True, apart=True)
        left = window + (body.pool.block if body.unit == "block" else 1) - 1 - recent.width
        if left <= 0 or not recent.width:
            return None
        firsts = [num_seen - n for n in counts]
        rows, width = recent.slots.shape
        if not recent.whole:
            longer = _with_room(recent, firsts)
            segments.append(Located(cpu.describe_run(longer.k, longer.v, longer.slots), firsts, counts))
            tail = Tail(segments, min(left, longer.width - width), False)
            tail._longer = longer, num_seen
            return tail
        room, first = recent.roomy(1), firsts[0]
        room.slots[:, width:] = torch.arange(first + width, first + room.slots.shape[1])
        segments.append(Located(cpu.describe_run(room.k, room.v, room.slots), firsts, counts))
        return Tail(segments, min(left, room.k.shape[1] - width), False)

    def take(self) -> None:
        """Says that one more token is there."""
        self.left -= 1
        self.taken += 1

    def close(self, recent: Run) -> Run:
        """The recent tokens with those that have come behind them; `recent` are those that it was opened with."""
        if self._longer is None:
            return recent.longer(self.taken)
        longer, num_seen = self._longer
        return until(longer, num_seen + self.taken, recent.width + self.taken)


def ends_together(body: Blocks, recent: Run, counts: Sequence[int], num_seen: int) -> bool:
    """Whether the tokens of each row, `counts` of them recent, are the last ones of its sequence without a gap."""
    if body.starts is None:
        return False
    firsts = [num_seen - n for n in counts]
    if any(n and start + n != first for start, n, first in zip(body.starts, body.lengths, firsts, strict=True)):
        return False
    begins = recent.slots[:, 0].tolist() if recent.width else firsts
    return all(n == 0 or begin == first for begin, first, n in zip(begins, firsts, counts, strict=True))


def _with_room(recent: Run, firsts: list[int]) -> Run:
    """A copy of rows of unequal length with room behind each, and a slot at every place."""
    after = -(recent.width + 1) % ROOM + 1
    k, v = (F.pad(x, (0, 0, 0, after)) for x in (recent.k, recent.v))
    slots = torch.tensor(firsts, dtype=torch.int32, device=k.device)[:, None]
    return Run(k, v, slots + torch.arange(k.shape[1], dtype=torch.int32, device=k.device))


def until(held: Run | Room, num_seen: int, width: int) -> Run:
    """The first `width` places of what has a slot at every place, without tokens from `num_seen` on."""
    slots = held.slots[:, :width]
    return Run(held.k[:, :width], held.v[:, :width], slots.masked_fill(slots >= num_seen, -1))


def takes_tokens(codec: KVCodec, dtype: torch.dtype) -> bool:
    """Whether the compiled step writes a token that comes into the codec's blocks; `dtype` is the model's."""
    return all(type(side) is Float8 or (type(side) is DenseCodec and side.dtype == dtype) for side in (codec.k, codec.v))
