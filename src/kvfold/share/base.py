"""What a sharing stage is: groups of layers that hold one cache together."""

from abc import ABC, abstractmethod
from typing import ClassVar

from kvfold.errors import PlanError
from kvfold.percent import Percent


class Sharing(ABC):
    """The share stage of a plan. Subclasses are frozen dataclasses; their fields are the plan's arguments.

    `start` says where in the stack of layers sharing begins.
    """

    name: ClassVar[str]
    merges: ClassVar[bool]
    """Whether a group's tokens are made of all of its layers' (else they are the first layer's)."""
    start: Percent

    @property
    @abstractmethod
    def size(self) -> int:
        """Layers a group."""

    def groups(self, num_layers: int, alone: set[int]) -> list[tuple[int, ...]]:
        """Neighbouring layers from `start` on, `size` at a time, without those of `alone`; what is left over stays alone."""
        groups = []
        first = int(self.start.value * num_layers)
        while first + self.size <= num_layers:
            group = tuple(range(first, first + self.size))
            if alone.isdisjoint(group):
                groups.append(group)
                first += self.size
            else:
                first = max(alone.intersection(group)) + 1
        return groups

    def check(self) -> None:
        """Raises PlanError when the arguments can't work together."""
        if self.start.value >= 1:
            raise PlanError(f"{self.name}: start={self.start} leaves no layer to share")
