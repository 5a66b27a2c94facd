"""Which layers need more bits: each is held by a cheaper codec alone, and what that costs decides who gets which."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from kvfold.lab.quality import reference_of, stream_quality
from kvfold.layer_cache import LayerCache
from kvfold.models.adapter import cache as make_cache


def sensitivity(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prefill_len: int,
    *,
    low: str = "int2",
    high: str = "int8",
    chunk: int = 32,
    on_layer: Callable[[int, float], None] | None = None,
) -> list[float]:
    """For each layer the KL divergence, in nats a token, of a cache with this layer by `low`, the others by `high`.

    KVTuner (arXiv 2502.04420, section 4) finds that layers keep their order over texts. Sliding windows are left out.

    Args:
        ids: `[1, T] long`, the text; see `kvfold.lab.quality`.
        prefill_len: tokens that are prefilled; the others are streamed, `chunk` at a time.
        low, high: codecs, as plans name them.
        on_layer: called after each layer with its index and its divergence.
    """
    reference = reference_of(model, ids, prefill_len, chunk)
    num_layers = sum(isinstance(layer, LayerCache) for layer in make_cache(model, high).layers)
    divergences = []
    for index in range(num_layers):
        divergences.append(stream_quality(model, ids, f"layers({index}={low}) | {high}", reference).kl)
        if on_layer:
            on_layer(index, divergences[-1])
    return divergences


def plan_for(divergences: Sequence[float], share: float, *, low: str = "int4", high: str = "int8") -> str:
    """The plan that holds the most sensitive layers by `high` and the others by `low`.

    Args:
        divergences: of each layer, as `sensitivity` returns them.
        share: of the layers that get `high`, rounded to a whole number of them.
    """
    num_high = round(share * len(divergences))
    ranked = sorted(range(len(divergences)), key=divergences.__getitem__, reverse=True)
    spans = _spans(sorted(ranked[:num_high]))
    return f"layers({spans}={high}) | {low}" if spans else low


def _spans(layers: Sequence[int]) -> str:
    """0, 1, 2, 17 as `0-2+17`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return "+".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
