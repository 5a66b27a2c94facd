"""A keep policy at work in one layer: it watches the attention, and when tokens must go it says which."""

import torch

from kvfold.attention.reference import Query
from kvfold.budget import UNIFORM, Cost, split_over_heads, split_over_layers
from kvfold.candidates import Candidates
from kvfold.errors import PlanError
from kvfold.keep.base import Keep, KeepContext, Moment, Pins, State
from kvfold.rope import Rope
from kvfold.site import Site

_NO_SLOT = torch.iinfo(torch.int32).max
_RECENT = torch.finfo(torch.float32).max  # above every rank that a policy gives, below what the user has pinned


class Eviction:
    """The policy of a layer, and what it remembers.

    Attributes:
        state: the policy's tensors (`Keep.initial_state`), row by row.
        cost: what tokens take; the layer says it where the budget is one of bytes.
        rope: the layer's rotation, where the policy needs it.
    """

    def __init__(self, keep: Keep, site: Site, num_sinks: int, pins: Pins):
        self.keep, self.site, self.num_sinks, self.pins = keep, site, num_sinks, pins
        self.num_heads = site.num_kv_heads
        self.state: State = {}
        self.cost: Cost | None = None
        self.rope = site.model.rope() if (keep.reindex or keep.needs_rope) and site.model else None

    def initialize(self, num_rows: int, device: torch.device) -> None:
        """Makes the state, on the device that the layer's tokens are on."""
        made = self.keep.initial_state(num_rows, self.site.num_query_heads // self.num_heads, self.site.head_dim)
        self.state = {name: x.to(device) for name, x in made.items()}
        self.rope = Rope(self.rope.inv_freq.to(device)) if self.rope else None

    def reset(self) -> None:
        self.state, self.cost = {}, None

    def select_rows(self, rows: torch.Tensor) -> None:
        self.state = {name: x[rows] for name, x in self.state.items()}

    def num_pinned(self, num_real: int) -> int:
        """Pinned tokens among the first `num_real` of a sequence, sinks left out."""
        return sum(max(0, min(end, num_real) - max(start, self.num_sinks)) for start, end in self.pins)

    # -- how many may stay -----------------------------------------------------------------------------------------------

    def allowed(self, num_real: torch.Tensor) -> torch.Tensor:
        """`allowed_after` for each of many, in the same shape."""
        numbers = num_real.flatten().tolist()
        known = {n: self.allowed_after(n) for n in set(numbers)}
        return torch.tensor([known[n] for n in numbers], device=num_real.device).view_as(num_real)

    def allowed_after(self, num_real: int) -> int:
        """Tokens that a row may hold after so many of its sequence, sinks included; one beside what is pinned at least."""
        keep, sink = self.keep, self.num_sinks
        budget, split = keep.budget, keep.layers
        pinned = self.num_pinned(num_real)
        cost, num_layers, layer = self.cost, self.site.num_layers, self.site.layer
        if cost is None:
            allowed = budget.tokens(num_real)
            if split != UNIFORM:
                least = sink + (0 if keep.recent.is_share else int(keep.recent.value))
                allowed = split_over_layers(allowed, least, num_real, split, num_layers)[layer]
        else:
            blocks = cost.blocks(budget)
            if split != UNIFORM:
                blocks = split_over_layers(blocks, 1, blocks * num_layers, split, num_layers)[layer]
            allowed = budget.tokens(num_real, sink + cost.tokens(blocks, self.num_heads, keep.heads))
            if pinned and sink + pinned >= allowed:
                raise PlanError(
                    f"{budget} has room for {allowed} tokens of a sequence here: too few for {sink + pinned} pinned"
                )
        return max(sink + pinned + 1, allowed)

    # -- what the policy sees --------------------------------------------------------------------------------------------

    def context(self, held: Candidates, moment: Moment, sinks: list[int]) -> KeepContext:
        """`sinks`: how many each row has."""
        known = {n: self.allowed_after(n) for n in set(moment.num_real)}
        of_rows = [known[n] for n in moment.num_real for _ in range(self.num_heads)]
        return KeepContext(
            tokens=held,
            moment=moment,
            allowed=[n - first for n, first in zip(of_rows, sinks, strict=True)],
            counts=held.counts(),
            sinks=sinks,
            num_heads=self.num_heads,
            layer=self.site.layer,
            num_sinks=self.num_sinks,
            state=self.state,
            rope=self.rope,
        )

    # -- watching --------------------------------------------------------------------------------------------------------

    def observe(self, held: Candidates, query: Query, lse: torch.Tensor, ctx: KeepContext) -> None:
        """Brings the scores up to date with a chunk's queries; `lse [R, M]` is over all that is held, +inf for padding."""
        keep = self.keep
        num_queries = len(query.slots)
        if type(keep).learn is not Keep.learn:
            rows, _, head_dim = query.q.shape
            q = query.q.view(rows, query.num_groups, num_queries, head_dim)
            keep.learn(q, self._query_positions(query.slots, ctx.moment), ctx)
        observed = min(keep.observed(num_queries), num_queries)
        if observed and held.parts:
            seen = self._tokens_seen(held, query.slots, ctx)[:, -observed:] if keep.measure == "hits" else None
            if observed < num_queries:
                query = query.last(observed)
                lse = lse.view(lse.shape[0], query.num_groups, -1)[:, :, -observed:].flatten(1)
            mass = held.received(query, lse, keep.measure, keep.group, seen)
            held.set_score(keep.update(held.score(), mass, ctx))

    def look_back(self, held: Candidates, query: Query, lse: torch.Tensor, ctx: KeepContext) -> None:
        """As `observe`, for a chunk that is read again and whose own tokens are not held: every query counts."""
        mass = held.received(query, lse, self.keep.measure, self.keep.group, None)
        held.set_score(self.keep.update(held.score(), mass, ctx))

    def _query_positions(self, slots: torch.Tensor, moment: Moment) -> torch.Tensor:
        """`[R, Q]`, -1 for padding."""
        positions = moment.positions(slots.expand(len(moment.num_real), -1))
        if moment.padding is not None:
            positions = positions.masked_fill(~moment.padding[:, slots].bool(), -1)
        return positions.repeat_interleave(self.num_heads, 0)

    def _tokens_seen(self, held: Candidates, slots: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """`[R, Q]`: the tokens that each query of the chunk sees, itself included."""
        counts = zip(ctx.counts, ctx.sinks, held.chunk.num_tokens(), strict=True)
        before = torch.tensor([n + first - new for n, first, new in counts], device=slots.device)[:, None]
        if ctx.moment.padding is None:
            return before + torch.arange(1, len(slots) + 1, device=slots.device)
        new_so_far = ctx.moment.padding[:, slots].long().cumsum(1)
        return before + new_so_far.repeat_interleave(self.num_heads, 0)

    # -- choosing --------------------------------------------------------------------------------------------------------

    def choose(self, held: Candidates, ctx: KeepContext) -> torch.Tensor | None:
        """Which tokens stay, `[R, N] bool`; None when all do."""
        if not any(n > most for n, most in zip(ctx.counts, ctx.allowed, strict=True)):
            return None
        rank = self.rank(held, ctx)
        if ctx.empty_places:
            rank = rank.masked_fill(held.slots < 0, -torch.inf)
        allowed = torch.tensor(ctx.allowed, device=rank.device)
        stays = split_over_heads(rank, held.slots, allowed, self.num_heads, self.keep.heads)
        self._settle(held, stays, rank, ctx)
        return stays

    def choose_one(self, held: Candidates, ctx: KeepContext) -> torch.Tensor | None:
        """`[R] long`: the one token of each row that must go, by its place. None when it is not one in every row.

        The same choice as that of `choose`, found by a minimum instead of a sort.
        """
        if self.keep.heads != "uniform" or any(n != most + 1 for n, most in zip(ctx.counts, ctx.allowed, strict=True)):
            return None
        return self.victim(held, self.rank(held, ctx), ctx)

    def victim(self, held: Candidates, rank: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """`[R] long`: the place of the lowest `rank [R, N]` of each row, of equals the oldest; the policy is told."""
        compared = rank.masked_fill(held.slots < 0, torch.inf) if ctx.empty_places else rank
        is_least = compared == compared.amin(1, keepdim=True)
        victim = torch.where(is_least, held.slots, _NO_SLOT).argmin(1)
        if type(self.keep).settle is not Keep.settle:
            stays = (held.slots >= 0).scatter_(1, victim[:, None], False)
            self._settle(held, stays, rank, ctx)
        return victim

    def rank(self, held: Candidates, ctx: KeepContext) -> torch.Tensor:
        """What tokens are compared by, pinned ones at the top; anything where there is none."""
        rank = self.rank_beside_recent(held, ctx)
        recent = [min(self.keep.recent.tokens(n), n) for n in ctx.allowed]
        return self.with_recent(rank, ctx.positions, self._first_recent(recent, ctx)) if any(recent) else rank

    def with_recent(self, rank: torch.Tensor, positions: torch.Tensor, first: int | torch.Tensor) -> torch.Tensor:
        """The ranks with those of tokens from position `first` on above all others but pinned ones."""
        return torch.where(positions >= first, rank.clamp_min(_RECENT), rank)

    def rank_beside_recent(self, held: Candidates, ctx: KeepContext) -> torch.Tensor:
        """The same without regard to which tokens are recent."""
        keep = self.keep
        score = held.score() if keep.scored else torch.zeros(held.slots.shape, device=held.slots.device)
        refreshed = keep.refresh(score, ctx)
        if refreshed is not score:
            held.set_score(refreshed)
        rank = keep.rank(refreshed, ctx)
        for start, end in self.pins:
            rank = rank.masked_fill((ctx.positions >= start) & (ctx.positions < end), torch.inf)
        return rank

    def _first_recent(self, recent: list[int], ctx: KeepContext) -> int | torch.Tensor:
        """The position from which on tokens are recent: one number, or `[R, 1]` where rows differ."""
        num_real = [n for n in ctx.moment.num_real for _ in range(self.num_heads)]
        first = [n - last for n, last in zip(num_real, recent, strict=True)]
        if min(first) == max(first):
            return first[0]
        return torch.tensor(first, dtype=ctx.positions.dtype, device=ctx.positions.device)[:, None]

    def _settle(self, held: Candidates, stays: torch.Tensor, rank: torch.Tensor, ctx: KeepContext) -> None:
        if type(self.keep).settle is Keep.settle:
            return
        free = (rank < _RECENT) & (held.slots >= 0)
        score = self.keep.settle(held.score(), stays, free, ctx)
        if score is not None:
            held.set_score(score)
