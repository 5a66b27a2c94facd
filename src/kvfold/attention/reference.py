"""Attention over tiles of stored tokens, in plain torch: correct on every device, and the oracle of every kernel.

A tile is a run of tokens of every row, as its codec holds it. Nothing here decodes a cache: one tile at a time, codes meet
a small folded vector (kvfold.store.base), and tiles are joined by an online softmax, segments by `merge`.

Rows are (sequence, KV head) pairs, R = B * Hkv. The G query heads that share a KV head and the Q queries of a chunk are one
axis of M = G * Q vectors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kvfold.store.base import Fields, KVCodec, TensorCodec, part


@dataclass(frozen=True)
class Query:
    """The queries of one layer and chunk.

    Attributes:
        q: `[R, M, D] float32`, M = num_groups * Q, the group's heads first; already scaled.
        slots: `[Q] long`: the slot of each query.
        num_groups: G, query heads a KV head.
        first_visible: `[R, Q] long` or None: tokens in earlier slots are not seen (a strict window).
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        dtype: the model's own: kernels may round to it what they multiply. The reference never does.
        scores: `[R, M, N] float32` or None: where a kernel that can (`dispatch.room_for_scores`) leaves the scores of a
            segment's places, so that what tokens receive need not be computed from keys again.
    """

    q: torch.Tensor
    slots: torch.Tensor
    num_groups: int
    first_visible: torch.Tensor | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    scores: torch.Tensor | None = None

    def last(self, num_queries: int) -> "Query":
        """The last `num_queries` queries only."""
        rows, _, head_dim = self.q.shape
        q = self.q.view(rows, self.num_groups, -1, head_dim)[:, :, -num_queries:]
        first = None if self.first_visible is None else self.first_visible[:, -num_queries:]
        return replace(self, q=q.reshape(rows, -1, head_dim), slots=self.slots[-num_queries:], first_visible=first)


@dataclass(frozen=True)
class Tile:
    """Some tokens of every row.

    Attributes:
        fields: what the codec needs, `[R, C, T, *]` or `[R, C, *]` for C blocks of T tokens.
        slots: `[R, C * T] long`, -1 where there is no token.
        causal: whether some of the tokens may be younger than some of the queries.
        whole: whether there is a token at every place.
    """

    fields: Fields
    slots: torch.Tensor
    causal: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Partial:
    """Attention over a part of the tokens.

    Attributes:
        out: `[R, M, D] float32`, normalised over this part.
        lse: `[R, M] float32`, log of the sum of the exponentials of the scores; -inf where nothing was seen.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge(partials: list[Partial]) -> Partial:
    """Joins attention over disjoint sets of tokens (Flash-Decoding; FlashAttention, arXiv 2205.14135, section 3.1).

    out = Σ_i exp(lse_i - lse) out_i with lse = log Σ_i exp(lse_i). Rows that no part has seen stay zero.
    """
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([p.lse for p in partials])
    lse = lses.logsumexp(0)
    weights = (lses - lse.clamp_min(torch.finfo(lse.dtype).min)).exp()
    out = partials[0].out * weights[0, ..., None]
    for partial, weight in zip(partials[1:], weights[1:], strict=True):
        out.addcmul_(partial.out, weight[..., None])
    return Partial(out, lse)


def attend(query: Query, codec: KVCodec, tiles: Iterable[Tile]) -> Partial:
    """Attention of `query` over the tokens of `tiles`."""
    q = codec.k.fold_query(query.q)
    lowest = torch.finfo(torch.float32).min
    out = torch.zeros_like(query.q)
    top = q.new_full(q.shape[:2], lowest)
    total = torch.zeros_like(top)
    for tile in tiles:
        scores = _scores(q, query, codec, tile)
        new_top = torch.maximum(top, scores.amax(-1))
        p = (scores - new_top[..., None]).exp_()
        shrink = (top - new_top).exp_()
        total = total * shrink + p.sum(-1)
        out = out * shrink[..., None] + combine(p, codec.v, part("v", tile.fields))
        top = new_top
    out = codec.v.unfold_output(out / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    return Partial(out, top + total.log())


def mass(query: Query, codec: KVCodec, tiles: Iterable[Tile], lse: torch.Tensor) -> torch.Tensor:
    """The attention that each token receives: `Σ_q softmax(q · k_t)`, per query head.

    Args:
        lse: `[R, M]`, over *all* segments, so that a token's share is of the whole.

    Returns:
        `[R, G, N] float32`, N the tokens of all tiles in order; 0 where there is no token.
    """
    q = codec.k.fold_query(query.q)
    lse = lse.clamp_min(torch.finfo(lse.dtype).min)
    sums = []
    for tile in tiles:
        p = (_scores(q, query, codec, tile) - lse[..., None]).exp_()
        rows, _, num_tokens = p.shape
        sums.append(p.view(rows, query.num_groups, -1, num_tokens).sum(2))
    return torch.cat(sums, dim=-1)


def products(q: torch.Tensor, codec: TensorCodec, fields: Fields) -> torch.Tensor:
    """`q · x_t` with every vector of a tile, `[R, M, C * T]`; q as `fold_query` returned it."""
    if codec.unit == "token":
        return codec.dot(q, {name: x.flatten(1, 2) for name, x in fields.items()})
    return codec.dot(q[:, None], fields).transpose(1, 2).flatten(2)


def combine(p: torch.Tensor, codec: TensorCodec, fields: Fields) -> torch.Tensor:
    """`Σ_t p_t x_t` over a tile, `[R, M, C * T]` to `[R, M, D]`, before `unfold_output`."""
    if codec.unit == "token":
        return codec.combine(p, {name: x.flatten(1, 2) for name, x in fields.items()})
    rows, num_vectors, _ = p.shape
    num_blocks = next(iter(fields.values())).shape[1]
    return codec.combine(p.view(rows, num_vectors, num_blocks, -1).transpose(1, 2), fields).sum(1)


def _scores(q: torch.Tensor, query: Query, codec: KVCodec, tile: Tile) -> torch.Tensor:
    """`[R, M, C * T]` with -inf for what is not seen."""
    scores = products(q, codec.k, part("k", tile.fields))
    if query.softcap is not None:
        scores = (scores / query.softcap).tanh_() * query.softcap
    hidden = _hidden(query, tile)
    if hidden is None:
        return scores
    rows, _, num_tokens = scores.shape
    per_query = scores.view(rows, query.num_groups, -1, num_tokens)
    return per_query.masked_fill_(hidden[:, None], -torch.inf).view_as(scores)


def _hidden(query: Query, tile: Tile) -> torch.Tensor | None:
    """`[R, Q or 1, C * T] bool`: what queries do not see, or None when they see everything."""
    hidden = None if tile.whole else (tile.slots < 0)[:, None, :]
    if tile.causal and len(query.slots) > 1:
        later = tile.slots[:, None, :] > query.slots[:, None]
        hidden = later if hidden is None else hidden | later
    if query.first_visible is not None:
        earlier = tile.slots[:, None, :] < query.first_visible[:, :, None]
        hidden = earlier if hidden is None else hidden | earlier
    return hidden
