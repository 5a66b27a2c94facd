"""The layers of a cache, made from a plan: which of them stand alone, which hold a cache together, and where blocks live."""

from collections.abc import Sequence

from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.share.minicache import MiniCache
from kvfold.shared_layers import BorrowingLayer, LendingLayer, MergedLayer
from kvfold.site import Site


def make_layers(plan: Plan, sites: Sequence[Site]) -> list[LayerCache]:
    """One for each site, in order."""
    layers: dict[int, LayerCache] = {}
    plans = [plan.layer(index, len(sites)) for index in range(len(sites))]
    for group in plan.groups(len(sites)):
        first, *others = group
        if isinstance(plan.share, MiniCache):
            merged = MergedLayer(sites[first], plans[first], plan.share)
            layers |= {first: merged, others[0]: MergedLayer(sites[others[0]], plans[others[0]], plan.share, merged)}
            continue
        lender = layers[first] = LendingLayer(sites[first], plans[first])
        for index in others:
            layers[index] = BorrowingLayer(sites[index], plans[index], lender, last=index == others[-1])
    for index, (site, layer_plan) in enumerate(zip(sites, plans, strict=True)):
        if index not in layers:
            layers[index] = LayerCache(site, layer_plan)
    return [layers[index] for index in range(len(sites))]
