"""Decoder layers whose few-token step is compiled: everything around the attention in two native calls.

Eager transformers takes some twenty small operations a layer, each of which costs more in Python and dispatch than in
arithmetic. For up to 8 tokens at once, `install` therefore gives a decoder layer another `forward`, which does

    norm → q, k, v → positions   |   cache.update → attention   |   o → residual → norm → MLP → residual

with the first and the last part in C++ (kvfold.kernels.cpu.step), and all three where the next token of every sequence goes
into a `kvfold.tail`. All else, such as a prompt, goes through the layer's own forward; so does every layer whose structure is
not known.

Nothing is assumed of a family: a layer is taken for what its submodules say (Llama's, with Qwen3's norms of queries and keys
or Gemma's four norms), and then *tried*: both ways compute the step of a random vector, and queries, keys, values and output
must agree. A layer that differs stays as it is. `describe` says how many layers are compiled. Inside a layer activations are
float32, where the model's own code rounds after each operation.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvfold.handle import Handle
from kvfold.kernels import cpu
from kvfold.kernels.cpu import step
from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache
from kvfold.models import graph
from kvfold.models.watch import Watch
from kvfold.models.weights import PackedLinear
from kvfold.sliding_layer import SlidingLayer

_LINEARS = (
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far both ways may differ, as a share of the norm: the model's own rounding."""


class UnknownLayerError(Exception):
    """A layer is not of a structure that is known here."""


def install(model: PreTrainedModel, name: str, attention: Any) -> None:
    """Compiles the step of the decoder layers and of the head that are known.

    Args:
        name, attention: kvfold's attention function, and the name by which the model uses it already. A model that is given
            another one later runs its own code again.
    """
    graph.install(model)
    if not step.usable():
        return
    for layer in getattr(model.get_decoder(), "layers", []):
        if "forward" not in vars(layer):
            compiled = CompiledLayer(layer, name, attention)
            if compiled.agrees():
                layer.forward = compiled
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and "forward" not in vars(head) and head.weight.is_cpu and step.supports(head.weight.dtype):
        head.forward = CompiledLinear(head)  # type: ignore[method-assign, assignment]


def uninstall(model: PreTrainedModel) -> None:
    """Gives model, layers and head their own forward back."""
    graph.uninstall(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), CompiledLayer | CompiledLinear):
            del module.forward


def describe(model: PreTrainedModel) -> str:
    """What runs a decode step: `cpu-avx512`, `cpu-avx512 in 20 of 24 layers`, `cuda-graph`, or `transformers` (and why)."""
    if captured := graph.describe(model):
        return captured
    layers = list(getattr(model.get_decoder(), "layers", []))
    count = sum(isinstance(vars(layer).get("forward"), CompiledLayer) for layer in layers)
    if not count or not step.usable():
        return "transformers"
    return f"cpu-{cpu.chosen()}" + ("" if count == len(layers) else f" in {count} of {len(layers)} layers")


class _Current:
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


