"""kvfold's attention in a transformers model, without touching its code.

transformers calls `cache.update(k, v)` and hands what it returns to an attention function chosen by name. kvfold's
cache returns a handle, and kvfold's function, registered as 'kvfold', lets the layer attend. Everything else that
reaches the function (chunks in layers with a sliding window, a DynamicCache, no cache at all) is computed as usual on
plain tensors.

`attach` switches a model over, `detach` puts it back. Importing kvfold changes nothing.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvfold.errors import ModelError, PlanError
from kvfold.handle import Handle, SeenLength
from kvfold.keep.base import Pins, merge_spans
from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache
from kvfold.layers import make_layers
from kvfold.models import reconstruct, step
from kvfold.models.layer import ModelLayer, head_dim_of
from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.sliding_layer import SlidingLayer

NAME = "kvfold"
_PREVIOUS = "_kvfold_previous_attention"
_OWN_ATTENTION = "its modeling code has attention of its own, not transformers' interface"


def attach(model: PreTrainedModel) -> None:
    """Makes a model use kvfold's attention. Does nothing when it does already. ModelError when it can't be served."""
    if model.config._attn_implementation == NAME:
        return
    check_model(model)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    setattr(model, _PREVIOUS, model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # transformers only warns where a model's code takes no other attention
        delattr(model, _PREVIOUS)
        raise ModelError(f"{type(model).__name__} can't be served: {_OWN_ATTENTION}")
    step.install(model, NAME, attention)


def detach(model: PreTrainedModel) -> None:
    """Gives a model its own attention back."""
    if (previous := getattr(model, _PREVIOUS, None)) is not None:
        step.uninstall(model)
        model.set_attn_implementation(previous)
        delattr(model, _PREVIOUS)
    reconstruct.remove(model)


def cache(model: PreTrainedModel, plan: str | Plan, pin: Iterable[int | range] = ()) -> KVCache:
    """A compressed cache for `model.generate(..., past_key_values=cache)` or `model(..., past_key_values=cache)`.

    Attaches kvfold's attention to the model if needed; the plan `transformers` detaches it, and gives transformers' own cache.

    Args:
        plan: a plan, its text, or the name of a strategy of the catalog.
        pin: tokens that the keep policy never lets go, by their position in their sequence (padding does not count): numbers,
            or ranges such as `range(0, 40)` for the 40 tokens of a system prompt. They count against the budget, and a layer
            grows beyond it rather than lose one. A plan that keeps everything keeps them anyway.

    Raises:
        PlanError: the plan can't be read, or does not suit this model.
        ModelError: the model's attention can't be served; the message says why.
    """
    from kvfold.catalog import resolve

    resolved = resolve(plan) if isinstance(plan, str) else plan
    pins = _pins(resolved, pin)
    if resolved.leaves_to_transformers:
        detach(model)
        return KVCache(resolved, DynamicCache(config=model.config).layers, fingerprint(model), pins)
    attach(model)
    if resolved.keep and resolved.keep.reconstructs:
        reconstruct.install(model)
    config = model.config.get_text_config(decoder=True)
    windows = sliding_windows(config)
    served = [i for i, window in enumerate(windows) if window is None]
    sites = [
        Site(
            head_dim=head_dim_of(config),
            dtype=model.dtype,
            num_kv_heads=config.num_key_value_heads,
            num_query_heads=config.num_attention_heads,
            layer=index,
            num_layers=len(served),
            model=ModelLayer(model, i),
        )
        for index, i in enumerate(served)
    ]
    compressed = iter(make_layers(resolved, sites, pins))
    layers: list[LayerCache | SlidingLayer] = []
    for window in windows:
        if window is not None:
            layers.append(SlidingLayer(window))
            continue
        layers.append(layer := next(compressed))
        _check_codec(layer, str(resolved), model.device)
    return KVCache(resolved, layers, fingerprint(model), pins)


def _pins(plan: Plan, pin: Iterable[int | range]) -> Pins:
    """What the user has pinned, as spans; PlanError where the plan can't hold them."""
    spans = [(p, p + 1) if isinstance(p, int) else (p.start, p.stop) for p in pin if isinstance(p, int) or len(p)]
    if any(isinstance(p, range) and p.step != 1 for p in pin) or any(start < 0 for start, _ in spans):
        raise PlanError("pin takes positions from 0 on, and ranges without a step: pin=[range(0, 40), 77]")
    pins = merge_spans(spans)
    if plan.keep is None or not pins:
        return pins
    if plan.keep.strict:
        raise PlanError(f"{plan.keep.name} shows each query its window only, so that nothing else can be pinned; use sink=…")
    limit = plan.keep.budget
    num_pinned = sum(end - max(start, plan.keep.sink) for start, end in pins if end > plan.keep.sink)
    if limit.unit == "tokens" and plan.keep.sink + num_pinned >= limit.value:
        raise PlanError(f"{num_pinned} pinned tokens and {plan.keep.sink} sinks leave nothing of a budget of {limit}")
    return pins


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What a saved cache must agree on with the model that goes on with it."""
    config = model.config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope": str(getattr(config, "rope_parameters", None)),
        "weights": _weights_mark(model),
    }


def _weights_mark(model: PreTrainedModel) -> str:
    """A hash of 16 numbers of every weight: fine-tunes and roundings of a model can't take each other's caches."""
    samples = [p.detach().flatten()[:: max(1, p.numel() // 16)][:16].float() for p in model.parameters() if p.numel()]
    return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:16]


def sliding_windows(config: Any) -> list[int | None]:
    """For each layer the size of its sliding window, or None where it attends to everything."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [window if t == "sliding_attention" else None for t in types]


