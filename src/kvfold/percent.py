"""Shares of something, as plans write them."""

import math
import re
from dataclasses import dataclass

from kvfold.errors import PlanError

PERCENT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)%")


@dataclass(frozen=True)
class Percent:
    """A share of something that a method names: `1%`."""

    value: float

    @staticmethod
    def parse(text: str) -> "Percent":
        """Reads `1%` or `0.5%`. Raises PlanError for anything else, and for more than 100%."""
        match = PERCENT.fullmatch(text.strip())
        if not match or float(match[1]) > 100:
            raise PlanError(f"'{text}' is not a share from 0% to 100%: write one as in 1%")
        return Percent(float(match[1]) / 100)

    def of(self, count: int) -> int:
        """That share of `count`, rounded up: 1% of 64 is 1, and 0% is nothing."""
        return math.ceil(self.value * count - 1e-9)

    def __str__(self) -> str:
        return f"{self.value * 100:g}%"
