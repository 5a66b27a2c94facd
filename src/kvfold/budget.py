"""How many tokens a plan may keep, and how they are split over the KV heads of a layer."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import PERCENT

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Nine digits are enough for any cache, and never overflow.
WHOLE = re.compile(r"[0-9]{1,9}")
_BYTES = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(B|KiB|MiB|GiB)")

HeadSplit = Literal["uniform", "ada"]


@dataclass(frozen=True)
class Budget:
    """An upper bound on what is kept of each sequence: `25%` of the tokens seen, `1024` tokens, or `64MiB` in all.

    Tokens and shares count per KV head. Bytes count over the whole cache, metadata included; they are turned into
    tokens by `tokens`, which needs to know what a token costs.
    """

    value: float
    unit: Literal["tokens", "share", "bytes"]
    text: str

    @staticmethod
    def parse(text: str) -> "Budget":
        """Reads `25%`, `1024` or `64MiB`. Raises PlanError for anything else, and for zero."""
        text = text.strip()
        if match := _BYTES.fullmatch(text):
            budget = Budget(float(match[1]) * _UNITS[match[2]], "bytes", text)
        elif match := PERCENT.fullmatch(text):
            budget = Budget(float(match[1]) / 100, "share", text)
        elif WHOLE.fullmatch(text):
            budget = Budget(int(text), "tokens", text)
        else:
            raise PlanError(f"'{text}' is not a budget: write tokens (1024), a share of the context (25%) or bytes (64MiB)")
        if budget.value <= 0:
            raise PlanError(f"a budget of {text} keeps nothing: give at least 1 token, more than 0% or some bytes")
        if budget.unit == "share" and budget.value > 1:
            raise PlanError(f"a budget of {text} is more than the whole context: give at most 100%")
        return budget

    def __str__(self) -> str:
        return self.text

    def tokens(self, num_seen: int, tokens_in_bytes: int | None = None) -> int:
        """Tokens that one KV head of one sequence may keep after `num_seen` tokens; at least 1.

        `tokens_in_bytes`: how many tokens fit into a budget of bytes (the layer works it out from its codec).
        """
        if self.unit == "tokens":
            return int(self.value)
        if self.unit == "share":
            # The small shift keeps 25% of 4096 at 1024 whatever the floating point makes of 0.25.
            return max(1, math.ceil(self.value * num_seen - 1e-9))
        if tokens_in_bytes is None:
            raise PlanError(f"a budget of {self.text} needs the size of a token, which this place does not know")
        return max(1, tokens_in_bytes)


@dataclass(frozen=True)
class Room:
    """What a place below the device may hold: nothing, a budget, or all that is left (its bare name in a plan)."""

    used: bool = False
    limit: Budget | None = None

    @staticmethod
    def parse(text: str) -> "Room":
        return Room(True, Budget.parse(text))


def split_over_heads(scores: torch.Tensor, budget: torch.Tensor, num_heads: int, how: HeadSplit) -> torch.Tensor:
    """Which tokens stay, given their scores.

    Args:
        scores: `[R, N]` float, R = batch * KV heads; +inf marks pinned tokens, -inf places that hold no token.
        budget: `[R]` long, tokens that each row may keep. With `ada` the sum over a sequence's heads is what counts.
        num_heads: KV heads, so that rows `b * num_heads … (b + 1) * num_heads - 1` are one sequence.
        how: `uniform` keeps the best `budget` tokens of every head. `ada` takes the best tokens of all heads of the
            layer together, so that heads whose attention is spread keep more (Ada-KV, arXiv 2407.11550, Alg. 1), but
            every head keeps at least a fifth of its even share (their safeguard, alpha = 0.2).

    Returns:
        `[R, N]` bool, True for tokens that stay. Never more than the budget, exactly the budget where there are enough.
    """
    if scores.shape[1] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if how == "ada":
        floor = _best(scores, (budget.float() * 0.2).ceil().long())
        # What the floor has taken ranks first; the rest of the sequence's budget goes to the best of all heads.
        ranked = scores.masked_fill(floor, torch.inf)
        flat = ranked.view(-1, num_heads * scores.shape[1])
        return _best(flat, budget.view(-1, num_heads).sum(1)).view_as(scores)
    return _best(scores, budget)


def latest(slots: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Marks the tokens of the highest slots: `slots [R, N] long` (-1: no token), `counts[r]` of row r, to `[R, N] bool`."""
    most = min(max(counts), slots.shape[1])
    if most == 0:
        return torch.zeros_like(slots, dtype=torch.bool)
    last = torch.tensor(counts, device=slots.device)[:, None].clamp_max(most)
    oldest = slots.topk(most, dim=1).values.gather(1, (last - 1).clamp_min(0))
    return (slots >= oldest) & (slots >= 0) & (last > 0)


def _best(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count[r]` highest entries of each row that hold a token; ties go to the later token."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = scores.shape[1] - 1 - order
    rank_is_in = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, rank_is_in)
    return stays & (scores > -torch.inf)
