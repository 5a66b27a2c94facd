"""How many tokens a plan may keep, and how they are split over layers, and over the KV heads of a layer."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.errors import PlanError
from kvfold.percent import PERCENT

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Nine digits are enough for any cache, and never overflow.
WHOLE = re.compile(r"[0-9]{1,9}")
NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
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


@dataclass(frozen=True)
class Cost:
    """What tokens take, to turn bytes into tokens.

    Attributes:
        num_layers: layers that share a budget.
        rows: KV heads of all sequences.
        block: tokens a block.
        block_bytes: of one block, with all that belongs to it.
        dense_bytes: of a row's tokens that are not in blocks, at their most.
        fixed_bytes: of what a layer holds whatever the number of tokens.
    """

    num_layers: int
    rows: int
    block: int
    block_bytes: int
    dense_bytes: int
    fixed_bytes: int

    def blocks(self, budget: Budget) -> int:
        """Whole blocks of a row that fit into a budget of bytes. PlanError when there is not even one."""
        in_layer = budget.value / self.num_layers - self.fixed_bytes
        blocks = int((in_layer / self.rows - self.dense_bytes) // self.block_bytes)
        if blocks < 1:
            least = ((self.dense_bytes + self.block_bytes) * self.rows + self.fixed_bytes) * self.num_layers
            raise PlanError(f"{budget} is too little for this plan: it needs {least / 2**20:.1f}MiB at least")
        return blocks

    def tokens(self, blocks: int, num_heads: int, heads: HeadSplit) -> int:
        """Tokens that a row may hold in its share of so many blocks a row.

        Where heads share, T tokens of a sequence take at most (T + H (block - 1)) / block blocks, as the last block of each
        head may hold a single token: so many fewer tokens keep H heads within their H * blocks, however they are shared.
        """
        spare = 0 if heads == "uniform" else math.ceil((num_heads - 1) * (self.block - 1) / num_heads)
        return blocks * self.block - spare


# -- over layers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSplit:
    """How a budget is split over the layers, by relative weights; `even` is the same for all.

    `pyramid(beta)` falls in a straight line from 2 - 1/beta times the even part in the first layer to 1/beta of it in the last
    (PyramidKV, arXiv 2406.02069, section 4.1; beta is 20 in the authors' experiments): low layers spread their attention,
    high ones gather it on few tokens. `weights(4, 2, 1)` gives the weights, first layer first; fewer than layers are
    stretched over them in straight lines.

    Attributes:
        weights: at least one, none negative, not all zero.
        text: as it is written in a plan.
    """

    weights: tuple[float, ...]
    text: str

    @staticmethod
    def parse(name: str, arguments: Sequence[str] = ()) -> "LayerSplit":
        """Reads `uniform`, `pyramid`, `pyramid(20)` or `weights(4, 2, 1)`. PlanError for anything else."""
        if not all(NUMBER.fullmatch(argument) for argument in arguments):
            raise PlanError(f"layers={name}({', '.join(arguments)}): its arguments are numbers, as in weights(4, 2.5, 1)")
        numbers = tuple(float(argument) for argument in arguments)
        if name == "uniform" and not numbers:
            return UNIFORM
        if name == "pyramid" and len(numbers) <= 1:
            beta = numbers[0] if numbers else 20.0
            if beta < 1:
                raise PlanError(f"layers=pyramid({beta:g}): beta is 1 (even) or more")
            return LayerSplit((2 - 1 / beta, 1 / beta), f"pyramid({beta:g})" if numbers else "pyramid")
        if name == "weights" and any(numbers):
            return LayerSplit(numbers, f"weights({', '.join(arguments)})")
        raise PlanError(f"layers={name}: write one of uniform, pyramid, pyramid(20), weights(4, 2, 1)")

    def __str__(self) -> str:
        return self.text

    def over(self, num_layers: int) -> list[float]:
        """A weight for each layer. PlanError when there are more weights than layers."""
        if len(self.weights) > num_layers:
            raise PlanError(f"layers={self}: {len(self.weights)} weights for {num_layers} layers")
        last = len(self.weights) - 1
        stretched = []
        for layer in range(num_layers):
            at = layer * last / max(1, num_layers - 1)
            low = min(int(at), max(0, last - 1))
            high = min(low + 1, last)
            stretched.append(self.weights[low] + (at - low) * (self.weights[high] - self.weights[low]))
        return stretched


UNIFORM = LayerSplit((1.0,), "uniform")


@functools.lru_cache(maxsize=8192)
def split_over_layers(even: int, least: int, most: int, split: LayerSplit, num_layers: int) -> tuple[int, ...]:
    """Tokens for each layer, `num_layers * min(even, most)` in all.

    Args:
        even: what a layer would get of an even split.
        least: every layer has so many (its pinned tokens), if `even` is that much; the weights split the rest.
        most: no layer gets more (there are no more tokens); what it would have had goes to the others.
    """
    even = min(even, most)
    least = min(least, even)
    rest = (even - least) * num_layers
    weights = split.over(num_layers)
    shares = [0.0] * num_layers
    open_layers = [i for i in range(num_layers) if weights[i] > 0]
    room = float(most - least)
    left = float(rest)
    while open_layers and left > 1e-9:
        scale = left / sum(weights[i] for i in open_layers)
        full = [i for i in open_layers if weights[i] * scale >= room]
        for i in full or open_layers:
            shares[i] = min(room, weights[i] * scale)
        if not full:
            break
        left -= room * len(full)
        open_layers = [i for i in open_layers if i not in full]
    counts = [math.floor(share + 1e-9) for share in shares]
    # Whole tokens: those that lost most by rounding get one more, lower layers first; what no weight asks for stays unused.
    by_loss = sorted((i for i in range(num_layers) if weights[i] > 0), key=lambda i: (counts[i] - shares[i], i))
    missing = min(rest, round(sum(shares))) - sum(counts)
    for i in by_loss[:missing]:
        counts[i] += 1
    return tuple(least + count for count in counts)


# -- over heads --------------------------------------------------------------------------------------------------------------


def split_over_heads(
    scores: torch.Tensor, slots: torch.Tensor, budget: torch.Tensor, num_heads: int, how: HeadSplit
) -> torch.Tensor:
    """Which tokens stay, given their scores.

    Args:
        scores: `[R, N]` float, R = batch * KV heads; +inf marks pinned tokens, -inf places that hold no token.
        slots: `[R, N]` int; of equal scores the higher slot stays.
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
    keys = order_keys(scores, slots)
    if how == "ada":
        floor = _best(keys, (budget.float() * 0.2).ceil().long())
        # What the floor has taken ranks first; the rest of the sequence's budget goes to the best of all heads.
        ranked = keys.masked_fill(floor, torch.iinfo(torch.long).max)
        flat = ranked.view(-1, num_heads * scores.shape[1])
        stays = _best(flat, budget.view(-1, num_heads).sum(1)).view_as(scores)
    else:
        stays = _best(keys, budget)
    return stays & (scores > -torch.inf)


def order_keys(scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`[R, N] long` that order tokens by score, and those of equal score by slot: no two tokens of a row are equal."""
    bits = (scores.float() + 0.0).view(torch.int32)  # adding zero makes -0.0 a 0.0
    # The bits of a float, read as an integer, grow with it; below zero they fall, until all but the sign are turned.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) + slots + 1


def _best(keys: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Marks the `count[r]` highest entries of each row, or all where there are fewer."""
    order = keys.argsort(dim=-1, descending=True, stable=True)
    is_in = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order, is_in.expand_as(order))
