"""What a layer holds, and transformers' contract with it: growing, cropping, reordering, counting. Attention is in
`kvfold.layer_cache`.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin

from kvfold.attention import dispatch
from kvfold.blocks import Blocks
from kvfold.budget import Cost
from kvfold.errors import PlanError
from kvfold.eviction import Eviction
from kvfold.handle import Handle, SeenLength
from kvfold.modes import in_normal_mode
from kvfold.plan import LayerPlan
from kvfold.pool import BlockPool
from kvfold.read.base import Read
from kvfold.reading import Reading
from kvfold.segment import Run, join
from kvfold.site import Site
from kvfold.static_tail import StaticTail
from kvfold.static_turnover import StaticTurnover
from kvfold.tail import Tail
from kvfold.turnover import Turnover, comes_first


class HeldLayer(CacheLayerMixin):
    """The tokens of one attention layer, and what may be done to them from outside.

    Tokens are counted in slots, their index in the sequence as the user sees it, padding included. Padding takes up
    slots but is never stored.
    """

    is_sliding = False
    is_compileable = False
    runs: ClassVar[tuple[str, ...]] = ("sink", "recent")
    """The dense segments, by name."""
    alone: ClassVar[bool] = True
    """Whether no other layer has a say in what this one holds."""
    sink: Run

    def __init__(self, site: Site, plan: LayerPlan, pool: Callable[..., BlockPool] = BlockPool):
        super().__init__()
        self.site, self.plan, self._new_pool = site, plan, pool
        self.codec, self.frame = plan.store.codec(site), plan.store.frame(site)
        self._check(plan)
        keep = plan.keep
        self.eviction = Eviction(keep, site, plan.sink, plan.pins) if keep else None
        self.looks_back = False  # while the model reads a chunk again, for a policy that reconstructs
        self.is_croppable = plan.keep is None
        self.num_seen = 0
        self.num_real: list[int] = []  # tokens seen that are not padding, for each sequence
        self._tail: Tail | None = None
        self._turnover: Turnover | Reading | None = None
        self._static: StaticTail | StaticTurnover | None = None
        self._static_is_open = False
        self.steps_statically = False  # while a step runs that is to be captured

    def _check(self, plan: LayerPlan) -> None:
        """Raises PlanError for what the codec of this layer can't go with."""
        if self.codec.positional and plan.read:
            raise PlanError(f"'{plan.read.name}' writes whole blocks, and '{plan.store.name}' encodes token by token")
        if self.frame and plan.keep and plan.keep.reindex:
            raise PlanError(
                f"'{plan.store.name}' holds keys in other coordinates, in which they can't be re-indexed: add reindex=false"
            )
        if self.frame and plan.keep and plan.keep.reads_vectors:
            raise PlanError(
                f"'{plan.store.name}' holds keys and values in other coordinates, in which '{plan.keep.name}' can't judge "
                "them: choose a policy that goes by attention, or another codec"
            )

    # -- the contract with transformers ----------------------------------------------------------------------------------

    @in_normal_mode
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the segments. Shapes: `[B, Hkv, S, D]` both."""
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = batch * heads
        for name in self.runs:
            setattr(self, name, Run.empty(rows, head_dim, self.dtype, self.device, name == "recent" and self.plan.scored))
        self._nothing = self.recent
        self._body = self._new_body(rows)
        self.num_real = [0] * batch
        if self.eviction:
            self.eviction.initialize(rows, self.device)
            self.eviction.cost = self._cost()
        self.is_initialized = True

    def _new_body(self, num_rows: int) -> Blocks:
        keep, read = self.plan.keep, self.plan.read
        return Blocks(
            self.codec,
            num_rows,
            self.device,
            contiguous=keep is None,
            scored=keep is not None and keep.scored,
            pool=self._new_pool,
            summarize=read.summarize if read else None,
        )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes `[B, Hkv, Q, D]` of new keys and values; the attention function gets them as a handle, twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(self.num_real) != key_states.shape[0]:
            raise ValueError(f"the cache holds {len(self.num_real)} sequences, the input has {key_states.shape[0]}")
        self.num_seen += key_states.shape[2]
        handle = Handle(self, key_states.to(self.dtype), value_states.to(self.dtype))  # under autocast they may differ
        return handle, handle

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions and masks count on it."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return SeenLength(self.num_seen + query_length), 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.num_real) or -1

    def reset(self) -> None:
        """Forgets all tokens and gives their memory back."""
        self.num_seen, self.num_real, self.is_initialized = 0, [], False
        self._tail = self._turnover = self._static = None
        self._static_is_open = False
        for name in (*self.runs, "_recent", "_body", "_nothing"):
            self.__dict__.pop(name, None)
        if self.eviction:
            self.eviction.reset()

    @in_normal_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is negative, as in transformers.

        Exact where nothing has been evicted. Under a keep policy, what has gone does not come back.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removed = min(self.num_seen, -tokens_to_remove)
        self.num_seen = end = self.num_seen - removed
        self.num_real = [max(0, n - removed) for n in self.num_real]
        for name in self.runs:
            setattr(self, name, (run := getattr(self, name)).where(run.slots < end))
        if rest := self.body.crop(end):
            score = torch.zeros_like(rest.slots, dtype=torch.float32) if self.plan.scored else None
            self.recent = join(Run(rest.k.to(self.dtype), rest.v.to(self.dtype), rest.slots, score), self.recent)

    @in_normal_mode
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    @in_normal_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @in_normal_mode
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The sequences `indices [B']`, in that order; copies share their blocks until they differ."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        num_heads = self.site.num_kv_heads
        rows = (indices[:, None] * num_heads + torch.arange(num_heads, device=self.device)).flatten()
        for name in self.runs:
            setattr(self, name, getattr(self, name).rows(rows))
        self.body.select_rows(rows)
        self.num_real = [self.num_real[i] for i in indices.tolist()]
        if self.eviction:
            self.eviction.select_rows(rows)
            self.eviction.cost = self._cost()

    # -- tokens that come one by one -------------------------------------------------------------------------------------

    @property
    def body(self) -> Blocks:
        self._close_tail()
        return self._body

    @property
    def recent(self) -> Run:
        self._close_tail()
        return self._recent

    @recent.setter
    def recent(self, run: Run) -> None:
        self._recent = run

    @property
    def _plain(self) -> bool:
        """Whether nothing but sinks, window and codec has a say in where a token goes."""
        return self._in_one_place and not self.plan.keep

    @property
    def _in_one_place(self) -> bool:
        """Whether a token has one place, is always read from there, and as it is."""
        return self._stays_as_it_is and not self.plan.read

    @property
    def _stays_as_it_is(self) -> bool:
        held_apart = self.frame or self.codec.positional
        return self.alone and not (self.plan.tier or held_apart or self.looks_back)

    @property
    def _begun(self) -> bool:
        """Whether all sinks are there."""
        if not self.is_initialized:
            return False
        return not self.plan.sink or (self.sink.whole and self.sink.width == self.plan.sink)

    @property
    def _is_padded(self) -> bool:
        return any(n != self.num_seen for n in self.num_real)

    @in_normal_mode
    def tail(self) -> Tail | None:
        """Where the next token of every sequence goes if nothing else is to happen; None when it has to go the long way."""
        if self._tail is not None and self._tail.left > 0:
            return self._tail
        if not (self._plain and self._begun):
            return None
        self._close_tail()
        self._tail = Tail.open(self.sink, self._body, self._recent, self.plan.window, self.num_seen)
        return self._tail

    @in_normal_mode
    def turnover(self, padding: torch.Tensor | None = None) -> Turnover | Reading | None:
        """The same under a keep policy, where a token may have to go, and under a read stage.

        padding: `[B, seen]`, the next token among them, 0 for padding; or None.
        """
        if self._turnover is not None and self._turnover.has_room():
            return self._turnover
        if self.plan.read:
            return self._open_reading(self.plan.read)
        if not (self.eviction and self._in_one_place and self._begun):
            return None
        if self._is_padded and (padding is None or not comes_first(padding, [n + 1 for n in self.num_real])):
            return None
        self._close_tail()
        given = self.sink, self._body, self._recent, self.eviction, self.plan.window, self.num_seen, self.num_real
        self._turnover = found = Turnover.open(*given)
        if found is not None:
            self._recent = self._nothing
        return found

    def _open_reading(self, read: Read) -> Reading | None:
        if not (self._stays_as_it_is and self._begun):
            return None
        self._close_tail()
        self._turnover = found = Reading.open(self.sink, self._body, self._recent, self.plan.window, self.num_real, read)
        if found is not None:
            self._recent = self._nothing
        return found

    @in_normal_mode
    def static_tail(self, padding: torch.Tensor | None = None) -> StaticTail | StaticTurnover | str:
        """Where the next token of every sequence goes in a step that can be captured; or why that can't be."""
        if self._static is not None and self._static_is_open and self._static.left > 0:
            return self._static
        if not self._in_one_place:
            return "its plan does more than to put a token behind the last one"
        if not self._begun:
            return "the sinks are not all there"
        if self._is_padded and self.eviction:
            return "there is padding"
        self._close_tail()
        return self._open_turnover(self.eviction) if self.eviction else self._open_tail()

    def _open_tail(self) -> StaticTail | str:
        static, window = self._static, self.plan.window
        if why := StaticTail.why_not(self.sink, self._body, self._recent, window, self.num_seen):
            return why
        if not isinstance(static, StaticTail) or not static.suits(self._recent, window, self._body):
            static = self._static = StaticTail(self._recent, window, self._body)
        self._recent = static.open(self.sink, self._body, self._recent, self.num_seen)
        self._static_is_open = True
        return static

    def _open_turnover(self, eviction: Eviction) -> StaticTurnover | str:
        static, window = self._static, self.plan.window
        if why := StaticTurnover.why_not(self.sink, self._body, self._recent, window, eviction):
            return why
        if not isinstance(static, StaticTurnover) or not static.suits(self._recent, window, self._body):
            static = self._static = StaticTurnover(self._recent, window, self._body)
        if not static.open(self.sink, self._body, self._recent, eviction, self.num_seen):
            return "more than one token has to go"
        self._recent, self._static_is_open = self._nothing, True
        return static

    def took(self, tail: Tail | StaticTail | StaticTurnover | None = None) -> None:
        """Counts the token that the compiled step has put into the tail, or the turnover."""
        if tail:
            tail.take()
        self.num_seen += 1
        self.num_real = [n + 1 for n in self.num_real]

    def _close_tail(self) -> None:
        turnover, self._turnover = self._turnover, None
        if turnover is not None:
            self._recent = turnover.close()
        tail: Tail | StaticTail | StaticTurnover | None = self._tail
        self._tail = None
        if self._static_is_open:
            tail, self._static_is_open = self._static, False
        if isinstance(tail, StaticTurnover):
            self._recent = tail.close()
            return
        if tail is None or not tail.taken:
            return
        if tail.in_body:
            self._body.lengths = [n + tail.taken for n in self._body.lengths]
        else:
            self._recent = tail.close(self._recent)

    def __getstate__(self) -> dict[str, Any]:
        self._close_tail()
        return self.__dict__ | {"_static": None}

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> str:
        """The kernel that attends to the encoded tokens."""
        return dispatch.kernel_name(self.codec, self.device.type if self.is_initialized else "cpu")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the layer holds, named by its segment and purpose."""
        for name, tensor in self.codec.constants().items():
            yield f"codec.{name}", tensor
        if self.is_initialized:
            for name, segment in [*((run, getattr(self, run)) for run in self.runs), ("body", self.body.pool)]:
                for purpose, tensor in segment.tensors().items():
                    yield f"{name}.{purpose}", tensor
            for purpose, tensor in (self.eviction.state if self.eviction else {}).items():
                yield f"keep.{purpose}", tensor
            for purpose, tensor in self._static.tensors() if self._static else ():
                yield f"step.{purpose}", tensor

    def kept_slots(self) -> list[list[int]]:
        """For each row (sequence * KV heads + head) the slots of the tokens held, in order."""
        if not self.is_initialized:
            return []
        slots = torch.cat([*(getattr(self, name).slots for name in self.runs), self.body.slots()], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]

    def _cost(self) -> Cost | None:
        """What the tokens of a layer like this one take, where the budget is one of bytes."""
        if self.plan.keep is None or self.plan.keep.budget.unit != "bytes":
            return None
        head_dim, block = self.site.head_dim, self.codec.block
        # Beside sinks and window: what fills no block yet, or the one token that a turnover holds.
        num_dense = self.plan.sink + self.plan.window + (block - 1 if self.codec.unit == "block" else 1)
        return Cost(
            num_layers=self.site.num_layers,
            rows=self.batch_size * self.site.num_kv_heads,
            block=block,
            block_bytes=self.body.block_bytes(head_dim),
            dense_bytes=num_dense * (2 * head_dim * self.dtype.itemsize + 4 + 4 * self.plan.keep.scored),
            fixed_bytes=sum(x.nbytes for x in self.codec.constants().values()),
        )
