"""What a compressed layer gives transformers in place of tensors and lengths."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvfold.layer_cache import LayerCache
    from kvfold.sliding_layer import SlidingLayer


class SeenLength(int):
    """A KV length that says: this layer keeps its own slots, build no mask (see kvfold.models.adapter)."""


class Handle:
    """What a layer's `update` returns in place of tensors: new tokens on their way to the attention function."""

    def __init__(self, layer: "LayerCache | SlidingLayer", k: torch.Tensor, v: torch.Tensor):
        self.layer, self.k, self.v = layer, k, v

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this cache is compressed and has no '{name}': the model does not use kvfold's attention. "
            "Make the cache with kvfold.cache(model, plan), and don't change the attention implementation afterwards"
        )
