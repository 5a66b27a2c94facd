"""What a read stage is: all tokens are kept, and each step reads the blocks that its queries need.

When a block of tokens is encoded, the stage writes down a few numbers about its keys (a *summary*, which is counted). A later
chunk of few queries ranks all blocks by these numbers alone, and attends to the best ones; the others are not touched. Sinks,
the dense recent tokens and the newest block are always read. Long chunks, which is what prompts are, read everything.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from kvfold.budget import Budget
from kvfold.errors import PlanError
from kvfold.store.base import Fields


class Read(ABC):
    """The read stage of a plan. Subclasses are frozen dataclasses; their fields are the plan's arguments.

    `budget` is what a query head may read of each sequence, in tokens or as a share of the context; `sink` the first tokens,
    dense and always read; `queries` the longest chunk that reads a part; `skip` the first layers that read everything.
    """

    name: ClassVar[str]
    scored: ClassVar[bool] = False
    """Whether tokens carry a number (`observe`) until they are encoded."""
    budget: Budget
    sink: int
    queries: int
    skip: int

    @abstractmethod
    def summarize(self, k: torch.Tensor, score: torch.Tensor | None) -> Fields:
        """What to know of blocks: `k [..., T, D]` and, if `scored`, `score [..., T]`, to fields `page.* [..., *]`."""

    @abstractmethod
    def relevance(self, q: torch.Tensor, summary: Fields) -> torch.Tensor:
        """How much blocks matter: `q [R, M, D] float32` and fields `[R, C, *]` to `[R, C] float32`."""

    def observe(
        self, score: torch.Tensor, k: torch.Tensor, slots: torch.Tensor, q: torch.Tensor, asked: torch.Tensor
    ) -> torch.Tensor:
        """The numbers of dense tokens after a chunk, `[R, N]` both.

        Args:
            k: `[R, N, D]`.
            slots: `[R, N]`, -1 where there is no token.
            q: `[R, G, Q, D] float32`, the chunk's queries.
            asked: `[Q] long`, their slots.
        """
        raise NotImplementedError(f"{self.name} keeps no number with a token")

    def choose(
        self, q: torch.Tensor, table: torch.Tensor, summary: Fields, counts: Sequence[int], allowed: Sequence[int]
    ) -> torch.Tensor | None:
        """The columns that queries `q [R, M, D]` read of `table [R, C]`: see `best_columns`; None for all of them."""
        if all(n <= max(1, most) for n, most in zip(counts, allowed, strict=True)):
            return None
        ids = table.clamp_min(0).flatten()
        gathered = {name: x.index_select(0, ids).view(*table.shape, *x.shape[1:]) for name, x in summary.items()}
        return best_columns(self.relevance(q, gathered), counts, allowed)

    def blocks(self, num_real: Sequence[int], dense: Sequence[int], block: int) -> list[int]:
        """Blocks that each row may read after so many tokens of each sequence, `dense` of which are read anyway."""
        tokens = [self.budget.tokens(n) for n in num_real]
        rows = len(dense) // len(num_real)
        return [(tokens[row // rows] - n) // block for row, n in enumerate(dense)]

    def check(self) -> None:
        """Raises PlanError when the arguments can't work together."""
        if self.budget.unit == "bytes":
            raise PlanError(f"{self.name}: a budget says how much is read: tokens (1024) or a share of the context (25%)")
        if self.queries < 1:
            raise PlanError(f"{self.name}: queries=0 never reads a part; give at least 1")


def best_columns(relevance: torch.Tensor, counts: Sequence[int], allowed: Sequence[int]) -> torch.Tensor | None:
    """The blocks to read.

    Args:
        relevance: `[R, C]` float.
        counts: how many blocks each row has; they are left-aligned.
        allowed: how many a row may read; one at least is read, the newest.

    Returns:
        `[R, n] long`, columns in order, -1 after a row's last; None when every row may read all that it has.
    """
    most = [min(max(1, n), count) for n, count in zip(allowed, counts, strict=True)]
    if most == list(counts):
        return None
    if len(set(counts)) == len(set(most)) == 1:
        (*_, newest), n = range(counts[0]), most[0]
        best = relevance[:, :newest].topk(n - 1, dim=1).indices
        return torch.cat([best.sort(1).values, best.new_full((len(best), 1), newest)], 1)
    num_columns, device = relevance.shape[1], relevance.device
    there, taken = (torch.tensor(numbers, device=device)[:, None] for numbers in (counts, most))
    column = torch.arange(num_columns, device=device)
    rank = relevance.masked_fill(column >= there, -torch.inf).masked_fill(column == there - 1, torch.inf)
    best = rank.topk(max(most), dim=1).indices
    beyond = torch.arange(best.shape[1], device=device) >= taken
    ordered = best.masked_fill(beyond, num_columns).sort(1).values
    return ordered.masked_fill(ordered == num_columns, -1)
