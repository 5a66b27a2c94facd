"""A model's decode step as a CUDA graph.

In eager transformers a token takes some hundreds of launches, each of which costs the host more time than the device needs
for it. `install` gives a model on a GPU another `forward`, which for one token a sequence replays a captured graph of the
model's own forward, with attention to the compressed cache in it (kvfold.static_tail says how a layer's step can be always
the same). A graph belongs to one cache; it is captured anew when memory has moved.

Nothing is assumed: before a graph is used, the same token is computed by its operations one by one, and both must agree.
Where a step can't be captured the model's own forward runs, and `describe` says why. KVFOLD_GRAPH=off turns it off.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfold.errors import KvfoldError
from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache
from kvfold.models.watch import Watch
from kvfold.sliding_layer import Ring, SlidingLayer
from kvfold.static_tail import StaticTail
from kvfold.static_turnover import StaticTurnover

VARIABLE = "KVFOLD_GRAPH"
_TOLERANCE = 1e-2
"""How far a replay may be from the same operations one by one, as a share of the largest logit: they are deterministic, but
libraries may choose other kernels while a graph is captured."""
_PAUSE = 64
"""Tokens without a graph after one that could not be captured."""
_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "return_dict"}
_KNOWN |= {"logits_to_keep"}  # of one token all are kept


class GraphError(KvfoldError):
    """KVFOLD_GRAPH says what is not known."""


def enabled() -> bool:
    """Whether decode steps are captured at all."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "off"):
        raise GraphError(f"{VARIABLE}={wanted}: it may be 'off'")
    return wanted != "off"


def install(model: PreTrainedModel) -> None:
    """Gives a model on a GPU a `forward` that replays its decode steps, unless someone else has given it one."""
    if model.device.type == "cuda" and "forward" not in vars(model):
        model.forward = GraphedForward(model)


def uninstall(model: PreTrainedModel) -> None:
    """Gives a model its own forward back."""
    if isinstance(vars(model).get("forward"), GraphedForward):
        del model.forward


def describe(model: PreTrainedModel) -> str | None:
    """`cuda-graph`, or `transformers` and why the last decode step was none; None where no graphs are used."""
    forward = vars(model).get("forward")
    if not isinstance(forward, GraphedForward):
        return None
    return "cuda-graph" if forward.why is None else f"transformers, without a graph: {forward.why}"


class GraphedForward:
    """The `forward` of a model.

    Attributes:
        why: why the last decode step was not replayed; None where it was.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.why: str | None = "no token has been decoded yet"
        self._padding: torch.Tensor | None = None
        self._steps: WeakKeyDictionary[KVCache, _Step] = WeakKeyDictionary()
        functools.update_wrapper(self, type(model).forward)
        self.__signature__ = inspect.signature(functools.partial(type(model).forward, model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        ids = args[0] if len(args) == 1 else kwargs.get("input_ids")
        if len(args) < 2 and isinstance(cache, KVCache) and ids is not None and ids.shape[1] == 1 and cache.get_seq_length():
            self.why = self._why_not(ids, kwargs)
            if self.why is None:
                if cache not in self._steps:
                    self._steps[cache] = _Step(self.model)
                step = self._steps[cache]
                logits = step(cache, ids, kwargs.get("position_ids"), self._padding)
                self.why = step.why
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _why_not(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
        """Why this call can't be replayed, before anyone looks at the cache."""
        if not enabled():
            return f"{VARIABLE} is off"
        if torch.is_grad_enabled():
            return "gradients are on"
        if ids.device.type != "cuda" or ids.device != self.model.device:
            return "the tokens are not on the model's GPU"
        if others := {name for name, value in kwargs.items() if value is not None and value is not False} - _KNOWN:
            return f"{', '.join(sorted(others))} asked for"
        if kwargs.get("return_dict") is False or kwargs.get("use_cache") is False:
            return "an output without a cache, or as a tuple, was asked for"
        mask = kwargs.get("attention_mask")
        self._padding = mask if mask is not None and (mask.dim() != 2 or not bool(mask.all())) else None
        if self._padding is not None and (self._padding.dim() != 2 or not bool(self._padding[:, -1].all())):
            return "the newest token is padding"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_steps": WeakKeyDictionary()}


