"""Layers that hold a cache together: one that lends its tokens to the next ones, and pairs whose tokens are merged."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from kvfold.attention.reference import Partial, Query
from kvfold.blocks import Blocks
from kvfold.errors import PlanError
from kvfold.handle import Handle
from kvfold.keep.base import Moment
from kvfold.layer_cache import LayerCache
from kvfold.modes import in_normal_mode
from kvfold.plan import LayerPlan
from kvfold.pool import BlockPool
from kvfold.segment import Run, Segment, join
from kvfold.share.minicache import MiniCache, directions, slerp
from kvfold.site import Site


class LendingLayer(LayerCache):
    """A layer whose tokens serve the next layers as well; the plan is applied to a chunk when the last of them has attended."""

    alone: ClassVar[bool] = False

    def __init__(self, site: Site, plan: LayerPlan, pool: Callable[..., BlockPool] = BlockPool):
        super().__init__(site, plan, pool)
        self._asked: tuple[Run, torch.Tensor | None] | None = None
        self._unsettled: tuple[Query, Run, torch.Tensor, Moment] | None = None

    def reset(self) -> None:
        self._asked = self._unsettled = None
        super().reset()

    def lend(self, q: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Attention of another layer's queries, `[R, M, D]` scaled, to what this layer holds and the same chunk's tokens."""
        assert self._asked is not None
        assert self._unsettled is not None
        query, chunk, lse, moment = self._unsettled
        out = super()._attend_all(replace(query, q=q), *self._asked).out
        if last:
            self._asked = self._unsettled = None
            super()._settle(query, chunk, lse, moment)
        return out

    def _attend_all(self, query: Query, chunk: Run, ranks: torch.Tensor | None) -> Partial:
        self._asked = chunk, ranks
        return super()._attend_all(query, chunk, ranks)

    def _settle(self, query: Query, chunk: Run, lse: torch.Tensor, moment: Moment) -> None:
        self._unsettled = query, chunk, lse, moment


class BorrowingLayer(LayerCache):
    """A layer that holds nothing: its queries attend to the tokens of another one."""

    alone: ClassVar[bool] = False

    def __init__(self, site: Site, plan: LayerPlan, lender: LendingLayer, *, last: bool):
        super().__init__(site, plan)
        self.lender, self._is_last = lender, last

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
        batch, num_query_heads, num_queries, head_dim = q.shape
        heads = self.site.num_kv_heads
        self.num_real = list(self.lender.num_real)
        scaled = (q.float() * scaling).reshape(batch * heads, -1, head_dim)
        out = self.lender.lend(scaled, last=self._is_last)
        return out.view(batch, num_query_heads, num_queries, head_dim).transpose(1, 2).to(q.dtype)

    def kept_slots(self) -> list[list[int]]:
        return self.lender.kept_slots()


class MergedLayer(LayerCache):
    """One of a pair of layers whose tokens are merged (kvfold.share.minicache). The first one holds the merged blocks.

    Both hold their dense tokens themselves: sinks, the recent ones, those that wait to be merged, and in `kept` those that
    can't be. A layer's new tokens are merged when its partner has them too, which is when the second layer has attended.
    """

    alone: ClassVar[bool] = False
    runs: ClassVar[tuple[str, ...]] = ("sink", "kept", "recent")
    kept: Run

    def __init__(self, site: Site, plan: LayerPlan, method: MiniCache, first: "MergedLayer | None" = None):
        super().__init__(site, plan)
        self.method, self._first = method, first
        side: Literal[0, 1] = 1 if first else 0
        if self.codec.constants():
            raise PlanError("minicache merges directions, which have no place in the subspaces of one layer's projections")
        self.codec = directions(self.codec, site.head_dim, side)

    @property
    def merged(self) -> Blocks:
        """The blocks of both layers."""
        return (self._first or self).body

    def _new_body(self, num_rows: int) -> Blocks:
        return Blocks(self.codec, num_rows, self.device, contiguous=False, scored=False)

    def kept_slots(self) -> list[list[int]]:
        if not self.is_initialized:
            return []
        slots = torch.cat([*(getattr(self, name).slots.long() for name in self.runs), self.merged.slots()], 1)
        return [sorted(s for s in row if s >= 0) for row in slots.tolist()]

    def _parts(self, query: Query, chunk: Run) -> Iterator[Segment]:
        if self.merged.width:
            yield from self.merged.parts(codec=self.codec)

    def _store(self, chunk: Run, padding: torch.Tensor | None) -> None:
        self.recent = join(self.recent, chunk).owned()
        if self._first:
            self._merge_waiting(self._first)

    def _merge_waiting(self, first: "MergedLayer") -> None:
        """Moves the oldest tokens of both layers to merged blocks, as many as fill them."""
        block = self.merged.pool.block
        num_kept = self.method.num_kept(block)
        excess = (self.recent.counts() - self.plan.window).clamp_min(0) // (block + num_kept) * (block + num_kept)
        if not bool((excess > 0).any()):
            return
        (x, first.recent), (y, self.recent) = (layer.recent.split(excess) for layer in (first, self))
        k, k_angle = slerp(x.k, y.k, self.method.weight.value)
        v, v_angle = slerp(x.v, y.v, self.method.weight.value)
        present = x.slots >= 0
        stays = _largest(k_angle + v_angle, block + num_kept, num_kept) & present
        together = Run(_with_norms(k, x.k, y.k), _with_norms(v, x.v, y.v), x.slots).where(present & ~stays)
        self.merged.append(together)
        for layer, old in ((first, x), (self, y)):
            layer.kept = join(layer.kept, old.where(stays)).trimmed()
            layer.recent = layer.recent.owned()


def _with_norms(direction: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`[R, N, D + 2]`: a direction and the magnitudes of the two vectors that it stands for."""
    norms = [z.float().norm(dim=-1, keepdim=True) for z in (x, y)]
    return torch.cat([direction, *norms], -1)


def _largest(angle: torch.Tensor, group: int, num: int) -> torch.Tensor:
    """Marks the `num` largest of every `group` neighbours: `[R, n * group]` float to bool."""
    by_group = angle.view(angle.shape[0], -1, group)
    best = by_group.topk(num, dim=-1).indices
    return torch.zeros_like(by_group, dtype=torch.bool).scatter_(-1, best, True).view_as(angle)
