"""The cache of one layer: where the stages of a plan meet.

    new K, V → sinks (dense) | keep policy → recent (dense) → codec → blocks

A layer first attends to what it holds and to the new tokens, and only then lets go of any: so a chunk loses nothing
that its own queries were to see. Everything that the layer holds is in three segments, `sink`, `body` and `recent`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvfold.attention import dispatch
from kvfold.attention.reference import Partial, Query
from kvfold.blocks import Blocks
from kvfold.budget import Cost
from kvfold.candidates import Candidates
from kvfold.eviction import Eviction, Pins, empty_chunk
from kvfold.handle import Handle, SeenLength
from kvfold.keep.base import Moment
from kvfold.plan import LayerPlan
from kvfold.segment import Run, Segment, join
from kvfold.site import Site
from kvfold.store.base import part


class LayerCache(CacheLayerMixin):
    """The cache of one attention layer.

    Tokens are counted in slots, their index in the sequence as the user sees it, padding included. Padding takes up
    slots but is never stored.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, site: Site, plan: LayerPlan, pins: Pins = ()):
        super().__init__()
        self.site, self.plan = site, plan
        self.codec = plan.store.codec(site)
        keep = plan.keep
        self.rope = site.model.rope() if keep and (keep.reindex or keep.needs_rope) and site.model else None
        self.eviction = Eviction(keep, site.layer, site.num_kv_heads, plan.sink, self.rope, pins) if keep else None
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
        keep = self.plan.keep
        scored = keep is not None and keep.scored
        self.sink = Run.empty(rows, head_dim, self.dtype, self.device, scored=False)
        self.recent = Run.empty(rows, head_dim, self.dtype, self.device, scored)
        self.body = Blocks(self.codec, rows, self.device, contiguous=keep is None, scored=scored)
        if self.eviction:
            groups = self.site.num_query_heads // heads
            self.eviction.initialize(rows, groups, head_dim, self.device)
        self.num_real = [0] * batch
        self.is_initialized = True

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
        for name in ("sink", "recent", "body"):
            self.__dict__.pop(name, None)
        if self.eviction:
            self.eviction.state = {}

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
        self.sink = self.sink.where(self.sink.slots < end)
        self.recent = self.recent.where(self.recent.slots < end)
        if rest := self.body.crop(end):
            self.recent = join(Run(rest.k.to(self.dtype), rest.v.to(self.dtype), rest.slots), self.recent)

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
        self.sink, self.recent = self.sink.rows(rows), self.recent.rows(rows)
        self.body.select_rows(rows)
        if self.eviction:
            self.eviction.select_rows(rows)
        self.num_real = [self.num_real[i] for i in indices.tolist()]

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
        ranks = self._ranks(num_queries, real, q.device) if self.plan.keep else None
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
        if self.plan.keep is None:
            self._store(chunk)
        elif self.looks_back:
            self._look_back(query, lse, Moment(self.num_seen, self.num_real, [0] * batch, padding))
        else:
            new = [after - n for after, n in zip(self.num_real, before, strict=True)]
            self._settle(query, chunk, lse, Moment(self.num_seen, self.num_real, new, padding))
        out = result.out.view(batch, heads, groups, num_queries, head_dim).flatten(1, 2)
        return out.transpose(1, 2).to(q.dtype)

    def _chunk(self, handle: Handle, slots: torch.Tensor, real: torch.Tensor | None) -> Run:
        """The new tokens as a run, without padding."""
        batch, heads, num_new, head_dim = handle.k.shape
        scored = self.plan.keep is not None and self.plan.keep.scored
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
        if scored:
            assert self.plan.keep is not None
            run.score = self.plan.keep.first_score(run.k)
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
        known = {n: self._allowed_after(n) for n in set(num_real.flatten().tolist())}
        allowed = [known[n] for n in num_real.flatten().tolist()]
        return torch.tensor(allowed, device=num_real.device).view_as(num_real)

    def _allowed_after(self, num_real: int) -> int:
        """Tokens that a row may hold after so many of its sequence, sinks included."""
        assert self.eviction is not None
        cost = self._cost() if self.eviction.keep.budget.unit == "bytes" else None
        return self.eviction.allowed_after(num_real, self.site.num_layers, cost)

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
        looks: list[tuple[Segment, Query]] = [(segment, query) for segment in self._moving(chunk)]
        if self.sink.width:
            looks.insert(0, (self.sink, self._query_of_sinks(query, ranks)))
        if not looks:
            return Partial(torch.zeros_like(query.q), query.q.new_zeros(query.q.shape[:2]))
        return dispatch.attend(looks)

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

    def _settle(self, query: Query, chunk: Run, lse: torch.Tensor, moment: Moment) -> None:
        """Lets the keep policy learn from a chunk and choose among all tokens but the sinks; stores what is left of it."""
        assert self.eviction is not None
        held = Candidates(self.body, self.recent, chunk)
        ctx = self.eviction.context(held, moment, self._allowed_beside_sinks())
        self.eviction.observe(held, query, lse, ctx, self.sink.num_tokens())
        if self.eviction.keep.reconstructs and len(query.slots) > 1:
            self._store(chunk)  # `evict` is called once the chunk has been read again
        elif self._in_place(chunk) and (victim := self.eviction.choose_one(held, ctx)) is not None:
            self._overwrite(victim, chunk)
        else:
            self._store(self._thin_out(held, self.eviction.choose(held, ctx)))

    def evict(self, padding: torch.Tensor | None) -> None:
        """Brings the layer within its budget without new tokens: what follows when a chunk has been read again."""
        assert self.eviction is not None
        held = Candidates(self.body, self.recent, empty_chunk(self.recent))
        moment = Moment(self.num_seen, self.num_real, [0] * self.batch_size, padding)
        ctx = self.eviction.context(held, moment, self._allowed_beside_sinks())
        self._thin_out(held, self.eviction.choose(held, ctx))
        self.body.tidy()

    def _look_back(self, query: Query, lse: torch.Tensor, moment: Moment) -> None:
        """The policy learns from a chunk that the model reads again; the cache stays as it is."""
        assert self.eviction is not None
        held = Candidates(self.body, self.recent, empty_chunk(self.recent))
        if held.parts:
            self.eviction.look_back(held, query, lse, self.eviction.context(held, moment, self._allowed_beside_sinks()))

    def _allowed_beside_sinks(self) -> list[int]:
        """For each row the tokens that it may hold, without its sinks."""
        known = {n: self._allowed_after(n) for n in set(self.num_real)}
        allowed = [known[n] for n in self.num_real for _ in range(self.site.num_kv_heads)]
        return [n - sinks for n, sinks in zip(allowed, self.sink.num_tokens(), strict=True)]

    def _in_place(self, chunk: Run) -> bool:
        """Whether the chunk is one token a row that can take the place of another among the encoded ones."""
        waits = self.codec.unit != "token" or self.plan.window > 0 or self.recent.width > 0
        return not waits and chunk.width == 1 and chunk.whole and self.body.width > 0

    def _overwrite(self, victim: torch.Tensor, chunk: Run) -> None:
        """The new token of each row takes the place of `victim [R] long`; where it is itself the victim, it is gone."""
        stays = victim < self.body.width
        if bool(stays.all()):
            self.body.replace(victim, chunk)
        else:
            rows = stays.nonzero()[:, 0]
            self.body.replace(victim[rows], chunk.rows(rows), rows)

    def _thin_out(self, held: Candidates, stays: torch.Tensor | None) -> Run:
        """Lets go of all that does not stay, `stays [R, N] bool`; returns what is left of the chunk."""
        if stays is None:
            return held.chunk
        of_body, of_recent, of_chunk = stays.split(held.widths, 1)
        if self.body.width and bool((~of_body & (held.slots[:, : self.body.width] >= 0)).any()):
            self.body.drop(~of_body)
        self.recent = self.recent.where(of_recent)
        return held.chunk.where(of_chunk)

    def _store(self, chunk: Run) -> None:
        """New tokens join the recent ones; what is older than the dense window is encoded."""
        if self.codec.unit == "token" and self.plan.window == 0:
            self.body.append(chunk)
            self.body.tidy()
            return
        dense = join(self.recent, chunk)
        unit = self.body.pool.block if self.codec.unit == "block" else 1
        if dense.width - self.plan.window < unit:  # nothing to encode in the longest row
            self.recent = dense.owned()
            return
        excess = (dense.counts() - self.plan.window).clamp_min(0) // unit * unit
        if bool((excess > 0).any()):
            old, dense = dense.split(excess)
            self.body.append(old)
            self.body.tidy()
        self.recent = dense.owned()

    def _cost(self) -> Cost:
        """What the tokens of all layers like this one take in bytes."""
        assert self.plan.keep is not None
        head_dim, block = self.site.head_dim, self.codec.block
        num_dense = self.plan.sink + self.plan.window + (block - 1 if self.codec.unit == "block" else 0)
        return Cost(
            rows=self.batch_size * self.site.num_kv_heads * self.site.num_layers,
            block=block,
            block_bytes=self.body.block_bytes(head_dim),
            dense_bytes=num_dense * (2 * head_dim * self.dtype.itemsize + 4 + 4 * self.plan.keep.scored),
        )

    # -- saving ----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the layer holds, idle blocks left out: tensors by `segment.purpose`, and numbers, fit for JSON."""
        numbers: dict[str, Any] = {"num_seen": self.num_seen, "num_real": self.num_real}
        if not self.is_initialized:
            return {}, numbers
        segments = {"sink": self.sink.tensors(), "recent": self.recent.tensors(), "body": self.body.pool.state()}
        tensors = {f"{name}.{part}": x for name, parts in segments.items() for part, x in parts.items()}
        if self.eviction:
            tensors |= {f"keep.{name}": x for name, x in self.eviction.state.items()}
        return tensors, numbers | {"starts": self.body.starts, "lengths": self.body.lengths}

    def restore(
        self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes over what `state` gave; the layer must be new and of the same plan. `dtype` is the model's."""
        if not tensors:
            return
        batch, heads, head_dim = len(numbers["num_real"]), self.site.num_kv_heads, self.site.head_dim
        none = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=device)
        self.lazy_initialization(none, none)
        self.num_seen, self.num_real = numbers["num_seen"], list(numbers["num_real"])
        held = {name: part(name, tensors) for name in ("sink", "recent", "body")}
        self.sink, self.recent = (
            Run(run["k"], run["v"], run["slots"], run.get("score")) for run in (held["sink"], held["recent"])
        )
        self.body.restore(held["body"], numbers["starts"], list(numbers["lengths"]))
        if self.eviction:
            self.eviction.state = part("keep", tensors)

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> str:
        """The kernel that attends to the encoded tokens."""
        return dispatch.kernel_name(self.codec, self.device.type if self.is_initialized else "cpu")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the layer holds, named by its segment and purpose."""
        if self.is_initialized:
            for name, segment in (("sink", self.sink), ("recent", self.recent), ("body", self.body.pool)):
                for purpose, tensor in segment.tensors().items():
                    yield f"{name}.{purpose}", tensor
            for purpose, tensor in (self.eviction.state if self.eviction else {}).items():
                yield f"keep.{purpose}", tensor

    def kept_slots(self) -> list[list[int]]:
        """For each row (sequence * KV heads + head) the slots of the tokens held, in order."""
        if not self.is_initialized:
            return []
        slots = torch.cat([self.sink.slots, self.body.slots(), self.recent.slots], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]
