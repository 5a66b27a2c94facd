"""The tokens of a layer that can go: encoded ones, recent ones and the new chunk, seen as one list of places."""

from dataclasses import replace
from functools import cached_property

import torch

from kvfold.attention import dispatch
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.keep.base import GroupReduce, Measure
from kvfold.segment import Run

_QUERIES_AT_ONCE = 32
"""Whose attention is held one by one, where a sum does not do: few enough to stay small beside the cache."""


class Candidates:
    """Body, recent and chunk, one after the other: N places a row.

    Nothing is copied but numbers: keys and values are read where they lie, by folding (kvfold.store.base).
    """

    def __init__(self, body: Blocks, recent: Run, chunk: Run):
        self.body, self.recent, self.chunk = body, recent, chunk
        self.parts: list[Blocks | Run] = [part for part in (body, recent, chunk) if part.width]
        self._score: torch.Tensor | None = None

    @property
    def widths(self) -> list[int]:
        return [self.body.width, self.recent.width, self.chunk.width]

    @cached_property
    def slots(self) -> torch.Tensor:
        """`[R, N] int32`, -1 where there is no token."""
        return _join([part.slots() if isinstance(part, Blocks) else part.slots for part in self.parts], self.chunk.slots)

    def counts(self) -> list[int]:
        """Tokens of each row."""
        body, recent, chunk = self.body.num_tokens(), self.recent.num_tokens(), self.chunk.num_tokens()
        return [a + b + c for a, b, c in zip(body, recent, chunk, strict=True)]

    # -- what goes -------------------------------------------------------------------------------------------------------

    @property
    def one_can_replace_one(self) -> bool:
        """Whether the chunk is one token a row that can take the place of an encoded one."""
        body, chunk = self.body, self.chunk
        return body.unit == "token" and body.width > 0 and self.recent.width == 0 and chunk.width == 1 and chunk.whole

    def replace(self, victim: torch.Tensor, positions: torch.Tensor | None = None) -> Run:
        """The new token of each row takes the place of `victim [R] long`; where it is itself the victim, it is gone.

        `positions [R, 1]`: of the new tokens, for a codec that needs them. Returns what is left of the chunk: nothing.
        """
        stays = victim < self.body.width
        if bool(stays.all()):
            self.body.replace(victim, self.chunk, None, positions)
        else:
            rows = stays.nonzero()[:, 0]
            self.body.replace(victim[rows], self.chunk.rows(rows), rows, None if positions is None else positions[rows])
        return empty_chunk(self.chunk)

    def keep_only(self, stays: torch.Tensor | None) -> tuple[Run, Run]:
        """Lets go of all that does not stay, `stays [R, N] bool` (None: all does); what is left of recent and chunk."""
        if stays is None:
            return self.recent, self.chunk
        of_body, of_recent, of_chunk = stays.split(self.widths, 1)
        if self.body.width and bool((~of_body & (self.slots[:, : self.body.width] >= 0)).any()):
            self.body.drop(~of_body)
        return self.recent.where(of_recent), self.chunk.where(of_chunk)

    # -- the policy's numbers --------------------------------------------------------------------------------------------

    def score(self) -> torch.Tensor:
        """`[R, N] float32`."""
        if self._score is None:
            scores = [part.score() if isinstance(part, Blocks) else part.score for part in self.parts]
            self._score = _join([score for score in scores if score is not None], self.chunk.slots.float())
        return self._score

    def set_score(self, score: torch.Tensor) -> None:
        self._score = score
        body, recent, chunk = score.split(self.widths, 1)
        if self.body.width:
            self.body.set_score(body)
        if self.recent.width:
            self.recent.score = recent
        if self.chunk.width:
            self.chunk.score = chunk

    # -- attention received ----------------------------------------------------------------------------------------------

    def received(
        self, query: Query, lse: torch.Tensor, measure: Measure, group: GroupReduce, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """`[R, N] float32`: what tokens got from the queries, by `measure` (see `Keep`).

        Args:
            lse: `[R, M]` over all that the layer holds, +inf for queries that do not count.
            seen: `[R, Q]`, how many tokens each query sees, for `hits`.
        """
        num_queries = len(query.slots)
        if measure == "sum" or num_queries == 1:
            if query.scores is not None:  # of one query, of all places
                masses = dispatch.received(query.scores, lse, largest=group == "max")
            else:
                masses = _join([_reduced(part.mass(query, lse), group) for part in self.parts], lse)
            if measure != "hits":
                return masses
            assert seen is not None
            return (masses * seen >= 1).float()
        total = torch.zeros(self.slots.shape, device=lse.device)
        for start in range(0, num_queries, _QUERIES_AT_ONCE):
            some, lse_of_some = _slice(query, lse, start, start + _QUERIES_AT_ONCE)
            each = torch.cat([_each(part, some, lse_of_some) for part in self.parts], -1)
            by_query = _reduced(each, group)
            if measure == "max":
                torch.maximum(total, by_query.amax(1), out=total)
            else:
                assert seen is not None
                total += (by_query * seen[:, start : start + _QUERIES_AT_ONCE, None] >= 1).sum(1)
        return total

    # -- keys and values (kvfold.keep.base.Tokens) -----------------------------------------------------------------------

    def products(self, q: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.products(q) for part in self.parts], -1)

    def weighted_keys(self, weights: torch.Tensor) -> torch.Tensor:
        by_part = weights.split([part.width for part in self.parts], -1)
        return torch.stack([part.weighted_keys(w) for part, w in zip(self.parts, by_part, strict=True)]).sum(0)

    def value_norms(self) -> torch.Tensor:
        return torch.cat([part.value_norms() for part in self.parts], -1)

    def vectors(self, row: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        head_dim = self.chunk.k.shape[-1]
        k, v = (torch.empty(len(places), head_dim, device=places.device) for _ in range(2))
        start = 0
        for part in self.parts:
            inside = (places >= start) & (places < start + part.width)
            if bool(inside.any()):
                k[inside], v[inside] = part.vectors(row, places[inside] - start)
            start += part.width
        return k, v


def empty_chunk(like: Run) -> Run:
    """A chunk without tokens, for a choice among what is held."""
    return Run.empty(len(like.slots), like.k.shape[-1], like.k.dtype, like.k.device, like.score is not None)


def _join(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 1) if parts else like[:, :0]


def _reduced(mass: torch.Tensor, group: GroupReduce) -> torch.Tensor:
    """Over the query heads of a group, the second axis."""
    return mass.mean(1) if group == "mean" else mass.amax(1)


def _slice(query: Query, lse: torch.Tensor, start: int, end: int) -> tuple[Query, torch.Tensor]:
    """The queries from `start` to `end` of a chunk."""
    rows, _, head_dim = query.q.shape
    q = query.q.view(rows, query.num_groups, -1, head_dim)[:, :, start:end].reshape(rows, -1, head_dim)
    lse = lse.view(rows, query.num_groups, -1)[:, :, start:end].reshape(rows, -1)
    return replace(query, q=q, slots=query.slots[start:end]), lse


def _each(part: Blocks | Run, query: Query, lse: torch.Tensor) -> torch.Tensor:
    """`[R, G, Q, N]`: the attention of every single query."""
    rows, num_vectors, _ = query.q.shape
    # Every query as a head of its own, standing at the last slot; what is younger than it is taken out again below.
    alone = replace(query, slots=query.slots[-1:], num_groups=num_vectors)
    each = part.mass(alone, lse).view(rows, query.num_groups, -1, part.width)
    if isinstance(part, Run):
        each = each.masked_fill(part.slots[:, None, None, :] > query.slots[:, None], 0.0)
    return each
