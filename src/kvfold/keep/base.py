"""What a keep policy is: a number for each token. The cache does the rest.

After every chunk (a decode step is a chunk of one) a layer has more tokens than the budget allows. Pinned tokens
stay: the first `sink`, the last `recent`, and those that the user has pinned. Of the others the highest ranks stay, and
the rest is gone: its memory is overwritten by the next tokens.

Where a policy counts tokens, it counts those of the sequence (positions): what it keeps does not depend on padding.
"""

from abc import ABC
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch

from kvfold.budget import UNIFORM, WHOLE, Budget, HeadSplit, LayerSplit
from kvfold.errors import PlanError
from kvfold.percent import PERCENT
from kvfold.rope import Rope

GroupReduce = Literal["mean", "max"]
Measure = Literal["sum", "max", "hits"]
State = dict[str, torch.Tensor]
Pins = tuple[tuple[int, int], ...]
"""Spans of positions, first and one after the last, in order and apart: tokens of the sequence that never go."""

UNSCORED = 2.0**100
"""The score of a token that its policy has not judged yet: above all that are judged, so that it stays."""


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


def merge_spans(spans: list[tuple[int, int]]) -> Pins:
    """Sorted, and joined where they meet."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def aligned(slots: torch.Tensor, num_heads: int) -> bool:
    """Whether all heads of a sequence hold the same tokens at the same places: `slots [R, N]`."""
    by_head = slots.view(-1, num_heads, slots.shape[1])
    return torch.equal(by_head, by_head[:, :1].expand_as(by_head))


class Tokens(Protocol):
    """The tokens that can go, encoded or not. What is read is folded, not decoded."""

    @property
    def slots(self) -> torch.Tensor:
        """`[R, N] int32`: which token is where, -1 where there is none."""

    def products(self, q: torch.Tensor) -> torch.Tensor:
        """`q · k_t` with every key: `[R, M, D]` to `[R, M, N] float32`; anything where there is no token."""

    def weighted_keys(self, weights: torch.Tensor) -> torch.Tensor:
        """`Σ_t w_t k_t`: `[R, M, N] float32` to `[R, M, D]`; weights are 0 where there is no token."""

    def value_norms(self) -> torch.Tensor:
        """`|v_t|`, `[R, N] float32`."""

    def vectors(self, row: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of single tokens of one row, decoded: `places [n] long` to `[n, D] float32` twice."""


@dataclass(frozen=True)
class Moment:
    """Where a layer stands when its policy is asked.

    Attributes:
        num_seen: slots so far.
        num_real: tokens of each sequence among them.
        num_new: tokens of each sequence that came with this chunk.
        padding: `[B, num_seen] bool`, False for padding, or None.
    """

    num_seen: int
    num_real: list[int]
    num_new: list[int]
    padding: torch.Tensor | None = None

    def ranks(self, num_queries: int, device: torch.device) -> torch.Tensor:
        """`[B, Q]`: how many tokens of its sequence a query of the chunk has before it; those of padding say nothing."""
        after = torch.tensor(self.num_real, device=device)[:, None]
        if self.padding is None:
            return after - num_queries + torch.arange(num_queries, device=device)
        real = self.padding[:, self.num_seen - num_queries : self.num_seen].long()
        return after - real.sum(1, keepdim=True) + real.cumsum(1) - 1

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """From slots, `[R, N] int`, to positions: how many tokens of the sequence came before; negative for slot -1."""
        rows = slots.shape[0] // len(self.num_real)
        if min(self.num_real) == self.num_seen:
            return slots
        if self.padding is not None:
            before = self.padding[:, : self.num_seen].long().cumsum(1) - 1
            positions = before.repeat_interleave(rows, 0).gather(1, slots.clamp_min(0).long())
            return positions.masked_fill(slots < 0, -1)
        padded = torch.tensor([self.num_seen - n for n in self.num_real], dtype=slots.dtype, device=slots.device)
        return (slots - padded.repeat_interleave(rows)[:, None]).masked_fill(slots < 0, -1)


