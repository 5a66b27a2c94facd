"""A layer whose model gives it a sliding window: no plan changes it, but a token need not copy the window to come.

transformers appends to such a layer by a copy of all that it holds, and attends under a mask. Here tokens that come one by one
go round in a `Ring`, over those that have left the window, and kvfold's attention reads it as it lies. Chunks, and whoever
looks at keys and values, find the layer as transformers holds it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvfold import kernels
from kvfold.attention import dispatch
from kvfold.attention.reference import Query
from kvfold.handle import Handle, SeenLength
from kvfold.kernels import cpu, triton
from kvfold.kernels.cpu import step
from kvfold.modes import in_normal_mode
from kvfold.segment import Run
from kvfold.static_tail import next_serial

GROWTH = 256
"""While a window is not full, memory grows by so many tokens."""


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' layer with a sliding window, and a ring for tokens that come one by one."""

    def __init__(self, sliding_window: int):
        self._ring: Ring | None = None
        super().__init__(sliding_window=sliding_window)
        self.steps_statically = False  # while a step runs that is to be captured

    # -- as transformers holds it ----------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor:
        """`[B, Hkv, n, D]`: the last tokens of the window."""
        self._close()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._close()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor:
        self._close()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._close()
        self._values = values

    @property
    def num_seen(self) -> int:
        return self.cumulative_length

    @num_seen.setter
    def num_seen(self, num_seen: int) -> None:
        self.cumulative_length = num_seen

    @property
    def batch_size(self) -> int:
        if self._ring is not None:
            return self._ring.batch
        return len(self._keys) if self.is_initialized else -1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a single token's attention function gets a handle, twice."""
        if not self._takes(key_states.shape[2]):
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += 1
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._takes(query_length):
            return SeenLength(self.cumulative_length + 1), 0
        return super().get_mask_sizes(query_length)

    def _takes(self, num_new: int) -> bool:
        """Whether so many tokens go into the ring. While drafts are recorded, they may have to be taken back."""
        return num_new == 1 and self.is_initialized and self.cumulative_length > 0 and not self.record_past

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What it holds."""
        yield "size", self._sliding_window_tensor
        if self._ring is not None:
            yield from self._ring.tensors()
        else:
            yield from (("k", self._keys), ("v", self._values))

    def __getstate__(self) -> dict[str, Any]:
        self._close()
        return self.__dict__

    # -- tokens that come one by one -------------------------------------------------------------------------------------

    @in_normal_mode
    def attend(
        self,
        handle: Handle,
        q: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one token over the window, as `kvfold.layer_cache.LayerCache.attend`."""
        batch, num_query_heads, _, head_dim = q.shape
        ring = self._ring if self.steps_statically else self._opened(self.cumulative_length - 1, padding)
        assert ring is not None
        rows = len(ring.run.k)
        k, v = (x.reshape(rows, 1, head_dim) for x in (handle.k, handle.v))
        asked = (q.float() * scaling).reshape(rows, -1, head_dim)
        if self.steps_statically:
            out = ring.attend(k, v, asked, softcap)
        else:
            out = ring.attend_now(k, v, asked, softcap, padding)
        return out.view(batch, 1, num_query_heads, head_dim).to(q.dtype)

    def tail(self) -> None:
        """As of a `LayerCache`: a ring is no tail."""

    @in_normal_mode
    def turnover(self, padding: torch.Tensor | None = None) -> "Ring | None":
        """Where the compiled step puts the next token; None where it has to go the long way."""
        if not (self._takes(1) and kernels.serving(self.device.type) is cpu and cpu.supports_dense(self.dtype)):
            return None
        return self._opened(self.cumulative_length, padding)

    @in_normal_mode
    def static_tail(self, padding: torch.Tensor | None = None) -> "Ring | str":
        """Where the next token goes in a step that can be captured; or why that can't be."""
        if not self._takes(1):
            return "a layer with a sliding window records drafts"
        if kernels.serving(self.device.type) is not triton or not triton.supports_dense(self.dtype):
            return "attention is not Triton's"
        ring = self._opened(self.cumulative_length, padding)
        if ring.run.locate(ring.run.k.shape[-1]) is None:
            return "the Triton kernels don't read its windows"
        ring.count()
        return ring

    def took(self, tail: object = None) -> None:
        """Counts the token that the compiled step has put into the ring."""
        self.cumulative_length += 1

    came = took

    def took_statically(self) -> None:
        """Counts the token of a captured step."""
        assert self._ring is not None
        self._ring.num_seen += 1
        self.cumulative_length += 1

    def _opened(self, num_seen: int, padding: torch.Tensor | None) -> "Ring":
        """The ring, with all tokens before the next and room for that; `padding [B, seen]`, 0 for padding, or None."""
        ring = self._ring
        if ring is not None and ring.num_seen == num_seen and ring.takes(num_seen):
            return ring
        keys, values = self.keys, self.values
        self._ring = Ring(keys, values, num_seen, self.sliding_window, padding)
        self._keys = self._values = keys.new_empty(*keys.shape[:2], 0, keys.shape[3])  # a view would hold all of it
        return self._ring

    @in_normal_mode
    def _close(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            self._keys, self._values = ring.last()


class Ring:
    """A window's tokens; the next one goes over the one that has left it.

    Attributes:
        run: `[R, capacity, D]` keys and values; the token of slot s is at place s modulo the capacity. Padding has slot -1.
        num_seen: tokens that have come.
        mark: changes when a captured step no longer serves.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_seen: int, window: int, padding: torch.Tensor | None):
        self.batch, self.heads, num_held, head_dim = keys.shape
        self.window, self.num_seen = window, num_seen
        self.capacity = min(window, -(-(num_seen + 1) // GROWTH) * GROWTH)
        num_held = min(num_held, window)
        slots = torch.arange(num_seen - num_held, num_seen, device=keys.device)
        places = slots % self.capacity
        shape = self.batch * self.heads, self.capacity, head_dim
        k, v = keys.new_zeros(shape), values.new_zeros(shape)
        for x, held in ((k, keys), (v, values)):
            x.index_copy_(1, places, held[:, :, -num_held:].flatten(0, 1))
        by_row = slots.expand(self.batch, -1)
        if padding is not None:
            by_row = by_row.masked_fill(~padding[:, slots].bool(), -1)
        of_places = slots.new_full((self.batch, self.capacity), -1).index_copy_(1, places, by_row)
        self.run = Run(k, v, of_places.int().repeat_interleave(self.heads, 0))
        self._slot = torch.zeros(1, dtype=torch.long, device=k.device)
        self._native: Any = None
        self.mark = next_serial(), k.data_ptr()

    def takes(self, slot: int) -> bool:
        """Whether the token of a slot finds its place."""
        return slot < self.capacity or self.capacity == self.window

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from (("k", self.run.k), ("v", self.run.v), ("slots", self.run.slots), ("slot", self._slot))

    def last(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all but the oldest of the window, `[B, Hkv, n, D]`, the oldest first."""
        held = min(self.num_seen, self.window - 1)
        places = torch.arange(self.num_seen - held, self.num_seen, device=self._slot.device) % self.capacity
        k, v = (x.index_select(1, places).unflatten(0, (self.batch, self.heads)) for x in (self.run.k, self.run.v))
        return k, v

    # -- a token, by one way or another ------------------------------------------------------------------------------------

    def attend_now(
        self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, softcap: float | None, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Takes the next token and attends to the window.

        Args:
            k, v: `[R, 1, D]`, in the model's type.
            q: `[R, G, D] float32`, scaled.
            padding: `[B, seen]`, 0 for padding, or None.

        Returns:
            `[R, G, D] float32`.
        """
        run, slot = self.run, self.num_seen
        place = slot % self.capacity
        run.k[:, place], run.v[:, place], run.slots[:, place] = k[:, 0], v[:, 0], slot
        self.num_seen += 1
        if padding is not None:
            absent = (padding[:, slot] == 0).repeat_interleave(self.heads)
            run.slots[:, place].masked_fill_(absent, -1)
        query = Query(q, torch.arange(slot, slot + 1, device=q.device), q.shape[1], None, softcap, k.dtype)
        return dispatch.attend([(run, query)]).out

    def step(self, token: step.Token) -> torch.Tensor:
        """The whole decoder layer for the next token of every sequence, compiled: `[B, 1, H]`."""
        layer, hidden, positions, scaling, softcap, slot = token
        if self._native is None:
            found = self.run.locate(self.run.k.shape[-1])
            assert found is not None
            self._native = cpu._native.turnover([found.descriptor.native], False, False, False, self.capacity)
        place = slot % self.capacity
        none: dict[str, Any] = dict.fromkeys(("shift", "score", "mass", "queries"))
        attended = layer.come(self._native, hidden, *positions, scaling, softcap, place=place, slot=slot, largest=False, **none)
        self.num_seen += 1
        return layer.after_attention(hidden, attended)

    def count(self) -> None:
        """Writes to the device what the host has counted."""
        self._slot.fill_(self.num_seen)

    def remember(self) -> Callable[[], None]:
        """What puts everything back as it is now, after one step: what it has written over had left the window."""
        return self.count

    def attend(self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, softcap: float | None) -> torch.Tensor:
        """As `attend_now`, in a step that can be captured: the place is known to the device alone."""
        run, place = self.run, self._slot % self.capacity
        run.k.index_copy_(1, place, k)
        run.v.index_copy_(1, place, v)
        run.slots.index_copy_(1, place, self._slot.int().expand(len(q), 1))
        out = dispatch.attend([(run, Query(q.contiguous(), self._slot, q.shape[1], None, softcap, k.dtype))]).out
        self._slot.add_(1)
        return out
