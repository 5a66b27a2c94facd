"""Reading a chunk a second time: what policies that score by reconstruction need of a model (KVzip).

After each forward pass of more than one token the decoder reads the same tokens again, as if they were repeated, through the
cache; the layers watch whom these queries look at, keep none of the repeated tokens, and only then evict. This happens in
a hook of the decoder, so that it works under `generate`, chunked prefill and any loop of one's own. The hook is set when a plan
asks for it, and removed by `kvfold.detach`.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvfold.kv_cache import KVCache

_HANDLE = "_kvfold_reconstruction"
_PIECE = 512
"""Tokens that are repeated at a time: memory stays bounded, and a token is looked for by the repetition of its neighbours."""
_LEAD = 8
"""Tokens before a piece that are repeated with it, so that its first ones can be found (as in KVzip's prompts)."""


def install(model: PreTrainedModel) -> None:
    """Sets the hook, once."""
    if not hasattr(model, _HANDLE):
        handle = model.get_decoder().register_forward_hook(_after_forward, with_kwargs=True)
        setattr(model, _HANDLE, handle)


def remove(model: PreTrainedModel) -> None:
    """Takes the hook away, if there is one."""
    handle: RemovableHandle | None = getattr(model, _HANDLE, None)
    if handle is not None:
        handle.remove()
        delattr(model, _HANDLE)


def _after_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache) or not cache.reconstructs or cache.looks_back:
        return
    inputs = kwargs.get("inputs_embeds")
    name = "inputs_embeds" if inputs is not None else "input_ids"
    if inputs is None:
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
    if inputs.shape[1] > 1:
        reconstruct(decoder, cache, name, inputs, kwargs.get("attention_mask"))


@torch.no_grad()
def reconstruct(decoder: nn.Module, cache: KVCache, name: str, inputs: torch.Tensor, padding: torch.Tensor | None) -> None:
    """Reads `inputs` again, the last tokens that the cache has seen, and lets the layers evict.

    Args:
        name: what the decoder calls them: `input_ids` `[B, Q]` or `inputs_embeds` `[B, Q, hidden]`.
        padding: `[B, seen]`, 0 for padding, or None.
    """
    seen, num_new = cache.get_seq_length(), inputs.shape[1]
    for start in range(0, num_new, _PIECE):
        piece = slice(max(0, start - _LEAD), start + _PIECE)
        again = inputs[:, piece]
        mask = None if padding is None else torch.cat([padding, padding[:, seen - num_new :][:, piece]], 1)
        if mask is None:
            positions = torch.arange(seen, seen + again.shape[1], device=inputs.device)[None].expand(len(inputs), -1)
        else:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, seen:]
        with cache.looking_back():
            decoder(**{name: again}, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.evict(padding)