@dataclass(frozen=True)
class KeepContext:
    """What a policy may look at. Row = sequence * num_heads + head. What takes a computation is computed when it is asked for.

    Attributes:
        tokens: those that can go: their slots, keys and values.
        moment: where the layer stands.
        allowed: tokens that each row may have, sinks left out.
        counts: tokens that each row has.
        sinks: first tokens that each row has, which stay and are not among these; `num_sinks` in the end.
        num_heads: KV heads.
        layer: index of the layer.
        num_sinks: first tokens of every sequence, which stay.
        state: what the policy holds for the layer beside a number a token (see `Keep.initial_state`), to be changed in place.
        rope: the layer's rotation, where the policy asks for it.
    """

    tokens: Tokens
    moment: Moment
    allowed: list[int]
    counts: list[int]
    sinks: list[int]
    num_heads: int
    layer: int
    num_sinks: int
    state: State
    rope: Rope | None = None

    @cached_property
    def slots(self) -> torch.Tensor:
        """`[R, N] int32`: the slot of each token that can go, -1 where there is none."""
        return self.tokens.slots

    @cached_property
    def positions(self) -> torch.Tensor:
        """`[R, N] int`: how many tokens of its sequence came before it, padding left out; negative where there is none."""
        return self.moment.positions(self.slots)

    @cached_property
    def num_real(self) -> torch.Tensor:
        """`[R] long`: tokens of the row's sequence so far."""
        return self._by_row(self.moment.num_real)

    @cached_property
    def num_new(self) -> torch.Tensor:
        """`[R] long`: those of them that came with this chunk."""
        return self._by_row(self.moment.num_new)

    @cached_property
    def over(self) -> torch.Tensor:
        """`[R] bool`: rows that hold more than they may."""
        return torch.tensor(
            [n > most for n, most in zip(self.counts, self.allowed, strict=True)], device=self.tokens.slots.device
        )

    @cached_property
    def empty_places(self) -> bool:
        """Whether there are places without a token."""
        return any(n < self.slots.shape[1] for n in self.counts)

    @cached_property
    def aligned(self) -> bool:
        """Whether all heads of a sequence hold the same tokens at the same places."""
        return aligned(self.slots, self.num_heads)

    def fade(self, window: int) -> float | torch.Tensor:
        """What is left, after this chunk, of a sum over the last `window` queries: `[R, 1]`, or one number for all."""
        if len(set(self.moment.num_new)) == 1:
            return max(0.0, 1 - self.moment.num_new[0] / window)
        return (1 - self.num_new / window).clamp_min(0)[:, None]

    def _by_row(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor([n for n in numbers for _ in range(self.num_heads)], device=self.slots.device)


class Keep(ABC):
    """The keep stage of a plan. Subclasses are frozen dataclasses; their fields are the plan's arguments."""

    name: ClassVar[str]
    budget: Budget
    scored: ClassVar[bool] = True
    """Whether a number is stored with each token (4 bytes a token and KV head, counted)."""
    measure: ClassVar[Measure] = "sum"
    """What `update` gets of the attention that a token received from the observed queries: its `sum`, its `max`, or `hits`, the
    number of queries that gave it at least the even share, 1 / (tokens that the query sees)."""
    strict: ClassVar[bool] = False
    """Whether queries of a chunk see no more than they would one by one: the last `budget - sink` tokens, and the sinks."""
    alike: ClassVar[bool] = False
    """Whether all heads of a sequence are ranked alike, and so keep the same tokens."""
    waits: ClassVar[bool] = False
    """Whether a step reads numbers back from the device, for which it must wait."""
    needs_rope: ClassVar[bool] = False
    """Whether `KeepContext.rope` must be there."""
    reads_vectors: ClassVar[bool] = False
    """Whether scores are made of keys and values themselves, which must then be held in the model's own coordinates."""
    reconstructs: ClassVar[bool] = False
    """Whether the model reads each chunk a second time, through the cache, before tokens go (see kvfold.models.reconstruct)."""
    reindex: bool = False
    """Whether positions are counted inside the cache (StreamingLLM): only sinks are far away, so their query is rotated."""

    # What subclasses may have as arguments; these are the values where they don't.
    sink: int = 0
    recent: Share = NO_TOKENS
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM
    group: GroupReduce = "mean"
    skip: int = 0
    """The first layers, as many as this, keep everything; the budget is that of the others."""

    def initial_state(self, num_rows: int, num_groups: int, head_dim: int) -> State:
        """Tensors that the policy holds for a layer, their first axis the row: counted, saved, and selected with the rows."""
        return {}

    def learn(self, q: torch.Tensor, positions: torch.Tensor, ctx: KeepContext) -> None:  # noqa: B027  (most don't learn)
        """Sees the queries of a chunk, `[R, G, Q, D] float32`, scaled, and their positions, `[R, Q]`, -1 for padding."""

    def observed(self, num_queries: int) -> int:
        """Of the last how many queries of a chunk the attention is needed; 0 for none."""
        return 0

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        """The score of new tokens before any attention: `k [R, N, D]` to `[R, N] float32`."""
        return torch.zeros(k.shape[:2], device=k.device)

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """The score after a chunk, `[R, N]` both.

        mass: the attention that each token received from the last `observed(num_queries)` queries, by `measure`, after a
            reduction over the query heads of the group by `group` (for `sum` and `max` the order is the other way round).
        """
        return score + mass

    def refresh(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """The score just before tokens go, for policies that look at keys and values."""
        return score

    def rank(self, score: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        """What is compared when tokens must go: `[R, N] float32`, the highest stay; of equals the later ones."""
        return score

    def settle(self, score: torch.Tensor, stays: torch.Tensor, free: torch.Tensor, ctx: KeepContext) -> torch.Tensor | None:
        """After the choice: changes the state, and returns new scores if it wants them.

        stays, free: `[R, N] bool`, the tokens that stay, and those that could have gone (neither pinned nor absent).
        """
        return None

    def check(self) -> None:
        """Raises PlanError when the arguments can't work together."""
        if self.budget.unit == "tokens" and self.budget.value <= self.sink:
            raise PlanError(f"{self.name}: a budget of {self.budget} leaves nothing beside {self.sink} sinks")
        if self.budget.unit == "tokens" and self.sink + self.recent.tokens(int(self.budget.value)) > self.budget.value:
            too_many = f"{self.sink} sinks and {self.recent} recent tokens"
            raise PlanError(f"{self.name}: {too_many} exceed the budget of {self.budget}")
        if self.budget.unit == "bytes" and self.skip:
            raise PlanError(f"{self.name}: a budget of bytes is for all layers: write skip=0 with {self.budget}")
