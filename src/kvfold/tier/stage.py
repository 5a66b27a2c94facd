"""How blocks come back to be read: through two small buffers, one being filled by a thread while the other is read."""

import math
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold.store.base import Fields

if TYPE_CHECKING:
    from kvfold.tier.pool import TieredPool

_ALIGNMENT = 64

Reader = Callable[[Fields], None]
"""Copies certain blocks into tensors `[n, *]` on the CPU."""


@dataclass(frozen=True)
class Request:
    """Blocks that a pool is asked for. `mark` changes when what is below the device does."""

    ids: torch.Tensor
    mark: int

    def same(self, other: "Request") -> bool:
        return self.mark == other.mark and torch.equal(self.ids, other.ids)


class Stage:
    """Two buffers on the device, for all layers of a cache.

    A layer asks for its blocks part by part. When it has got one, the thread begins with what will be asked for next: the next
    part, or the first part of the next layer. If something else is asked for after all, that is fetched instead.
    """

    def __init__(self) -> None:
        self.buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._turn = 0
        self._pools: dict[int, weakref.ref[TieredPool]] = {}
        self._ahead: tuple[weakref.ref[TieredPool], Request, Future[Fields]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvfold-tier")

    def enter(self, layer: int, pool: "TieredPool") -> None:
        """Makes a layer's pool known; the order of layers is the order of their reads."""
        self._pools[layer] = weakref.ref(pool)
        weakref.finalize(pool, self._leave)

    def tensors(self) -> Fields:
        """All that it holds."""
        named = {f"stage.{i}": x for i, x in enumerate(self.buffers)}
        return named | ({"stage.expected": self._ahead[1].ids} if self._ahead else {})

    def fetch(self, pool: "TieredPool", request: Request) -> Fields:
        """The blocks of a request in one of the buffers, `[n, *]`. What was fetched before is no longer needed."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            known, expected, future = ahead
            if known() is pool and expected.same(request):
                return future.result()
            future.exception()  # waits: its buffer must be free
        return _fill(*self._prepared(pool, request))  # nobody to wait for: a thread would only cost time

    def expect(self, pool: "TieredPool", request: Request) -> None:
        """Begins to fetch what will probably be asked for next."""
        self._ahead = weakref.ref(pool), request, self._thread.submit(_fill, *self._prepared(pool, request))

    def after(self, pool: "TieredPool") -> "TieredPool | None":
        """The pool of the next layer; after the last one comes the first."""
        order = sorted(self._pools)
        at = next(i for i, layer in enumerate(order) if self._pools[layer]() is pool)
        return self._pools[order[(at + 1) % len(order)]]()

    def _prepared(self, pool: "TieredPool", request: Request) -> "tuple[Reader, Fields, torch.cuda.Event | None]":
        """The arguments of `_fill`; takes the buffer that is not being read."""
        self._turn ^= 1
        target = self._views(pool, len(request.ids), self._turn)
        ready = torch.cuda.current_stream(pool.device).record_event() if pool.device.type == "cuda" else None
        return pool.reader(request.ids), target, ready

    def _views(self, pool: "TieredPool", num: int, turn: int) -> Fields:
        """A buffer as the fields of `num` blocks."""
        sizes = {name: num * math.prod(x.shape[1:]) * x.dtype.itemsize for name, x in pool.fields.items()}
        total = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())
        if self.buffers[turn].numel() < total or self.buffers[turn].device != pool.device:
            self.buffers[turn] = torch.empty(total, dtype=torch.uint8, device=pool.device)
        views, at = {}, 0
        for name, size in sizes.items():
            kind = pool.fields[name]
            views[name] = self.buffers[turn][at : at + size].view(kind.dtype).view(num, *kind.shape[1:])
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        return views

    def _leave(self) -> None:
        """Without pools there is nothing to stage."""
        self._pools = {layer: pool for layer, pool in self._pools.items() if pool() is not None}
        if not self._pools:
            if self._ahead:
                self._ahead[2].exception()
            self._ahead = None
            self.buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]


def _fill(read: Reader, target: Fields, ready: "torch.cuda.Event | None") -> Fields:
    """Brings blocks into a buffer whose earlier readers are done when `ready` is."""
    if ready is None:
        read(target)
        return target
    held = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for name, x in target.items()}
    read(held)
    device = next(iter(target.values())).device
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda.current_stream(device).wait_event(ready)
        for name, x in target.items():
            x.copy_(held[name], non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
    return target