# -- what can be served ------------------------------------------------------------------------------------------------------


def check_model(model: PreTrainedModel) -> None:
    """Raises ModelError when the model's attention is not one that kvfold computes."""
    why = _why_not(model)
    if why:
        raise ModelError(f"{type(model).__name__} can't be served: {why}")


def _why_not(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross attention, and kvfold serves decoders only"
    config = config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        return "its attention is latent (MLA), which caches no keys and values by head"
    if not getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", False):
        return _OWN_ATTENTION
    if getattr(config, "num_key_value_heads", None) is None:
        return "its configuration does not say how many KV heads it has"
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        return "its layers share keys and values, so that one layer's tokens are read by another after they were compressed"
    unknown = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}; kvfold knows full and sliding attention"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    attentions = [m for m in model.modules() if hasattr(m, "num_key_value_groups") and hasattr(m, "layer_idx")]
    if any(isinstance(getattr(m, "sinks", None), nn.Parameter) for m in attentions):
        return "its softmax has learned sinks"
    caps = [name for name in vars(config) if "softcap" in name and "final" not in name and getattr(config, name)]
    if any(name != "attn_logit_softcapping" for name in caps):
        return f"its scores are capped in a way that is not known here ({', '.join(caps)})"
    if head_dim_of(config) % 4:
        return f"its head dim {head_dim_of(config)} is not a multiple of 4, so that 2-bit codes don't fill bytes"
    return None


def _check_codec(layer: LayerCache, plan: str, device: torch.device) -> None:
    head_dim = layer.site.head_dim
    codec = layer.plan.store.codec(layer.site)
    probe = torch.zeros(1, codec.block, head_dim, device=device)
    try:
        codec.encode(probe, probe)
    except ValueError as error:
        raise PlanError(f"'{plan}' does not suit a head dim of {head_dim}: {error}") from error


# -- what transformers calls -------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: `query [B, Hq, Q, D]` to `[B, Q, Hq, D]`; key and value are handles or `[B, Hkv, S, D]`."""
    if kwargs.get("s_aux") is not None:
        raise ModelError("a softmax with learned sinks can't be served")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ModelError("a compressed cache takes a 2-D attention mask (batch, tokens), which says where padding is")
        if module.training:
            raise ModelError("a compressed cache serves inference, no gradients pass through it: call model.eval() first")
        given = (key, query, attention_mask, scaling, softcap, kwargs.get("position_ids"))
        if not torch.is_grad_enabled():
            return key.layer.attend(*given), None
        with torch.no_grad():
            return key.layer.attend(*given), None
    return _plain(query, key, value, attention_mask, scaling, softcap), None


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float, softcap: float | None
) -> torch.Tensor:
    """Attention over plain tensors, `mask [B, 1, Q, S] bool` or additive."""
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    scores = (q * scaling) @ k.repeat_interleave(groups, 1).mT
    scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (p @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask function: a layer of kvfold's gets the padding mask as it is, any other the mask of SDPA, written out."""
    if isinstance(kwargs.get("kv_length"), SeenLength):
        if kwargs.get("use_vmap"):
            raise ModelError("this input asks for a mask that is not causal, which a compressed cache can't apply")
        padding: torch.Tensor | None = kwargs.get("attention_mask")
        return padding
    result: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return result
