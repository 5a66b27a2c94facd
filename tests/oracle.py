"""What the tests compare kvfold with: models whose attention is worth testing, and attention that forgets nothing.

The oracle model stores every key and value in transformers' own DynamicCache. For each chunk it is told which slots
kvfold's cache held before the chunk, and hides all others behind a mask. So it says what dropping a token must come to,
with none of kvfold's code.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from tiny import tiny_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache

ORACLE = "test-oracle"


def sharp_model(family: str = "llama", *, gain: float = 8.0, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model whose attention is far from uniform: freshly initialised weights alone would attend to everything alike."""
    model = tiny_model(family, seed=seed, **changes)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("q_norm"):  # Qwen3 and Gemma 3 normalise queries: no gain before this one reaches the scores
                module.weight.add_(1.0)
            if isinstance(module, nn.Linear):
                module.weight.mul_(gain)
                if module.bias is not None:
                    module.bias.normal_(std=0.5)
    return model


def tokens(batch: int, length: int, vocab: int = 100, seed: int = 0) -> torch.Tensor:
    """`[batch, length] long` of random tokens, none of them a special one."""
    return torch.randint(4, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows of different lengths to `[B, S]` tokens and their mask, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


def chunked(model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None, sizes: list[int]) -> torch.Tensor:
    """Logits `[B, S, V]` of `ids` fed in chunks of `sizes`, with the positions that `generate` would give them."""
    return torch.cat(list(_steps(model, cache, ids, mask, sizes)), 1)


def _steps(
    model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None, sizes: list[int]
) -> Iterator[torch.Tensor]:
    assert sum(sizes) == ids.shape[1]
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    start = 0
    for size in sizes:
        end = start + size
        with torch.no_grad():
            yield model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if positions is None else positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
        start = end


# -- the oracle --------------------------------------------------------------------------------------------------------------


@dataclass
class LayerView:
    """What one layer may see during a chunk.

    Attributes:
        kept: for each row (sequence * KV heads + head) the slots held before the chunk.
        k, v: for each row `[n, D]` that take the place of the vectors in those slots (a codec's view of them), or None.
    """

    kept: list[list[int]]
    k: list[torch.Tensor] | None = None
    v: list[torch.Tensor] | None = None


@dataclass
class Oracle:
    """A model that keeps everything and is told what to hide.

    Attributes:
        keep: the plan's keep policy, for its strict window and re-indexing, or None.
        sink: sinks of the plan.
    """

    model: PreTrainedModel
    keep: Any
    sink: int
    cache: DynamicCache = field(default_factory=DynamicCache)
    views: dict[int, LayerView] = field(default_factory=dict)
    mask: torch.Tensor | None = None

    @staticmethod
    def of(model: PreTrainedModel, cache: KVCache) -> "Oracle":
        """For a model before kvfold is attached to it, and the cache that will be watched."""
        twin = copy.deepcopy(model)
        AttentionInterface.register(ORACLE, _attention)
        AttentionMaskInterface.register(ORACLE, _mask)
        twin.set_attn_implementation(ORACLE)
        plan = next(layer.plan for layer in cache.layers if isinstance(layer, LayerCache))
        oracle = Oracle(twin, plan.keep, plan.sink, DynamicCache(config=twin.config))
        for module in twin.modules():
            module.__dict__["kvfold_oracle"] = oracle
        return oracle

    def watch(self, cache: KVCache, *, decoded: bool) -> None:
        """Takes down what the cache holds now; with `decoded`, also the vectors as its codecs have them."""
        self.views = {}
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, LayerCache) or not layer.is_initialized:
                continue
            view = LayerView(layer.kept_slots())
            if decoded:
                view.k, view.v = _decoded(layer, view.kept)
            self.views[index] = view


