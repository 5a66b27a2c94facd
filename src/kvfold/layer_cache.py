"""The cache of one layer: where the stages of a plan meet.

    new K, V → sinks (dense) | keep policy → recent (dense) → codec → blocks → tier

A layer first attends to what it holds and to the new tokens, and only then lets go of any: so a chunk loses nothing
that its own queries were to see. Everything that the layer holds is in three segments, `sink`, `body` and `recent`.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin

from kvfold import positions
from kvfold.attention import dispatch
from kvfold.attention.reference import Partial, Query, merge
from kvfold.blocks import Blocks
from kvfold.budget import Cost
from kvfold.candidates import Candidates, empty_chunk
from kvfold.errors import PlanError
from kvfold.eviction import Eviction
from kvfold.handle import Handle, SeenLength
from kvfold.keep.base import Moment
from kvfold.plan import LayerPlan
from kvfold.pool import BlockPool
from kvfold.segment import Run, Segment, join
from kvfold.site import Site
from kvfold.tail import Tail


class LayerCache(CacheLayerMixin):
    """The cache of one attention layer.

    Tokens are counted in slots, their index in the sequence as the user sees it, padding included. Padding takes up
    slots but is never stored.
    """

    is_sliding = False
    is_compileable = False
    runs: ClassVar[tuple[str, ...]] = ("sink", "recent")
    """The dense segments, by name."""
    sink: Run

    def __init__(self, site: Site, plan: LayerPlan, pool: Callable[..., BlockPool] = BlockPool):
        super().__init__()
        self.site, self.plan, self._new_pool = site, plan, pool
        self.codec, self.frame = plan.store.codec(site), plan.store.frame(site)
        self._check(plan)
        keep = plan.keep
        self.rope = site.model.rope() if keep and (keep.reindex or keep.needs_rope) and site.model else None
        self.eviction = Eviction(keep, site, plan.sink, plan.pins, self.rope) if keep else None
        self.looks_back = False  # while the model reads a chunk again, for a policy that reconstructs
        self.is_croppable = plan.keep is None
        self.num_seen = 0
        self.num_real: list[int] = []  # tokens seen that are not padding, for each sequence
        self._tail: Tail | None = None

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
        handle = Handle(self, key_states, value_states)
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
        self._tail = None
        for name in (*self.runs, "_recent", "_body", "_nothing"):
            self.__dict__.pop(name, None)
        if self.eviction:
            self.eviction.reset()

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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

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

    def tail(self) -> Tail | None:
        """Where the next token of every sequence goes if nothing else is to happen; None when it has to go the long way."""
        if self._tail is not None and self._tail.left > 0:
            return self._tail
        if not (self.is_initialized and self._plain) or any(n != self.num_seen for n in self.num_real):
            return None
        if self.plan.sink and not (self.sink.whole and self.sink.width == self.plan.sink):
            return None
        self._close_tail()
        self._tail = Tail.open(self.sink, self._body, self._recent, self.plan.window)
        return self._tail

    def took(self, tail: Tail) -> None:
        """Counts the token that the compiled step has put into the tail."""
        tail.take()
        self.num_seen += 1
        self.num_real = [n + 1 for n in self.num_real]

    def _close_tail(self) -> None:
        tail, self._tail = self._tail, None
        if tail is None or not tail.taken:
            return
        if tail.in_body:
            self._body.lengths = [n + tail.taken for n in self._body.lengths]
        else:
            self._recent = self._recent.longer(tail.taken)

    def __getstate__(self) -> dict[str, Any]:
        self._close_tail()
        return self.__dict__

    # -- attention -------------------------------------------------------------------------------------------------------

    def attend(
        self,
        handle: Handle,
        q: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a chunk over everything held and over itself; then the plan is applied to the chunk.

        Args:
            q: `[B, Hq, Q, D]`.
            padding: `[B, seen] bool`, False for padding, or None.
            scaling: what scores are multiplied with.
            softcap: Gemma 2's cap of the scores, or None.
            position_ids: `[B or 1, Q] long`, where RoPE has turned queries and keys to, or None where it is not known.

        Returns:
            `[B, Q, Hq, D]`, in the type of q.
        """
        batch, num_query_heads, num_queries, head_dim = q.shape
        heads = self.site.num_kv_heads
        rows, groups = batch * heads, num_query_heads // heads
        first = self.num_seen - num_queries
        before = self.num_real
        slots = torch.arange(first, self.num_seen, device=q.device)
        real = None if padding is None else padding[:, first : self.num_seen]
        if self.frame and softcap is not None:
            raise PlanError(f"'{self.plan.store.name}' shifts scores, and this model caps them: choose another codec")
        chunk = self._chunk(handle, slots, real)
        by_row = (q.float() * scaling).reshape(rows, groups * num_queries, head_dim)
        new = [after - n for after, n in zip(self.num_real, before, strict=True)]
        moment = Moment(self.num_seen, self.num_real, new, padding)
        ranks = moment.ranks(num_queries, q.device) if self.plan.keep or self.codec.positional else None
        if self.codec.positional:
            positions.check(position_ids, ranks, real)
        query = Query(
            q=self.frame.queries(by_row) if self.frame else by_row,
            slots=slots,
            num_groups=groups,
            first_visible=self._first_visible(slots, ranks, padding),
            softcap=softcap,
        )
        if not self.looks_back:
            chunk = self._fill_sinks(chunk)
        if self._joins_first:
            chunk, self.recent = self.recent.grown(chunk), self._nothing
        result = self._attend_all(query, chunk, ranks)
        lse = result.lse
        if real is not None:  # padding asks nothing: no token gains by its queries
            asks = real.repeat_interleave(heads, 0).repeat(1, groups)
            lse = lse.masked_fill(~asks, torch.inf)
        if self.looks_back:
            self._look_back(query, lse, moment)
        else:
            self._settle(query, chunk, lse, moment)
        out = self.frame.outputs(result.out) if self.frame else result.out
        out = out.view(batch, heads, groups, num_queries, head_dim).flatten(1, 2)
        return out.transpose(1, 2).to(q.dtype)

    @property
    def _plain(self) -> bool:
        """Whether nothing but sinks, window and codec has a say in where a token goes."""
        held_apart = self.frame or self.codec.positional
        return type(self) is LayerCache and not (self.plan.keep or self.plan.read or self.plan.tier or held_apart)

    @property
    def _joins_first(self) -> bool:
        """Whether new tokens join the recent ones before they are attended to: one segment less."""
        return self._plain and (self.body.unit == "block" or self.plan.window > 0)

    def _chunk(self, handle: Handle, slots: torch.Tensor, real: torch.Tensor | None) -> Run:
        """The new tokens as a run, without padding."""
        batch, heads, num_new, head_dim = handle.k.shape
        k, v = (self.frame.keys(handle.k), self.frame.values(handle.v)) if self.frame else (handle.k, handle.v)
        k, v = (x.reshape(batch * heads, num_new, head_dim) for x in (k, v))
        new_slots = slots.int().expand(batch * heads, -1)
        if real is not None and not bool(real.all()):
            mask = real.repeat_interleave(heads, 0)
            run = Run(k, v, new_slots.masked_fill(~mask, -1)).where(mask)
            self.num_real = [n + c for n, c in zip(self.num_real, real.sum(1).tolist(), strict=True)]
        else:
            run = Run(k, v, new_slots, whole=True)
            self.num_real = [n + num_new for n in self.num_real]
        if self.plan.keep and self.plan.scored:
            run.score = self.plan.keep.first_score(run.k)
        elif self.plan.scored:
            run.score = torch.zeros_like(run.slots, dtype=torch.float32)
        return run

    def _first_visible(
        self, slots: torch.Tensor, ranks: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`[R, Q]`: for strict windows, the first slot that each query sees (sinks aside)."""
        if not self.eviction or ranks is None or not self.eviction.keep.strict:
            return None
        window = self.eviction.allowed(ranks + 1) - self.plan.sink
        if padding is None:
            first = slots - window + 1
        else:  # padding may lie between the turns of a batch: count real tokens, not slots
            real_so_far = padding[:, : self.num_seen].long().cumsum(1)
            first = torch.searchsorted(real_so_far, (ranks + 2 - window).contiguous())
        return first.repeat_interleave(self.site.num_kv_heads, 0)

    def _fill_sinks(self, chunk: Run) -> Run:
        """The first tokens of each sequence go to the sinks, where they stay."""
        if chunk.width == 0 or (self.sink.whole and self.sink.width == self.plan.sink):
            return chunk
        missing = self.plan.sink - self.sink.counts()
        if not bool((missing > 0).any()):
            return chunk
        sinks, chunk = chunk.split(missing.clamp_min(0))
        sinks.score = None
        self.sink = join(self.sink, sinks).owned()
        return chunk

    def _attend_all(self, query: Query, chunk: Run, ranks: torch.Tensor | None) -> Partial:
        runs = {name: getattr(self, name) for name in self.runs} | {"chunk": chunk}
        looks: list[tuple[Segment, Query]] = [
            (run, self._query_of_sinks(query, ranks) if name == "sink" else query) for name, run in runs.items() if run.width
        ]
        partials = []
        for part in self._parts(query, chunk):
            partials.append(dispatch.attend([*looks, (part, query)]))
            looks = []
        if looks:
            partials.append(dispatch.attend(looks))
        if not partials:
            return Partial(torch.zeros_like(query.q), query.q.new_zeros(query.q.shape[:2]))
        return merge(partials)

    def _parts(self, query: Query, chunk: Run) -> Iterator[Segment]:
        """What a chunk reads of the blocks, part by part: those that a read stage chooses, from wherever they lie."""
        if not self.body.width:
            return
        read, pool = self.plan.read, self.body.pool
        columns = None
        if read and len(query.slots) <= read.queries:
            dense = self.sink.counts() + self.recent.counts() + chunk.counts()
            columns = read.choose(query.q, pool.table, pool.summary, read.blocks(self.num_real, dense, pool.block))
        yield from [self.body] if columns is None and pool.in_one_place else self.body.parts(columns)

    def _moving(self, chunk: Run) -> list[Segment]:
        """What a keep policy chooses from, oldest first."""
        return [segment for segment in (self.body, self.recent, chunk) if segment.width]

    def _query_of_sinks(self, query: Query, ranks: torch.Tensor | None) -> Query:
        """Sinks are seen by every query; with re-indexed positions, from as near as the cache is long."""
        q = query.q
        if self.eviction and ranks is not None and self.eviction.keep.reindex:
            assert self.rope is not None
            gone = (ranks + 1 - self.eviction.allowed(ranks + 1)).clamp_min(0)
            by_query = q.view(len(self.num_real), -1, len(query.slots), q.shape[-1])
            q = self.rope.rotate(by_query, -gone[:, None]).view_as(q)
        return Query(q, query.slots, query.num_groups, None, query.softcap)

    # -- applying the plan -----------------------------------------------------------------------------------------------

    def _settle(self, query: Query, chunk: Run, lse: torch.Tensor, moment: Moment) -> None:
        if self.eviction:
            chunk = self._evict(self.eviction, query, chunk, lse, moment)
        if self.plan.read and self.plan.read.scored:
            q = query.q.view(query.q.shape[0], query.num_groups, len(query.slots), -1)
            for run in (self.recent, chunk):
                assert run.score is not None
                run.score = self.plan.read.observe(run.score, run.k, run.slots.long(), q, query.slots)
        self._store(chunk, moment.padding)
        self.body.pool.spill(self.num_real, self.sink, self.recent)

    def _evict(self, eviction: Eviction, query: Query, chunk: Run, lse: torch.Tensor, moment: Moment) -> Run:
        """Lets the keep policy learn from a chunk and choose among all tokens but the sinks; what is to be stored of it."""
        held = Candidates(self.body, self.recent, chunk)
        ctx = eviction.context(held, moment, self.sink.num_tokens())
        eviction.observe(held, query, lse, ctx)
        if eviction.keep.reconstructs and len(query.slots) > 1:
            return chunk  # `evict` is called once the chunk has been read again
        if self.plan.window == 0 and held.one_can_replace_one and (victim := eviction.choose_one(held, ctx)) is not None:
            return held.replace(victim, self._positions(chunk, moment.padding))
        self.recent, chunk = held.keep_only(eviction.choose(held, ctx))
        return chunk

    def evict(self, padding: torch.Tensor | None) -> None:
        """Brings the layer within its budget without new tokens: what follows when a chunk has been read again."""
        assert self.eviction is not None
        held = Candidates(self.body, self.recent, empty_chunk(self.recent))
        moment = Moment(self.num_seen, self.num_real, [0] * self.batch_size, padding)
        ctx = self.eviction.context(held, moment, self.sink.num_tokens())
        self.recent, _ = held.keep_only(self.eviction.choose(held, ctx))
        self.body.tidy()

    def _look_back(self, query: Query, lse: torch.Tensor, moment: Moment) -> None:
        """The policy learns from a chunk that the model reads again; the cache stays as it is."""
        held = Candidates(self.body, self.recent, empty_chunk(self.recent))
        if self.eviction and held.parts:
            self.eviction.look_back(held, query, lse, self.eviction.context(held, moment, self.sink.num_tokens()))

    def _store(self, chunk: Run, padding: torch.Tensor | None) -> None:
        """New tokens join the recent ones; what is older than the dense window is encoded."""
        if self.body.unit == "token" and self.plan.window == 0:
            self.body.append(chunk, self._positions(chunk, padding))
            self.body.tidy()
            return
        dense = join(self.recent, chunk)
        unit = self.body.pool.block if self.body.unit == "block" else 1
        if dense.width - self.plan.window < unit:  # nothing to encode in the longest row
            self.recent = dense.owned()
            return
        excess = (dense.counts() - self.plan.window).clamp_min(0) // unit * unit
        if bool((excess > 0).any()):
            old, dense = dense.split(excess)
            self.body.append(old, self._positions(old, padding))
            self.body.tidy()
        self.recent = dense.owned()

    def _positions(self, run: Run, padding: torch.Tensor | None) -> torch.Tensor | None:
        return positions.of(run.slots, padding, self.site.num_kv_heads) if self.codec.positional else None

    def _cost(self) -> Cost | None:
        """What the tokens of a layer like this one take, where the budget is one of bytes."""
        if self.plan.keep is None or self.plan.keep.budget.unit != "bytes":
            return None
        head_dim, block = self.site.head_dim, self.codec.block
        num_dense = self.plan.sink + self.plan.window + (block - 1 if self.codec.unit == "block" else 0)
        return Cost(
            num_layers=self.site.num_layers,
            rows=self.batch_size * self.site.num_kv_heads,
            block=block,
            block_bytes=self.body.block_bytes(head_dim),
            dense_bytes=num_dense * (2 * head_dim * self.dtype.itemsize + 4 + 4 * self.plan.keep.scored),
            fixed_bytes=sum(x.nbytes for x in self.codec.constants().values()),
        )

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

    def kept_slots(self) -> list[list[int]]:
        """For each row (sequence * KV heads + head) the slots of the tokens held, in order."""
        if not self.is_initialized:
            return []
        slots = torch.cat([*(getattr(self, name).slots for name in self.runs), self.body.slots()], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]