class CompiledLinear:
    """The `forward` of a linear layer, compiled for a few vectors."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self._current: _Current | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        few = x.numel() <= step.MOST_VECTORS * linear.in_features
        if not few or torch.is_grad_enabled() or not x.is_cpu or x.dtype != linear.weight.dtype or not step.usable():
            return type(linear).forward(linear, x)
        if self._current is None or self._current.tensor is not linear.weight or not self._current.stands():
            self._current = _Current(linear)
        return step.linear(self._current.view, x)

    def __getstate__(self) -> dict[str, Any]:
        return {"linear": self.linear, "_current": None}


class CompiledLayer:
    """The `forward` of a decoder layer."""

    def __init__(self, layer: nn.Module, name: str, attention: Any):
        self.layer, self.attention, self.name = layer, attention, name
        self.scaling, self.softcap = 1.0, None
        self._built: _Built | None = None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if args or cache is None or positions is None or not self._takes(hidden_states):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        return self._step(hidden_states, positions, kwargs.get("attention_mask"), cache, kwargs.get("position_ids"))

    def _step(
        self,
        hidden: torch.Tensor,
        positions: Any,
        mask: torch.Tensor | None,
        cache: Any,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        built = self._built
        assert built is not None
        native = built.native
        layer = cache.layers[built.index] if isinstance(cache, KVCache) else None
        known = isinstance(layer, (LayerCache, SlidingLayer)) and layer.batch_size == len(hidden)
        if known and hidden.shape[1] == 1 and (mask is None or _newest_are_real(mask)):
            assert layer is not None
            tail = layer.tail()
            if tail is not None:
                out = native.step(tail.native, hidden, positions[0], positions[1], self.scaling, self.softcap)
                layer.took(tail)
                return out
            turnover = layer.turnover(mask)
            if turnover is not None:
                out = turnover.step(step.Token(native, hidden, positions, self.scaling, self.softcap, layer.num_seen))
                layer.came(turnover)
                return out
        q, k, v = native.before_attention(hidden, positions[0], positions[1])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        key, value = cache.update(k, v, built.index)
        if not isinstance(key, Handle):
            q = q.to(key.dtype)
        attended, _ = self.attention(
            built.module, q, key, value, mask, scaling=self.scaling, softcap=self.softcap, position_ids=position_ids
        )
        return native.after_attention(hidden, attended.float().contiguous())

    def _takes(self, hidden: torch.Tensor) -> bool:
        """Whether these tokens can be compiled, with the layer as it is now."""
        if hidden.shape[0] * hidden.shape[1] > step.MOST_VECTORS or not hidden.is_cpu or torch.is_grad_enabled():
            return False
        if not step.usable():
            return False
        if self._built is None or not self._built.stands():
            try:
                self._built = _Built(self.layer)
            except UnknownLayerError:
                self._built = None
                return False
        built = self._built
        return hidden.dtype == built.native.dtype and built.config._attn_implementation == self.name and not built.watch.heard()

    def agrees(self) -> bool:
        """Tries the compiled step against the layer's own, on random numbers; takes over scaling and cap of the scores."""
        layer = self.layer
        try:
            built = self._built = _Built(layer)
        except UnknownLayerError:
            return False
        native = built.native
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        hidden = random(2, 1, native.hidden).to(native.dtype)
        angle = 3 * random(2, 1, native.head_dim // 2).repeat(1, 1, 2)
        positions = angle.cos().to(native.dtype), angle.sin().to(native.dtype)
        attended = random(2, 1, native.q_size // native.head_dim, native.head_dim)
        with torch.no_grad():
            theirs, ours = _Probe(attended), _Probe(attended)
            try:
                wanted = type(layer).forward(
                    layer, hidden, position_embeddings=positions, attention_mask=None, past_key_values=theirs
                )
            except Exception:  # a layer that wants other arguments is not one that is known here
                return False
            if not theirs.seen or not isinstance(wanted, torch.Tensor):
                return False
            self.scaling, self.softcap = theirs.scaling, theirs.softcap
            got = self._step(hidden, positions, None, ours)
        pairs = [*zip(ours.seen, theirs.seen, strict=True), (got - hidden, wanted - hidden)]
        tolerance = _TOLERANCE[native.dtype]
        return all(_near(a, b, tolerance) for a, b in pairs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_built": None}


class _Built:
    """What the compiled code was made of, and whether that is still so."""

    def __init__(self, layer: nn.Module):
        if not all(p.is_cpu for p in layer.parameters()):
            raise UnknownLayerError("its weights are not in the host's memory")
        self.module = _child(layer, "self_attn")
        self.index = int(_known(self.module, "layer_idx"))
        mlp = _child(layer, "mlp")
        owners = {"self_attn": self.module, "mlp": mlp}
        linears = [_Current(_child(owners[owner], name)) for owner, name in _LINEARS]
        views = tuple(current.view for current in linears)
        head_dim = int(_known(self.module, "head_dim"))
        hidden = views[3].rows
        norm = {name: child for name, child in layer.named_children() if name.endswith("layernorm")}
        of_heads = [getattr(self.module, name, None) for name in ("q_norm", "k_norm")]
        before_mlp = "post_attention_layernorm"
        after_attention = after_mlp = None
        if "pre_feedforward_layernorm" in norm:  # Gemma 2 and 3
            before_mlp, after_attention, after_mlp = "pre_feedforward_layernorm", before_mlp, "post_feedforward_layernorm"
        names = ("input_layernorm", before_mlp, after_attention, after_mlp)
        used = [name for name in names if name]
        if sorted(used) != sorted(norm) or {name for name, _ in layer.named_children()} - {"self_attn", "mlp", *norm}:
            raise UnknownLayerError("other parts than those of a Llama or Gemma layer")
        config = self.config = _known(self.module, "config")
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
        places: list[tuple[dict[str, Any], str]] = [(owners[owner]._modules, name) for owner, name in _LINEARS]
        places += [(c.module._parameters, "weight" if "weight" in c.module._parameters else "packed") for c in linears]
        places += [(module._parameters, "weight") for module in used_norms]
        heard = [self.module, mlp, *self.module.children(), *mlp.children(), *norm.values()]
        self.watch = Watch(places, [current.tensor for current in linears], heard)

    def stands(self) -> bool:
        """Whether all parts, their weights and their memory are what they were. Called for each layer and token: kept cheap."""
        return self.watch.stands() and [weight._version for weight in self._norm_weights] == self._versions


class _Probe:
    """A cache and its layer that write down what reaches them, and answer with given numbers."""

    def __init__(self, attended: torch.Tensor):
        self.attended = attended
        self.seen: list[torch.Tensor] = []
        self.scaling, self.softcap = 1.0, None

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[Handle, Handle]:
        self.seen += [k, v]
        handle = Handle(self, k, v)  # type: ignore[arg-type]
        return handle, handle

    def attend(self, _: Handle, q: torch.Tensor, padding: Any, scaling: float, softcap: Any, positions: Any) -> torch.Tensor:
        self.seen.append(q)
        self.scaling, self.softcap = scaling, softcap
        return self.attended.to(q.dtype)


def _newest_are_real(mask: torch.Tensor) -> bool:
    """Whether a padding mask, `[B, seen]`, hides none of the newest tokens."""
    return mask.dim() == 2 and bool(mask[:, -1].all())


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


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
