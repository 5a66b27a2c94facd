"""What a keep policy is: a number for each token. The cache does the rest.

After every chunk (a decode step is a chunk of one) a layer has more tokens than the budget allows. Pinned tokens
stay: the first `sink`, and the last `recent`. Of the others the highest ranks stay, and the rest is gone: its memory
is overwritten by the next tokens.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvfold.budget import WHOLE, Budget, HeadSplit
from kvfold.errors import PlanError
from kvfold.percent import PERCENT

GroupReduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Share:
    """A part of a budget: tokens (`32`), or a share of it (`50%`)."""

    value: float
    is_share: bool

    @staticmethod
    def parse(text: str) -> "Share":
        if (match := PERCENT.fullmatch(text)) and float(match[1]) <= 100:
            return Share(float(match[1]) / 100, True)
        if WHOLE.fullmatch(text):
            return Share(int(text), False)
        raise PlanError(f"'{text}' is neither a number of tokens (32) nor a share of the budget (50%)")

    def tokens(self, budget: int) -> int:
        return int(self.value * budget) if self.is_share else int(self.value)

    def __str__(self) -> str:
        return f"{self.value * 100:g}%" if self.is_share else f"{self.value:g}"


NO_TOKENS = Share(0, False)
HALF = Share(0.5, True)


@dataclass(frozen=True)
class KeepContext:
    """What a policy may look at when it ranks.

    Attributes:
        slots: `[R, N] long`: the slot of each candidate, -1 where there is none.
        num_heads: KV heads; row = sequence * num_heads + head.
        layer: index of the layer.
    """

    slots: torch.Tensor
    num_heads: int
    layer: int


class Keep(ABC):
    """The keep stage of a plan. Subclasses are frozen dataclasses; their fields are the plan's arguments."""

    name: ClassVar[str]
    budget: Budget
    scored: ClassVar[bool] = True
    """Whether a number is stored with each token (4 bytes a token and KV head, counted)."""
    strict: ClassVar[bool] = False
    """Whether queries of a chunk see no more than they would one by one: the last `budget - sink` tokens, and the sinks."""
    reindex: bool = False
    """Whether positions are counted inside the cache (StreamingLLM): only sinks are far away, so their query is rotated."""

    # What subclasses may have as arguments; these are the values where they don't.
    sink: int = 0
    recent: Share = NO_TOKENS
    heads: HeadSplit = "uniform"
    group: GroupReduce = "mean"

    def observed(self, num_queries: int) -> int:
        """Of the last how many queries of a chunk the attention is needed; 0 for none."""
        return 0

    def first_score(self, k: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """The score of new tokens before any attention: `k [R, N, D]` to `[R, N] float32`."""
        return torch.zeros(ctx.slots.shape, device=k.device)

    def update(self, score: torch.Tensor, mass: torch.Tensor, num_queries: int) -> torch.Tensor:
        """The score after a chunk, `[R, N]` both.

        mass: the attention that each token received from the last `observed(num_queries)` queries, summed over them and reduced
            over the query heads of the group by `group`.
        """
        return score + mass

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """What is compared when tokens must go: `[R, N] float32`, the highest stay."""
        return score

    def check(self) -> None:
        """Raises PlanError when the arguments can't work together."""
        if self.budget.unit == "tokens" and self.budget.value <= self.sink:
            raise PlanError(f"{self.name}: a budget of {self.budget} leaves nothing beside {self.sink} sinks")
        if self.budget.unit == "tokens" and self.sink + self.recent.tokens(int(self.budget.value)) > self.budget.value:
            too_many = f"{self.sink} sinks and {self.recent} recent tokens"
            raise PlanError(f"{self.name}: {too_many} exceed the budget of {self.budget}")
