"""Whether a model is still what something was made of: its parts, their memory, and nobody who listens to them."""

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import nn


class Watch:
    """What lies at places of modules, such as `(mlp._modules, "gate_proj")`; asked at every token, and so kept cheap.

    Args:
        places: dictionaries of modules, and names in them.
        tensors: whose memory must stay where it is.
        heard: modules whose forward hooks would not be called.
    """

    def __init__(
        self, places: Iterable[tuple[dict[str, Any], str]], tensors: Iterable[torch.Tensor], heard: Iterable[nn.Module]
    ):
        self._places = list(places)
        self._parts = [parts.get(name) for parts, name in self._places]
        self._tensors = list(tensors)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._hooks = [hooks for module in heard for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    @staticmethod
    def of(model: nn.Module) -> "Watch":
        """All parts of a model."""
        modules = list(model.modules())
        places = [(held, name) for m in modules for held in (m._modules, m._parameters) for name in held]
        return Watch(places, model.parameters(), modules)

    def stands(self) -> bool:
        """Whether all parts and their memory are what they were."""
        same = all(map(is_, [parts.get(name) for parts, name in self._places], self._parts))
        return same and [tensor.data_ptr() for tensor in self._tensors] == self._addresses

    def heard(self) -> bool:
        """Whether someone listens to a module."""
        return any(self._hooks)
