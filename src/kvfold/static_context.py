"""What a keep policy sees of a step that is captured: tensors, and no number that a replay would find changed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch

from kvfold.eviction import Eviction
from kvfold.keep.base import KeepContext, Tokens


@dataclass(frozen=True)
class Now:
    """The numbers of a step, `[1] long` each.

    Attributes:
        place: of the run, where the token goes.
        slot: the token's own.
        goes: 1 where a token has to go.
        first_recent: the slot from which on tokens are recent, once it has come.
        gone: tokens between the sinks and the others that are no longer there.
        seen: tokens that its query sees.
    """

    place: torch.Tensor
    slot: torch.Tensor
    goes: torch.Tensor
    first_recent: torch.Tensor
    gone: torch.Tensor
    seen: torch.Tensor


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError("the policy asks for numbers that only the device knows")


class _Unknown:
    """Numbers that a captured step can't have on the host: whoever asks for one gets a RuntimeError."""

    __getattr__ = __iter__ = __len__ = __getitem__ = _refuse


class OnDevice(KeepContext):
    """What a policy may look at in a step that is captured: the numbers of the moment are on the device."""

    _now: Now
    _is_aligned: bool

    def __init__(self, held: Tokens, now: Now, state: dict[str, torch.Tensor], eviction: Eviction, aligned: bool):
        unknown: Any = _Unknown()
        site = eviction.site
        super().__init__(
            held, unknown, unknown, unknown, unknown, eviction.num_heads, site.layer, eviction.num_sinks, state, eviction.rope
        )
        object.__setattr__(self, "_now", now)
        object.__setattr__(self, "_is_aligned", aligned)

    @cached_property
    def positions(self) -> torch.Tensor:
        return self.slots

    @cached_property
    def num_real(self) -> torch.Tensor:
        return (self._now.slot + 1).expand(len(self.slots))

    @cached_property
    def num_new(self) -> torch.Tensor:
        return torch.ones_like(self.num_real)

    @cached_property
    def over(self) -> torch.Tensor:
        return self._now.goes.bool().expand(len(self.slots))

    @cached_property
    def empty_places(self) -> bool:
        return True

    @cached_property
    def aligned(self) -> bool:
        return self._is_aligned

    def fade(self, window: int) -> float:
        return max(0.0, 1 - 1 / window)
