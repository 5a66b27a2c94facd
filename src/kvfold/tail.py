"""The end of a layer's cache while tokens come one by one.

Between two events that change what a layer holds (a block is encoded, a sequence is cropped or reordered), a decode step
only ever does the same: it puts one key and one value behind the last, and attends to all. A `Tail` has what this needs in
one object of the compiled kernels, so that Python does nothing by token and layer but call it (`kvfold.kernels.cpu.step`).
The layer closes its tail before anyone else looks at its segments, and opens another when it can.
"""

from typing import Any

import torch

from kvfold import kernels
from kvfold.attention.dispatch import Located
from kvfold.blocks import Blocks
from kvfold.kernels import cpu
from kvfold.segment import Run
from kvfold.store.base import KVCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fp8 import Float8


class Tail:
    """Room for the next tokens of all rows of a layer, behind `recent`, or behind `body` where that is dense.

    Attributes:
        native: what the compiled step takes.
        left: tokens that still fit.
        taken: tokens that have come since it was opened.
    """

    def __init__(self, segments: list[Located], left: int, in_body: bool, apart: bool = False):
        self.left, self.taken, self.in_body = left, 0, in_body
        self._segments = segments  # they own what the compiled code points to
        self.native: Any = cpu._native.tail([(s.descriptor.native, s.starts, s.lengths) for s in segments], apart)

    @staticmethod
    def open(sink: Run, body: Blocks, recent: Run, window: int) -> "Tail | None":
        """A tail of these segments, whose rows hold the same slots; None where the next token has to go the long way.

        Args:
            window: recent tokens that stay dense.
        """
        head_dim, dtype = recent.k.shape[-1], recent.k.dtype
        same = (
            sink.whole and recent.whole and body.starts is not None and len({*zip(body.starts, body.lengths, strict=True)}) == 1
        )
        if not same or kernels.serving(recent.k.device.type) is not cpu or not cpu.supports_dense(dtype):
            return None
        found = [segment.locate(head_dim) for segment in (sink, body) if segment.width]
        segments = [place for place in found if place is not None]
        if len(segments) != len(found):
            return None
        if body.unit == "token" and window == 0:
            left = body.width - body.lengths[0]
            if left == 0 or body.pool.shared or not takes_tokens(body.codec, dtype):
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
        room = recent.roomy(1)
        first = int(recent.slots[0, 0])
        rows, width = recent.slots.shape
        room.slots[:, width:] = torch.arange(first + width, first + room.slots.shape[1])
        segments.append(Located(cpu.describe_run(room.k, room.v, room.slots), [first] * rows, [width] * rows))
        return Tail(segments, min(left, room.k.shape[1] - width), False)

    def take(self) -> None:
        """Says that one more token is there."""
        self.left -= 1
        self.taken += 1


def takes_tokens(codec: KVCodec, dtype: torch.dtype) -> bool:
    """Whether the compiled step writes a token that comes into the codec's blocks; `dtype` is the model's."""
    return all(type(side) is Float8 or (type(side) is DenseCodec and side.dtype == dtype) for side in (codec.k, codec.v))
