"""What one layer holds, as tensors and numbers, and back: what `kvfold.persist` writes to a file."""

from typing import Any

import torch

from kvfold.layer_cache import LayerCache
from kvfold.segment import Run
from kvfold.store.base import part


def state(layer: LayerCache) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that the layer holds, idle blocks left out: tensors by `segment.purpose`, and numbers, fit for JSON."""
    numbers: dict[str, Any] = {"num_seen": layer.num_seen, "num_real": layer.num_real}
    if not layer.is_initialized:
        return {}, numbers
    segments = {name: getattr(layer, name).tensors() for name in layer.runs} | {"body": layer.body.pool.state()}
    tensors = {f"{name}.{purpose}": x for name, parts in segments.items() for purpose, x in parts.items()}
    if layer.eviction:
        tensors |= {f"keep.{name}": x for name, x in layer.eviction.state.items()}
    return tensors, numbers | {"starts": layer.body.starts, "lengths": layer.body.lengths}


def restore(
    layer: LayerCache, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Takes over what `state` gave; the layer must be new and of the same plan. `dtype` is the model's."""
    if not tensors:
        return
    batch, heads, head_dim = len(numbers["num_real"]), layer.site.num_kv_heads, layer.site.head_dim
    none = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=device)
    layer.lazy_initialization(none, none)
    layer.num_seen, layer.num_real = numbers["num_seen"], list(numbers["num_real"])
    for name in layer.runs:
        held = part(name, tensors)
        whole = bool((held["slots"] >= 0).all())
        setattr(layer, name, Run(held["k"], held["v"], held["slots"], held.get("score"), whole=whole))
    layer.body.restore(part("body", tensors), numbers["starts"], list(numbers["lengths"]))
    if layer.eviction:
        layer.eviction.state = part("keep", tensors)
