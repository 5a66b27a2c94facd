"""The cache of a model: its layers, its bytes."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvfold import layer_state
from kvfold.keep.base import Pins
from kvfold.layer_cache import LayerCache
from kvfold.layers import make_layers
from kvfold.modes import in_normal_mode
from kvfold.plan import Plan
from kvfold.sliding_layer import SlidingLayer


class KVCache(Cache):
    """A compressed cache for a model: pass it as `past_key_values`. Made by `kvfold.cache`.

    Layers with a sliding window of their own hold what they hold in transformers: they are bounded already.
    """

    def __init__(self, plan: Plan, layers: Sequence[LayerCache | DynamicLayer], fingerprint: dict[str, Any], pins: Pins = ()):
        super().__init__(layers=list(layers))
        self.plan, self.fingerprint, self.pins = plan, fingerprint, pins

    @property
    def kernel(self) -> str:
        """The kernel that attends to the compressed segments; several, joined by '+', where layers differ."""
        if self.plan.leaves_to_transformers:
            return "transformers"
        return "+".join(sorted({layer.kernel for layer in self.layers if isinstance(layer, LayerCache)}))

    # -- for policies that read a chunk twice (kvfold.models.reconstruct) ------------------------------------------------

    @property
    def reconstructs(self) -> bool:
        """Whether the plan wants each chunk read a second time."""
        return self.plan.keep is not None and self.plan.keep.reconstructs

    @property
    def looks_back(self) -> bool:
        return any(layer.looks_back for layer in self.layers if isinstance(layer, LayerCache))

    @contextmanager
    def looking_back(self) -> Iterator[None]:
        """Within it, a forward pass leaves the cache as it is; policies learn whom its queries look at."""
        sliding = [layer for layer in self.layers if not isinstance(layer, LayerCache) and layer.is_initialized]
        before = [(layer.keys, layer.values, layer.cumulative_length) for layer in sliding]
        evicting = [layer for layer in self.layers if isinstance(layer, LayerCache)]
        lengths = [(layer.num_seen, layer.num_real) for layer in evicting]
        for layer in evicting:
            layer.looks_back = True
        try:
            yield
        finally:
            for layer, (num_seen, num_real) in zip(evicting, lengths, strict=True):
                layer.looks_back, layer.num_seen, layer.num_real = False, num_seen, num_real
            for layer, held in zip(sliding, before, strict=True):
                layer.keys, layer.values, layer.cumulative_length = held

    def evict(self, padding: torch.Tensor | None = None) -> None:
        """Brings every layer within its budget. `padding [B, seen]`, 0 for padding, or None."""
        for layer in self.layers:
            if isinstance(layer, LayerCache) and layer.eviction:
                layer.evict(padding)

    # -- what is held ----------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """Every tensor held: layer, `segment.purpose`, tensor."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LayerCache):
                for name, tensor in layer.tensors():
                    yield index, name, tensor
            elif layer.is_initialized and isinstance(layer, SlidingLayer):
                for name, tensor in layer.tensors():
                    yield index, f"sliding.{name}", tensor
            elif layer.is_initialized:
                kind = "sliding" if isinstance(layer, DynamicSlidingWindowLayer) else "dense"
                yield index, f"{kind}.k", layer.keys
                yield index, f"{kind}.v", layer.values

    @property
    def nbytes(self) -> int:
        """The bytes of memory that are really held, each counted once: codes, scales, slots, tables, idle blocks, buffers.

        Files are not in it: see `Memory.by_tier`.
        """
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, _, t in self.tensors()}
        return sum(storages.values())

    def memory(self) -> "Memory":
        """Bytes by layer and component."""
        return Memory.of(self)

    @in_normal_mode
    def copy(self) -> "KVCache":
        """Another cache of the same tokens, in memory of its own: each can go on without the other."""
        sites = [layer.site for layer in self.layers if isinstance(layer, LayerCache)]
        twins = iter(make_layers(self.plan, sites, self.pins))
        layers: list[LayerCache | DynamicLayer] = []
        for layer in self.layers:
            if not isinstance(layer, LayerCache):
                layers.append(copy.deepcopy(layer))
                continue
            twin = next(twins)
            tensors, numbers = layer_state.state(layer)
            own = {name: tensor.clone() for name, tensor in tensors.items()}
            if layer.is_initialized:
                layer_state.restore(twin, own, copy.deepcopy(numbers), layer.dtype, layer.device)
            layers.append(twin)
        return KVCache(self.plan, layers, self.fingerprint, self.pins)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """As `copy`: transformers' way to go on from one prompt several times."""
        return self.copy()

    def save(self, path: Any) -> None:
        """Writes the cache to a file. See `kvfold.persist`."""
        from kvfold.persist import save

        save(self, path)


@dataclass(frozen=True)
class Memory:
    """Where the bytes are. `rows` maps (layer, component) to bytes in memory; components are `segment.purpose`; `disk` is
    what lies in files."""

    rows: dict[tuple[int, str], int]
    num_seen: int
    disk: int = 0

    @staticmethod
    def of(cache: KVCache) -> "Memory":
        rows: dict[tuple[int, str], int] = {}
        seen: set[int] = set()
        for layer, name, tensor in cache.tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                rows[layer, name] = storage.nbytes()
        layers = [layer for layer in cache.layers if isinstance(layer, LayerCache) and layer.is_initialized]
        return Memory(rows, cache.get_seq_length(), sum(layer.body.pool.disk_bytes for layer in layers))

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    def by_component(self) -> dict[str, int]:
        """Bytes of each component over all layers, the largest first."""
        sums: dict[str, int] = {}
        for (_, name), size in self.rows.items():
            sums[name] = sums.get(name, 0) + size
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def by_tier(self) -> dict[str, int]:
        """Bytes on the device (staging buffers included), in the host's memory below it, and in files.

        Without a tier stage all are on the device.
        """
        host = sum(size for (_, name), size in self.rows.items() if name.startswith("body.host."))
        return {"device": self.total - host, "host": host, "disk": self.disk}

    def by_layer(self) -> dict[int, int]:
        sums: dict[int, int] = {}
        for (layer, _), size in self.rows.items():
            sums[layer] = sums.get(layer, 0) + size
        return sums

    def __str__(self) -> str:
        lines = [f"{self.total:>13,} bytes for {self.num_seen} tokens"]
        tiers = self.by_tier()
        if tiers["host"] or tiers["disk"]:
            lines += [f"{size:>13,} on the {name}" for name, size in tiers.items()]
        lines += [f"{size:>13,}   {name}" for name, size in self.by_component().items() if size]
        return "\n".join(lines)
