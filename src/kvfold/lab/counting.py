"""Bytes and FLOPs of every operation in a piece of code, by its name: what a profiler's times are compared with.

torch's operations are counted as they are dispatched: the bytes of all tensors that go in and come out, each tensor once an
operation, and the FLOPs of matrix products by torch's own formulas. kvfold's attention is one operation, `kvfold::attend`: it
is given a range of its own in the trace (and in NVTX), and counts what its segments hold.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kvfold.attention import dispatch
from kvfold.attention.reference import Partial, Query
from kvfold.block_view import BlockView
from kvfold.blocks import Blocks
from kvfold.segment import Run

ATTEND = "kvfold::attend"


class Ledger(TorchDispatchMode):
    """Counts inside its `with` block.

    Attributes:
        num_bytes, flops, calls: by the name that torch's profiler uses (`aten::mm`, `kvfold::attend`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        if not self._inside:
            name = function._schema.name
            self.calls[name] += 1
            if not function.is_view:
                tensors = {id(x): x for x in tree_leaves((arguments, named, result)) if isinstance(x, torch.Tensor)}
                self.num_bytes[name] += sum(x.nbytes for x in tensors.values())
            if (formula := flop_registry.get(function._overloadpacket)) is not None:
                self.flops[name] += formula(*arguments, **named, out_val=result)
        return result

    @contextmanager
    def attending(self, looks: Sequence[tuple[Any, Query]]) -> Iterator[None]:
        """Counts attention over `looks` as one operation."""
        self.calls[ATTEND] += 1
        self.num_bytes[ATTEND] += 2 * looks[0][1].q.nbytes  # queries and outputs, which all segments share
        for segment, query in looks:
            num_bytes, num_pairs = _read(segment)
            _, num_vectors, head_dim = query.q.shape
            self.num_bytes[ATTEND] += num_bytes
            self.flops[ATTEND] += 4 * head_dim * num_vectors * num_pairs
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def _read(segment: Any) -> tuple[int, int]:
    """Bytes that attention reads of a segment, and its tokens, those of all rows together."""
    if isinstance(segment, Blocks):
        pool = segment.pool
        num_blocks = int((pool.table >= 0).sum())
        tensors = [*pool.fields.values(), *([pool.slots] if pool.has_slots else [])]
        return sum(x[:1].nbytes for x in tensors) * num_blocks + pool.table.nbytes, int(segment.counts().sum())
    if isinstance(segment, BlockView):
        num_blocks = int((segment.index >= 0).sum())
        tensors = [*segment.fields.values(), *([] if segment.block_slots is None else [segment.block_slots])]
        num_tokens = sum(int((tile.slots >= 0).sum()) for tile in segment.tiles())
        return sum(x[:1].nbytes for x in tensors) * num_blocks + segment.index.nbytes, num_tokens
    assert isinstance(segment, Run)
    return segment.k.nbytes + segment.v.nbytes + segment.slots.nbytes, int(segment.counts().sum())


@contextmanager
def attention_ranges(ledger: Ledger | None = None, *, nvtx: bool = False) -> Iterator[None]:
    """Every call of kvfold's attention is a range `kvfold::attend`, or counted by `ledger`; NVTX sees it if asked to."""
    attend = dispatch.attend

    def watched(looks: Sequence[tuple[Any, Query]]) -> Partial:
        if ledger is not None:
            with ledger.attending(looks):
                return attend(looks)
        with torch.profiler.record_function(ATTEND), nvtx_range(ATTEND, nvtx):
            return attend(looks)

    dispatch.attend = watched
    try:
        yield
    finally:
        dispatch.attend = attend


@contextmanager
def nvtx_range(name: str, wanted: bool) -> Iterator[None]:
    """A range that Nsight Systems and Nsight Compute see."""
    if not wanted:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
