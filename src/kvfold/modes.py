"""What a cache holds does not depend on the mode that it was filled in, and outlives it."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])

_DEVICES = ("cpu", "cuda")


def in_normal_mode(method: Method) -> Method:
    """Leaves `torch.inference_mode` and `torch.autocast` for as long as a method runs that makes or writes tensors of a cache.

    A tensor that is made in the first can never be written to outside of it, nor in another thread: a cache that was prefilled
    there could not go on in `generate`, which runs under `no_grad`. In the second, rotations and products that are meant in
    float32 would be rounded.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        infers = torch.is_inference_mode_enabled()
        if not (infers or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return method(*args, **kwargs)
        with ExitStack() as modes:
            if infers:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for device in filter(torch.is_autocast_enabled, _DEVICES):
                modes.enter_context(torch.autocast(device, enabled=False))
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]
