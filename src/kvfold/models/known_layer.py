"""The structure of a decoder layer, as compiled code takes it: its parts, where their weights lie, and whether that stands.

A layer is taken for what its submodules say: Llama's, with Qwen3's norms of queries and keys or Gemma's four norms.
"""

from typing import Any

import torch
from torch import nn

from kvfold.kernels.cpu import step
from kvfold.models.watch import Watch
from kvfold.models.weights import PackedLinear

LINEARS = (
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


class UnknownLayerError(Exception):
    """A layer is not of a structure that is known here."""


class CurrentLinear:
    """A linear layer as the compiled code sees it, for as long as its weight stays where it is."""

    def __init__(self, module: nn.Module):
        if type(module) is nn.Linear:
            self.tensor = module.weight
            self.view = step.dense_weight(module.weight.detach(), module.bias)
        elif type(module) is PackedLinear:
            self.tensor, self.view = module.packed, module.weight_view()
        else:
            raise UnknownLayerError(f"{type(module).__name__} is no linear layer")
        self.module, self.address = module, self.tensor.data_ptr()

    def stands(self) -> bool:
        return self.tensor.data_ptr() == self.address


class KnownLayer:
    """A decoder layer whose parts are known: what the compiled code was made of, and whether that is still so.

    Attributes:
        native: the layer as the compiled code sees it.
        attention: its attention module, the layer `index` of the model.
        config: the model's.
        linears: its linear layers, in the order of LINEARS.
        watch: over all of its parts.
    """

    def __init__(self, layer: nn.Module):
        if not all(p.is_cpu for p in layer.parameters()):
            raise UnknownLayerError("its weights are not in the host's memory")
        self.attention = _child(layer, "self_attn")
        self.index = int(_known(self.attention, "layer_idx"))
        mlp = _child(layer, "mlp")
        owners = {"self_attn": self.attention, "mlp": mlp}
        self.linears = [_child(owners[owner], name) for owner, name in LINEARS]
        current = [CurrentLinear(linear) for linear in self.linears]
        views = tuple(linear.view for linear in current)
        head_dim = int(_known(self.attention, "head_dim"))
        hidden = views[3].rows
        norm = {name: child for name, child in layer.named_children() if name.endswith("layernorm")}
        of_heads = [getattr(self.attention, name, None) for name in ("q_norm", "k_norm")]
        before_mlp = "post_attention_layernorm"
        after_attention = after_mlp = None
        if "pre_feedforward_layernorm" in norm:  # Gemma 2 and 3
            before_mlp, after_attention, after_mlp = "pre_feedforward_layernorm", before_mlp, "post_feedforward_layernorm"
        names = ("input_layernorm", before_mlp, after_attention, after_mlp)
        used = [name for name in names if name]
        if sorted(used) != sorted(norm) or {name for name, _ in layer.named_children()} - {"self_attn", "mlp", *norm}:
            raise UnknownLayerError("other parts than those of a Llama or Gemma layer")
        self.config = config = _known(self.attention, "config")
        activation = _ACTIVATIONS.get(str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)))
        dtype: Any = norm["input_layernorm"].weight.dtype
        if activation is None or not step.supports(dtype):
            raise UnknownLayerError(f"an activation or a type that is not known: {config.model_type}")
        kinds = (
            (norm["input_layernorm"], hidden),
            (of_heads[0], head_dim),
            (of_heads[1], head_dim),
            (norm.get(after_attention or ""), hidden),
            (norm[before_mlp], hidden),
            (norm.get(after_mlp or ""), hidden),
        )
        norms = tuple(_norm(module, size) for module, size in kinds)
        heads = views[0].rows // head_dim, views[1].rows // head_dim
        try:
            self.native = step.DecoderLayer(views, norms, *heads, head_dim, activation, dtype)
        except ValueError as error:
            raise UnknownLayerError(str(error)) from error
        used_norms = [module for module, _ in kinds if module is not None]
        self._norm_weights = [module.weight for module in used_norms]
        self._versions = [weight._version for weight in self._norm_weights]
        places: list[tuple[dict[str, Any], str]] = [(owners[owner]._modules, name) for owner, name in LINEARS]
        places += [(c.module._parameters, "weight" if "weight" in c.module._parameters else "packed") for c in current]
        places += [(module._parameters, "weight") for module in used_norms]
        heard = [self.attention, mlp, *self.attention.children(), *mlp.children(), *norm.values()]
        self.watch = Watch(places, [linear.tensor for linear in current], heard)

    def stands(self) -> bool:
        """Whether all parts, their weights and their memory are what they were. Called for each layer and token: kept cheap."""
        return self.watch.stands() and [weight._version for weight in self._norm_weights] == self._versions


def _norm(module: nn.Module | None, size: int) -> step.Norm:
    """An RMS norm's factors, found by giving it ones: families write them as w or as 1 + w."""
    if module is None:
        return step.norm(None, 0.0)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        raise UnknownLayerError(f"{type(module).__name__} is no RMS norm")
    with torch.no_grad():
        weight = module(torch.ones(1, size)).float().flatten() * (1 + eps) ** 0.5
    return step.norm(weight.contiguous(), float(eps))


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise UnknownLayerError(f"no {name}")
    return child


def _known(module: nn.Module, name: str) -> Any:
    value = getattr(module, name, None)
    if value is None:
        raise UnknownLayerError(f"no {name}")
    return value
