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
from kvfold.budget import latest, split_over_heads
from kvfold.errors import PlanError
from kvfold.handle import Handle, SeenLength
from kvfold.keep.base import KeepContext
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
        if self.codec.positional and plan.read:
            raise PlanError(f"'{plan.read.name}' writes whole blocks, and '{plan.store.name}' encodes token by token")
        self.rope = site.model.rope() if plan.keep and plan.keep.reindex and site.model else None
        if self.frame and self.rope:
            raise PlanError(
                f"'{plan.store.name}' holds keys in other coordinates, in which they can't be re-indexed: add reindex=false"
            )
        self.is_croppable = plan.keep is None
        self.num_seen = 0
        self.num_real: list[int] = []  # tokens seen that are not padding, for each sequence
        self._tail: Tail | None = None

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
        slots = torch.arange(first, self.num_seen, device=q.device)
        real = None if padding is None else padding[:, first : self.num_seen]
        if self.frame and softcap is not None:
            raise PlanError(f"'{self.plan.store.name}' shifts scores, and this model caps them: choose another codec")
        chunk = self._chunk(handle, slots, real)
        by_row = (q.float() * scaling).reshape(rows, groups * num_queries, head_dim)
        ranks = self._ranks(num_queries, real, q.device) if self.plan.keep or self.codec.positional else None
        if self.codec.positional:
            positions.check(position_ids, ranks, real)
        query = Query(
            q=self.frame.queries(by_row) if self.frame else by_row,
            slots=slots,
            num_groups=groups,
            first_visible=self._first_visible(slots, ranks, padding),
            softcap=softcap,
        )
        chunk = self._fill_sinks(chunk)
        if self._joins_first:
            chunk, self.recent = self.recent.grown(chunk), self._nothing
        result = self._attend_all(query, chunk, ranks)
        lse = result.lse
        if real is not None:  # padding asks nothing: no token gains by its queries
            asks = real.repeat_interleave(heads, 0).repeat(1, groups)
            lse = lse.masked_fill(~asks, torch.inf)
        self._settle(query, chunk, lse, padding)
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
            run.score = self.plan.keep.first_score(run.k, KeepContext(run.slots.long(), heads, self.site.layer))
        elif self.plan.scored:
            run.score = torch.zeros_like(run.slots, dtype=torch.float32)
        return run

    def _ranks(self, num_queries: int, real: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """`[B, Q]`: how many tokens of its sequence, padding left out, a query has before it."""
        after = torch.tensor(self.num_real, device=device)[:, None]
        if real is None:
            return after - num_queries + torch.arange(num_queries, device=device)
        return after - real.sum(1, keepdim=True) + real.long().cumsum(1) - 1

    def _first_visible(
        self, slots: torch.Tensor, ranks: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`[R, Q]`: for strict windows, the first slot that each query sees (sinks aside)."""
        keep = self.plan.keep
        if keep is None or ranks is None or not keep.strict:
            return None
        window = self._allowed(ranks + 1) - self.plan.sink
        if padding is None:
            first = slots - window + 1
        else:  # padding may lie between the turns of a batch: count real tokens, not slots
            real_so_far = padding[:, : self.num_seen].long().cumsum(1)
            first = torch.searchsorted(real_so_far, (ranks + 2 - window).contiguous())
        return first.repeat_interleave(self.site.num_kv_heads, 0)

    def _allowed(self, num_real: torch.Tensor) -> torch.Tensor:
        """Tokens that a row may hold after so many, sinks included; one beside the sinks at least."""
        keep = self.plan.keep
        assert keep is not None
        in_bytes = self._tokens_in_bytes() if keep.budget.unit == "bytes" else None
        least = self.plan.sink + 1
        known = {n: max(least, keep.budget.tokens(n, in_bytes)) for n in set(num_real.flatten().tolist())}
        allowed = [known[n] for n in num_real.flatten().tolist()]
        return torch.tensor(allowed, device=num_real.device).view_as(num_real)

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
        keep = self.plan.keep
        if keep is not None and ranks is not None and keep.reindex:
            assert self.rope is not None
            gone = (ranks + 1 - self._allowed(ranks + 1)).clamp_min(0)
            by_query = q.view(len(self.num_real), -1, len(query.slots), q.shape[-1])
            q = self.rope.rotate(by_query, -gone[:, None]).view_as(q)
        return Query(q, query.slots, query.num_groups, None, query.softcap)

    # -- applying the plan -----------------------------------------------------------------------------------------------

    def _settle(self, query: Query, chunk: Run, lse: torch.Tensor, padding: torch.Tensor | None) -> None:
        if self.plan.keep is not None:
            chunk = self._evict(query, chunk, lse)
        if self.plan.read and self.plan.read.scored:
            q = query.q.view(query.q.shape[0], query.num_groups, len(query.slots), -1)
            for run in (self.recent, chunk):
                assert run.score is not None
                run.score = self.plan.read.observe(run.score, run.k, run.slots.long(), q, query.slots)
        self._store(chunk, padding)
        self.body.pool.spill(self.num_real, self.sink, self.recent)

    def _evict(self, query: Query, chunk: Run, lse: torch.Tensor) -> Run:
        """Lets the keep policy choose among all tokens but the sinks; returns what is left of the chunk."""
        keep = self.plan.keep
        assert keep is not None
        if keep.scored:
            self._observe(query, chunk, lse)
        slots = torch.cat([self.body.slots(), self.recent.slots.long(), chunk.slots.long()], 1)
        heads = self.site.num_kv_heads
        allowed = self._allowed(torch.tensor(self.num_real, device=slots.device)).repeat_interleave(heads)
        allowed = allowed - self.sink.counts()
        if not bool(((slots >= 0).sum(1) > allowed).any()):
            return chunk
        score = torch.zeros(slots.shape, device=slots.device)
        if keep.scored:
            assert self.recent.score is not None
            assert chunk.score is not None
            score = torch.cat([self.body.score(), self.recent.score, chunk.score], 1)
        rank = keep.rank(score, KeepContext(slots, heads, self.site.layer))
        pinned = latest(slots, [min(keep.recent.tokens(n), n) for n in allowed.tolist()])
        rank = rank.masked_fill(pinned, torch.inf).masked_fill(slots < 0, -torch.inf)
        stays = split_over_heads(rank, allowed, heads, keep.heads)
        of_body, of_recent, of_chunk = stays.split([self.body.width, self.recent.width, chunk.width], 1)
        gone = ~of_body & (slots[:, : self.body.width] >= 0)
        if bool(gone.any()):
            self.body.drop(gone)
        self.recent = self.recent.where(of_recent)
        return chunk.where(of_chunk)

    def _observe(self, query: Query, chunk: Run, lse: torch.Tensor) -> None:
        """Brings the scores up to date with the attention that tokens have just received."""
        keep = self.plan.keep
        assert keep is not None
        num_queries = len(query.slots)
        if not (observed := keep.observed(num_queries)):
            return
        last = query.last(observed)
        lse = lse.view(lse.shape[0], query.num_groups, -1)[:, :, -observed:].flatten(1)
        for segment in self._moving(chunk):
            received = segment.mass(last, lse)
            mass = received.mean(1) if keep.group == "mean" else received.amax(1)
            if isinstance(segment, Blocks):
                segment.set_score(keep.update(segment.score(), mass, num_queries))
            elif isinstance(segment, Run):
                assert segment.score is not None
                segment.score = keep.update(segment.score, mass, num_queries)

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

    def _tokens_in_bytes(self) -> int:
        """How many tokens fit into this layer's part of a budget of bytes, everything counted."""
        keep = self.plan.keep
        assert keep is not None
        head_dim, block = self.site.head_dim, self.codec.block
        rows = self.batch_size * self.site.num_kv_heads
        in_layer = keep.budget.value / self.site.num_layers - sum(x.nbytes for x in self.codec.constants().values())
        per_block = self.body.block_bytes(head_dim)
        num_dense = self.plan.sink + self.plan.window + (block - 1 if self.codec.unit == "block" else 0)
        dense_bytes = num_dense * (2 * head_dim * self.dtype.itemsize + 4 + 4 * keep.scored)
        num_blocks = int((in_layer / rows - dense_bytes) // per_block)
        if num_blocks < 1:
            least = keep.budget.value + ((dense_bytes + per_block) * rows - in_layer) * self.site.num_layers
            raise PlanError(f"{keep.budget} is too little for this plan: it needs {least / 2**20:.1f}MiB at least")
        return self.plan.sink + num_blocks * block

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
                for part, tensor in segment.tensors().items():
                    yield f"{name}.{part}", tensor

    def kept_slots(self) -> list[list[int]]:
        """For each row (sequence * KV heads + head) the slots of the tokens held, in order."""
        if not self.is_initialized:
            return []
        slots = torch.cat([*(getattr(self, name).slots.long() for name in self.runs), self.body.slots()], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]
