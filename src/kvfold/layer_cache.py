"""The cache of one layer: where the stages of a plan meet.

    new K, V → sinks (dense) | keep policy → recent (dense) → codec → blocks → tier

A layer first attends to what it holds and to the new tokens, and only then lets go of any: so a chunk loses nothing
that its own queries were to see. Everything that the layer holds is in three segments, `sink`, `body` and `recent`.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvfold import positions
from kvfold.attention import dispatch
from kvfold.attention.reference import Partial, Query, merge
from kvfold.candidates import Candidates, empty_chunk
from kvfold.errors import PlanError
from kvfold.eviction import Eviction
from kvfold.handle import Handle
from kvfold.held_layer import HeldLayer
from kvfold.keep.base import Moment
from kvfold.modes import in_normal_mode
from kvfold.reading import Reading
from kvfold.segment import Run, Segment, join
from kvfold.turnover import Turnover


class LayerCache(HeldLayer):
    """The cache of one attention layer: it attends, and applies its plan."""

    # -- attention -------------------------------------------------------------------------------------------------------

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
        if self.steps_statically:
            assert self._static is not None
            k, v = (x.reshape(rows, 1, head_dim) for x in (handle.k, handle.v))
            out = self._static.attend(k, v, (q.float() * scaling).view(rows, groups, head_dim), softcap)
            return out.view(batch, 1, num_query_heads, head_dim).to(q.dtype)
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
            dtype=q.dtype,
        )
        if not self.looks_back:
            chunk = self._fill_sinks(chunk)
        if self._joins_first:
            chunk, self.recent = self.recent.grown(chunk), self._nothing
        if self._is_watched and num_queries == 1:
            held = [part for part in (self.body, self.recent, chunk) if part.width]
            query = replace(query, scores=dispatch.room_for_scores(held, query))
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
    def _is_watched(self) -> bool:
        """Whether the policy is to know what tokens get from a single query, all of which read all that is held."""
        everything = self.alone and self.body.pool.in_one_place and not (self.plan.read or self.looks_back)
        return self.eviction is not None and everything and self.eviction.keep.observed(1) > 0

    @property
    def _joins_first(self) -> bool:
        """Whether new tokens join the recent ones before they are attended to: one segment less."""
        return self._plain and (self.body.unit == "block" or self.plan.window > 0)

    def _chunk(self, handle: Handle, slots: torch.Tensor, real: torch.Tensor | None) -> Run:
        """The new tokens as a run, without padding."""
        batch, heads, num_new, head_dim = handle.k.shape
        k, v = (x.clone() if x.is_inference() else x for x in (handle.k, handle.v))
        if self.frame:
            k, v = self.frame.keys(k), self.frame.values(v)
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
        asked = dict.fromkeys([*runs, "body"], query)
        if query.scores is not None:  # the places in a policy's order
            widths = {"body": self.body.width, "recent": self.recent.width, "chunk": chunk.width}
            parts = query.scores.split([*widths.values()], -1)
            asked |= {name: replace(query, scores=part) for name, part in zip(widths, parts, strict=True)}
        if self.sink.width:
            asked["sink"] = self._query_of_sinks(query, ranks)
        looks: list[tuple[Segment, Query]] = [(run, asked[name]) for name, run in runs.items() if run.width]
        partials = []
        for part in self._parts(query, chunk):
            partials.append(dispatch.attend([*looks, (part, asked["body"])]))
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
            held = zip(self.sink.num_tokens(), self.recent.num_tokens(), chunk.num_tokens(), strict=True)
            allowed = read.blocks(self.num_real, [sum(counts) for counts in held], pool.block)
            columns = read.choose(query.q, pool.table, pool.summary, pool.num_blocks(), allowed)
        yield from [self.body] if columns is None and pool.in_one_place else self.body.parts(columns)

    def _query_of_sinks(self, query: Query, ranks: torch.Tensor | None) -> Query:
        """Sinks are seen by every query; with re-indexed positions, from as near as the cache is long."""
        q = query.q
        if self.eviction and ranks is not None and self.eviction.keep.reindex:
            rope = self.eviction.rope
            assert rope is not None
            gone = (ranks + 1 - self.eviction.allowed(ranks + 1)).clamp_min(0)
            by_query = q.view(len(self.num_real), -1, len(query.slots), q.shape[-1])
            q = rope.rotate(by_query, -gone[:, None]).view_as(q)
        return replace(query, q=q, first_visible=None, scores=None)

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

    @in_normal_mode
    def took_statically(self) -> None:
        """Counts the token of a static step; where it fills a block, that is encoded at once."""
        static = self._static
        assert static is not None
        self.took(static)
        if static.left == 0 and not static.in_body:
            self._store(self._nothing, None)

    @in_normal_mode
    def came(self, turnover: Turnover | Reading) -> None:
        """Counts the token that a compiled step has put into a turnover; where it fills a block, that is encoded at once."""
        self.took()
        if turnover.is_full:
            self._store(self._nothing, None)

    @in_normal_mode
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
