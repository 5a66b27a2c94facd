"""The layers of a cache, made from a plan: which of them stand alone, which hold a cache together, and where blocks live."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from kvfold.errors import PlanError
from kvfold.keep.base import Pins
from kvfold.layer_cache import LayerCache
from kvfold.plan import LayerPlan, Plan
from kvfold.pool import BlockPool
from kvfold.share.minicache import MiniCache
from kvfold.shared_layers import BorrowingLayer, LendingLayer, MergedLayer
from kvfold.site import Site
from kvfold.tier.pool import TieredPool
from kvfold.tier.stage import Stage


def make_layers(plan: Plan, sites: Sequence[Site], pins: Pins = ()) -> list[LayerCache]:
    """One for each site, in order. `pins`: tokens that no layer lets go."""
    layers: dict[int, LayerCache] = {}
    stage = Stage() if plan.tier else None
    plans = [replace(plan.layer(index, len(sites)), pins=pins) for index in range(len(sites))]
    for group in plan.groups(len(sites)):
        first, *others = group
        if isinstance(plan.share, MiniCache):
            merged = MergedLayer(sites[first], plans[first], plan.share)
            layers |= {first: merged, others[0]: MergedLayer(sites[others[0]], plans[others[0]], plan.share, merged)}
            continue
        lender = layers[first] = LendingLayer(sites[first], plans[first], _pool(plans[first], sites[first], stage, again=True))
        for index in others:
            layers[index] = BorrowingLayer(sites[index], plans[index], lender, last=index == others[-1])
    for index, (site, layer_plan) in enumerate(zip(sites, plans, strict=True)):
        if index not in layers:
            layers[index] = LayerCache(site, layer_plan, _pool(layer_plan, site, stage))
    if plan.share and any(layer.frame for layer in layers.values()):
        raise PlanError(
            f"'{plan.store.name}' holds each layer in coordinates of its own, so that layers can't share: leave one out"
        )
    return [layers[index] for index in range(len(sites))]


def _pool(plan: LayerPlan, site: Site, stage: Stage | None, *, again: bool = False) -> Callable[..., BlockPool]:
    """What makes a layer's pool. `again`: a step reads it several times, so that the next layer's is not what comes next."""
    if plan.tier is None or stage is None:
        return BlockPool
    known = not (plan.read or again)
    return partial(TieredPool, tier=plan.tier, stage=stage, layer=site.layer, num_layers=site.num_layers, predictable=known)