def compare(
    model: PreTrainedModel,
    cache: KVCache,
    oracle: Oracle,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    sizes: list[int],
    *,
    decoded: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """After each chunk: logits of the cache and of the oracle, at places that are not padding."""
    mine = _steps(model, cache, ids, mask, sizes)
    theirs = _steps(oracle.model, oracle.cache, ids, mask, sizes)
    start = 0
    for size in sizes:
        oracle.watch(cache, decoded=decoded)
        oracle.mask = mask
        real = slice(None) if mask is None else mask[:, start : start + size].bool()
        yield next(mine)[real], next(theirs)[real]
        start += size


def _decoded(layer: LayerCache, kept: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each row the vectors of its kept slots, decoded."""
    parts = [segment.dense() for segment in (layer.sink, layer.body, layer.recent) if segment.width]
    k, v, slots = (torch.cat([part[i] for part in parts], 1) for i in range(3))
    ks, vs = [], []
    for row, wanted in enumerate(kept):
        place = {slot: i for i, slot in enumerate(slots[row].tolist()) if slot >= 0}
        at = torch.tensor([place[slot] for slot in wanted], dtype=torch.long)
        ks.append(k[row, at])
        vs.append(v[row, at])
    return ks, vs


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention, `query [B, Hq, Q, D]`, `key [B, Hkv, S, D]`; layers that kvfold serves see what the oracle lets them."""
    oracle: Oracle = module.__dict__["kvfold_oracle"]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    num_queries, num_slots = query.shape[2], key.shape[2]
    sliding = kwargs.get("sliding_window") is not None
    visible = attention_mask
    sinks = None
    if not sliding:
        first = num_slots - num_queries
        real = torch.ones(query.shape[0], num_slots, dtype=torch.bool)
        if oracle.mask is not None:
            real = oracle.mask[:, :num_slots].bool()
        view = oracle.views.get(module.layer_idx)
        visible, sinks = _visible(oracle, view, real, first, key.shape[1])
        visible = visible.repeat_interleave(groups, 1)
        if view is not None and view.k is not None:
            key, value = _replaced(key, view.kept, view.k), _replaced(value, view.kept, view.v)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if sinks is not None and oracle.keep is not None and oracle.keep.reindex:
        ranks = real.cumsum(1)[:, -num_queries:] - 1
        gone = (ranks + 1 - _allowed(oracle, ranks)).clamp_min(0)
        turned = _rotate(oracle.model, query, -gone)
        scores = torch.where(sinks[:, None, None], turned @ key.mT * scaling, scores)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def _visible(
    oracle: Oracle, view: LayerView | None, real: torch.Tensor, first: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, Hkv, Q, S] bool`, and which slots are sinks, `[B, S] bool`."""
    batch, num_slots = real.shape
    held = torch.zeros(batch * heads, num_slots, dtype=torch.bool)
    held[:, first:] = True
    for row, slots in enumerate(view.kept if view else []):
        held[row, slots] = True
    slot = torch.arange(num_slots)
    causal = slot[None, :] <= slot[first:, None]
    visible = held.view(batch, heads, 1, num_slots) & causal & real[:, None, None]
    rank = real.cumsum(1) - 1
    sinks = real & (rank < oracle.sink)
    if oracle.keep is not None and oracle.keep.strict:
        of_query = rank[:, first:]
        near = rank[:, None, :] > of_query[..., None] - (_allowed(oracle, of_query)[..., None] - oracle.sink)
        visible = visible & (near | sinks[:, None])[:, None]
    return visible, sinks


def _allowed(oracle: Oracle, rank: torch.Tensor) -> torch.Tensor:
    """How many tokens may be held once the token of this rank has been seen."""
    budget = oracle.keep.budget
    return rank.clone().apply_(lambda r: max(oracle.sink + 1, budget.tokens(int(r) + 1)))


def _replaced(x: torch.Tensor, kept: list[list[int]], by: list[torch.Tensor]) -> torch.Tensor:
    flat = x.flatten(0, 1).clone()
    for row, slots in enumerate(kept):
        flat[row, slots] = by[row]
    return flat.view_as(x)


def _rotate(model: PreTrainedModel, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`x [B, H, Q, D]` turned by `shift [B, Q]` positions, with the angles that the model's own embedding computes."""
    cos, sin = model.get_decoder().rotary_emb(x, shift)
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


# -- bytes -------------------------------------------------------------------------------------------------------------------


def held_bytes(root: Any, *, but: PreTrainedModel | None = None) -> int:
    """Bytes of all tensor storages reachable from an object, each once; those reachable from the model are left out."""
    theirs = {} if but is None else _storages([but, *but.parameters(), *but.buffers()])
    return sum(size for address, size in _storages([root]).items() if address not in theirs)


def _storages(todo: list[Any]) -> dict[int, int]:
    """Bytes by address."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, str, bytes, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return storages
