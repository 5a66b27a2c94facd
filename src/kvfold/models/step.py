"""Decoder layers that are compiled around their attention.

Eager transformers takes some twenty small operations a layer. For a few tokens each of them costs more in Python and dispatch
than in arithmetic; for many it reads and writes them all once more. `install` therefore gives a decoder layer another
`forward`:

    norm → q, k, v → positions   |   cache.update → attention   |   o → residual → norm → MLP → residual

For up to 8 tokens at once the first and the last part are one call in C++ each (kvfold.kernels.cpu.step), and all three where
the next token of every sequence goes into a `kvfold.tail`. For more, as in a prompt, torch multiplies, and what lies between
two products is one call (kvfold.kernels.cpu.chunk). A layer whose structure is not known keeps its own forward.

Nothing is assumed of a family: a layer is taken for what its submodules say (known_layer.py), and then *tried*: all ways
compute the step of a random vector, and queries, keys, values and output must agree. A layer that differs stays as it is.
`describe` says how many layers are compiled. Inside a layer activations are float32, where the model's own code rounds after
each operation; before and after the products of many tokens they have the model's type.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kvfold.handle import Handle
from kvfold.kernels import cpu
from kvfold.kernels.cpu import chunk, step
from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache
from kvfold.models import graph
from kvfold.models.known_layer import CurrentLinear, KnownLayer, UnknownLayerError
from kvfold.modes import in_normal_mode
from kvfold.sliding_layer import SlidingLayer

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far two ways may differ, as a share of the norm: the model's own rounding."""


@in_normal_mode
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


class CompiledLinear:
    """The `forward` of a linear layer, compiled for a few vectors."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self._current: CurrentLinear | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        few = x.numel() <= step.MOST_VECTORS * linear.in_features
        if not few or torch.is_grad_enabled() or not x.is_cpu or x.dtype != linear.weight.dtype or not step.usable():
            return type(linear).forward(linear, x)
        if self._current is None or self._current.tensor is not linear.weight or not self._current.stands():
            self._current = CurrentLinear(linear)
        return step.linear(self._current.view, x)

    def __getstate__(self) -> dict[str, Any]:
        return {"linear": self.linear, "_current": None}


class _Given(NamedTuple):
    """What a layer gets beside its hidden states."""

    positions: tuple[torch.Tensor, torch.Tensor]
    cache: Any
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


class CompiledLayer:
    """The `forward` of a decoder layer."""

    def __init__(self, layer: nn.Module, name: str, attention: Any):
        self.layer, self.attention, self.name = layer, attention, name
        self.scaling, self.softcap = 1.0, None
        self._built: KnownLayer | None = None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if args or cache is None or positions is None or not self._takes(hidden_states):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        few = hidden_states.shape[0] * hidden_states.shape[1] <= step.MOST_VECTORS
        given = _Given(positions, cache, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return (self._step if few else self._chunk)(hidden_states.contiguous(), given)

    def _step(self, hidden: torch.Tensor, given: _Given) -> torch.Tensor:
        built = self._built
        assert built is not None
        native, positions, mask = built.native, given.positions, given.mask
        layer = given.cache.layers[built.index] if isinstance(given.cache, KVCache) else None
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
        attended = self._attend(q, k, v, given)
        return native.after_attention(hidden, attended.float().contiguous())

    def _chunk(self, hidden: torch.Tensor, given: _Given) -> torch.Tensor:
        built = self._built
        assert built is not None
        native = built.native
        before, of_q, of_k, after_attention, before_mlp, after_mlp = native.norms
        to_q, to_k, to_v, to_o, to_gate, to_up, to_down = built.linears
        x = chunk.normalize(before, hidden)
        q = chunk.place(of_q, to_q(x), native.head_dim, given.positions)
        k = chunk.place(of_k, to_k(x), native.head_dim, given.positions)
        v = chunk.place(None, to_v(x), native.head_dim)
        attended = self._attend(q, k, v, given).reshape(*hidden.shape[:2], -1)
        hidden, x = chunk.add(after_attention, hidden, to_o(attended), before_mlp)
        inner = chunk.gated(native.activation, to_gate(x), to_up(x))
        return chunk.add(after_mlp, hidden, to_down(inner))[0]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: _Given) -> torch.Tensor:
        """`[B, Q, Hq, D]`; q, k, v are `[B, heads, Q, D]`."""
        assert self._built is not None
        key, value = given.cache.update(k, v, self._built.index)
        if not isinstance(key, Handle):
            q = q.to(key.dtype)
        attended, _ = self.attention(
            self._built.attention,
            q,
            key,
            value,
            given.mask,
            scaling=self.scaling,
            softcap=self.softcap,
            position_ids=given.position_ids,
        )
        return attended

    def _takes(self, hidden: torch.Tensor) -> bool:
        """Whether these tokens can be compiled, with the layer as it is now."""
        if not hidden.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if not step.usable():
            return False
        if self._built is None or not self._built.stands():
            try:
                self._built = KnownLayer(self.layer)
            except UnknownLayerError:
                self._built = None
                return False
        built = self._built
        return hidden.dtype == built.native.dtype and built.config._attn_implementation == self.name and not built.watch.heard()

    def agrees(self) -> bool:
        """Tries the compiled step against the layer's own, on random numbers; takes over scaling and cap of the scores."""
        layer = self.layer
        try:
            built = self._built = KnownLayer(layer)
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
            by_step = self._step(hidden, _Given(positions, ours))
            by_chunk = self._chunk(hidden, _Given(positions, ours))
        pairs = [
            *zip(ours.seen, theirs.seen * 2, strict=True),
            *((got - hidden, wanted - hidden) for got in (by_step, by_chunk)),
        ]
        tolerance = _TOLERANCE[native.dtype]
        return all(_near(a, b, tolerance) for a, b in pairs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_built": None}


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
