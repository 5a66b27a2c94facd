"""What a cache holds must outlive the mode that it was filled in."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def in_normal_mode(method: Method) -> Method:
    """Leaves `torch.inference_mode` for as long as a method runs that makes or writes tensors of a cache.

    A tensor that is made under it can never be written to outside of it, nor in another thread: a cache that was prefilled
    there could not go on in `generate`, which runs under `no_grad`.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]