class _Step:
    """The decode step of one cache.

    Attributes:
        why: why the last token was not replayed; None where it was.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._watch = model, Watch.of(model)
        self._graph: Any = None
        self._mark: Any = None
        self._retry_at = 0
        self.why: str | None = None

    def __call__(
        self, cache: KVCache, ids: torch.Tensor, positions: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The logits `[B, 1, V]` of one more token of each sequence, `ids [B, 1]`; None where it can't be replayed."""
        with torch.cuda.device(ids.device):
            return self._step(cache, ids, positions, padding)

    def _step(
        self, cache: KVCache, ids: torch.Tensor, positions: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        seen = cache.get_seq_length()
        if seen < self._retry_at:
            return None
        tails: list[StaticTail | StaticTurnover | Ring] = []
        for layer in cache.layers:
            known = isinstance(layer, (LayerCache, SlidingLayer))
            tail = layer.static_tail(padding) if known else "a layer is not kvfold's"
            if isinstance(tail, str):
                self.why = tail
                return None
            tails.append(tail)
        if not self._watch.stands():
            self._watch, self._mark = Watch.of(self._model), None
        if self._watch.heard():
            self.why = "someone listens to a part of the model"
            return None
        mark = [tail.mark for tail in tails], len(ids)
        if self._mark != mark:
            self._graph = None  # its memory is free before the next one is captured
            self._ids = torch.zeros_like(ids)
            self._positions = torch.zeros_like(ids)
        self._ids.copy_(ids)
        if positions is None:
            self._positions.fill_(seen)
        else:
            self._positions.copy_(positions.expand_as(ids))
        if self._mark != mark:
            self._mark = None
            try:
                self._capture(cache, tails)
            except RuntimeError as error:
                self.why, self._retry_at = f"the step can't be captured: {str(error).splitlines()[0]}", seen + _PAUSE
                return None
            self._mark = mark
        else:
            self._graph.replay()
        for layer in cache.layers:
            layer.took_statically()
        self.why = None
        return self._logits.clone()

    def _capture(self, cache: KVCache, tails: list[StaticTail | StaticTurnover | Ring]) -> None:
        """Makes the graph, and replays it once."""
        stream = torch.cuda.Stream()
        before = [tail.remember() for tail in tails]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), _steps_of(cache):  # one by one: compiles kernels; a replay must come to the same
                wanted = self._logits_of(cache)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            _put_back(before)
        graph = torch.cuda.CUDAGraph()
        with _steps_of(cache), torch.cuda.graph(graph):
            self._logits = self._logits_of(cache)
        graph.replay()
        error, largest = (self._logits - wanted).abs().max(), wanted.abs().max()
        if not bool(error <= _TOLERANCE * largest):
            _put_back(before)
            raise RuntimeError(f"a replay differs from its operations one by one by {float(error):.2g}")
        self._graph = graph

    def _logits_of(self, cache: KVCache) -> torch.Tensor:
        output = type(self._model).forward(
            self._model, input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True
        )
        logits: torch.Tensor = output.logits
        return logits


def _put_back(before: list[Callable[[], None]]) -> None:
    for put in before:
        put()


@contextmanager
def _steps_of(cache: KVCache) -> Iterator[None]:
    """Within it layers take a token as a static step does, and the host counts none."""
    before = [layer.num_seen for layer in cache.layers]
    for layer in cache.layers:
        layer.steps_statically = True
    try:
        yield
    finally:
        for layer, num_seen in zip(cache.layers, before, strict=True):
            layer.steps_statically, layer.num_seen = False, num_seen
