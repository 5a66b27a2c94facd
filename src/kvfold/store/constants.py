"""Tables that codecs look things up in, on the device where they are needed."""

import functools
from collections.abc import Callable, Hashable

import torch


@functools.cache
def sent(device: torch.device, make: Callable[..., torch.Tensor], *of: Hashable) -> torch.Tensor:
    """`make(*of)` on a device, copied there once: a copy from the host at every step would wait for the device, and a step
    with one in it can't be captured."""
    return make(*of).to(device)


def vector(numbers: tuple[float, ...]) -> torch.Tensor:
    """`[n] float32`."""
    return torch.tensor(numbers)
