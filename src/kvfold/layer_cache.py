"""The cache of one layer: where the stages of a plan meet.

    new K, V → sinks (dense) | keep policy → recent (dense) → codec → blocks → tier

A layer first attends to what it holds and to the new tokens, and only then lets go of any: so a chunk loses nothing
that its own queries were to see. Everything that the layer holds is in three segments, `sink`, `body` and `recent`.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin

from kvfold.attention import dispatch
from kvfold.attention.reference import Partial, Query, merge
from kvfold.blocks import Blocks
from kvfold.budget import Cost
from kvfold.candidates import Candidates, empty_chunk
from kvfold.eviction import Eviction
from kvfold.handle import Handle, SeenLength
from kvfold.keep.base import Moment
from kvfold.plan import LayerPlan
from kvfold.pool import BlockPool
from kvfold.segment import Run, Segment, join
from kvfold.site import Site
from kvfold.tier.pool import TieredPool


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
    recent: Run

    def __init__(self, site: Site, plan: LayerPlan, pool: Callable[..., BlockPool] = BlockPool):
        super().__init__()
        self.site, self.plan, self._new_pool = site, plan, pool
        self.codec = plan.store.codec(site)
        keep = plan.keep
        self.rope = site.model.rope() if keep and (keep.reindex or keep.needs_rope) and site.model else None
        self.eviction = Eviction(keep, site, plan.sink, plan.pins, self.rope) if keep else None
        self.looks_back = False  # while the model reads a chunk again, for a policy that reconstructs
        self.is_croppable = plan.keep is None
        self.num_seen = 0
        self.num_real: list[int] = []  # tokens seen that are not padding, for each sequence

    # -- the contract with transformers ----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the segments. Shapes: `[B, Hkv, S, D]` both."""
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = batch * heads
        for name in self.runs:
            run = Run.empty(rows, head_dim, self.dtype, self.device, scored=name == "recent" and self.plan.scored)
            setattr(self, name, run)
        self.body = self._new_body(rows)
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
        for name in (*self.runs, "body"):
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
        end = max(0, self.num_seen + tokens_to_remove)
        removed = self.num_seen - end
        self.num_seen = end
        self.num_real = [max(0, n - removed) for n in self.num_real]
        for name in self.runs:
            run: Run = getattr(self, name)
            setattr(self, name, run.where(run.slots < end))
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
        heads = torch.arange(self.site.num_kv_heads, device=self.device)
        rows = (indices[:, None] * len(heads) + heads).flatten()
        for name in self.runs:
            setattr(self, name, getattr(self, name).rows(rows))
        self.body.select_rows(rows)
        self.num_real = [self.num_real[i] for i in indices.tolist()]
        if self.eviction:
            self.eviction.select_rows(rows)
            self.eviction.cost = self._cost()

    # -- attention -------------------------------------------------------------------------------------------------------

    def attend(
        self, handle: Handle, q: torch.Tensor, padding: torch.Tensor | None, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """Attention of a chunk over everything held and over itself; then the plan is applied to the chunk.

        Args:
            q: `[B, Hq, Q, D]`.
            padding: `[B, seen] bool`, False for padding, or None.
            scaling: what scores are multiplied with.
            softcap: Gemma 2's cap of the scores, or None.

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
        chunk = self._chunk(handle, slots, real)
        new = [after - n for after, n in zip(self.num_real, before, strict=True)]
        moment = Moment(self.num_seen, self.num_real, new, padding)
        ranks = moment.ranks(num_queries, q.device) if self.plan.keep else None
        query = Query(
            q=(q.float() * scaling).reshape(rows, groups * num_queries, head_dim),
            slots=slots,
            num_groups=groups,
            first_visible=self._first_visible(slots, ranks, padding),
            softcap=softcap,
        )
        if not self.looks_back:
            chunk = self._fill_sinks(chunk)
        result = self._attend_all(query, chunk, ranks)
        lse = result.lse
        if real is not None:  # padding asks nothing: no token gains by its queries
            asks = real.repeat_interleave(heads, 0).repeat(1, groups)
            lse = lse.masked_fill(~asks, torch.inf)
        if self.looks_back:
            self._look_back(query, lse, moment)
        else:
            self._settle(query, chunk, lse, moment)
        out = result.out.view(batch, heads, groups, num_queries, head_dim).flatten(1, 2)
        return out.transpose(1, 2).to(q.dtype)

    def _chunk(self, handle: Handle, slots: torch.Tensor, real: torch.Tensor | None) -> Run:
        """The new tokens as a run, without padding."""
        batch, heads, num_new, head_dim = handle.k.shape
        k = handle.k.reshape(batch * heads, num_new, head_dim)
        v = handle.v.reshape(batch * heads, num_new, head_dim)
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
            budget = torch.tensor([read.budget.tokens(n) for n in self.num_real], device=self.device)
            dense = self.sink.counts() + self.recent.counts() + chunk.counts()
            allowed = (budget.repeat_interleave(self.site.num_kv_heads) - dense) // pool.block
            columns = read.choose(query.q, pool.table, pool.summary, allowed)
        if columns is None and pool.in_one_place:
            yield self.body
        else:
            yield from self.body.parts(columns)

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
        self._store(chunk)
        if isinstance(self.body.pool, TieredPool):
            runs = [getattr(self, name) for name in self.runs]
            dense_bytes = sum(x.nbytes for run in runs for x in run.tensors().values())
            self.body.pool.spill(self.num_real, self.sink.counts() + self.recent.counts(), dense_bytes)

    def _evict(self, eviction: Eviction, query: Query, chunk: Run, lse: torch.Tensor, moment: Moment) -> Run:
        """Lets the keep policy learn from a chunk and choose among all tokens but the sinks; what is to be stored of it."""
        held = Candidates(self.body, self.recent, chunk)
        ctx = eviction.context(held, moment, self.sink.num_tokens())
        eviction.observe(held, query, lse, ctx)
        if eviction.keep.reconstructs and len(query.slots) > 1:
            return chunk  # `evict` is called once the chunk has been read again
        if self.plan.window == 0 and held.one_can_replace_one and (victim := eviction.choose_one(held, ctx)) is not None:
            return held.replace(victim)
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

    def _store(self, chunk: Run) -> None:
        """New tokens join the recent ones; what is older than the dense window is encoded."""
        if self.body.unit == "token" and self.plan.window == 0:
            self.body.append(chunk)
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
            self.body.append(old)
            self.body.tidy()
        self.recent = dense.owned()

    def _cost(self) -> Cost | None:
        """What the tokens of all layers like this one take, where the budget is one of bytes."""
        if self.plan.keep is None or self.plan.keep.budget.unit != "bytes":
            return None
        head_dim, block = self.site.head_dim, self.codec.block
        num_dense = self.plan.sink + self.plan.window + (block - 1 if self.codec.unit == "block" else 0)
        return Cost(
            rows=self.batch_size * self.site.num_kv_heads * self.site.num_layers,
            block=block,
            block_bytes=self.body.block_bytes(head_dim),
            dense_bytes=num_dense * (2 * head_dim * self.dtype.itemsize + 4 + 4 * self.plan.keep.scored),
        )

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> str:
        """The kernel that attends to the encoded tokens."""
        return dispatch.kernel_name(self.codec, self.device.type if self.is_initialized else "cpu")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the layer holds, named by its segment and purpose."""
        if self.is_initialized:
            for name in self.runs:
                for purpose, tensor in getattr(self, name).tensors().items():
                    yield f"{name}.{purpose}", tensor
            for purpose, tensor in self.body.pool.tensors().items():
                yield f"body.{purpose}", tensor
            for purpose, tensor in (self.eviction.state if self.eviction else {}).items():
                yield f"keep.{purpose}", tensor

    def kept_slots(self) -> list[list[int]]:
        """For each row (sequence * KV heads + head) the slots of the tokens held, in order."""
        if not self.is_initialized:
            return []
        slots = torch.cat([*(getattr(self, name).slots for name in self.runs), self.body.slots()], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]
