"""How sure a score is: intervals, and paired comparisons of two plans on the same items.

Small sets of items are the rule here, and scores near 0 or 1 as well, so counts of right answers get intervals that hold there:
Wilson's for a share, Bonett and Price's for the difference of two paired shares. Everything else is bootstrapped over items.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 2000

Statistic = Callable[[Sequence[Any]], float]
"""From the values of items to a score, as the harness aggregates them."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; `method` says how it was made."""

    value: float
    low: float
    high: float
    method: str


def score(values: Sequence[Any], aggregate: Statistic, seed: int = 0) -> Interval:
    """A score with its interval.

    Args:
        values: one for each item: 0 or 1, a number, or what `aggregate` takes.
        aggregate: the mean, or another statistic of the harness such as a perplexity.
        seed: of the resampling.
    """
    value = float(aggregate(values))
    if _binary(values):
        return Interval(value, *wilson(round(sum(values)), len(values)), "wilson")
    scores = [aggregate([values[i] for i in row]) for row in _resamples(len(values), seed)]
    return Interval(value, *_percentiles(scores), "bootstrap")


def difference(ours: Sequence[Any], full: Sequence[Any], aggregate: Statistic, seed: int = 0) -> Interval:
    """ours - full on the same items, in the same order."""
    if len(ours) != len(full):
        raise ValueError(f"{len(ours)} and {len(full)} values are not of the same items")
    value = float(aggregate(ours)) - float(aggregate(full))
    if _binary(ours) and _binary(full):
        return Interval(value, *bonett_price(*_discordant(ours, full), len(ours)), "bonett-price")
    rows = _resamples(len(ours), seed)
    scores = [aggregate([ours[i] for i in row]) - aggregate([full[i] for i in row]) for row in rows]
    return Interval(value, *_percentiles(scores), "paired bootstrap")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, doi.org/10.1080/01621459.1927.10502953)."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bonett_price(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a difference of paired shares (Bonett & Price 2012, doi.org/10.3102/1076998611411915).

    Wald's interval after one has been added to each of the two counts of items on which the plans differ.
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar(ours: Sequence[Any], full: Sequence[Any]) -> float | None:
    """The exact two-sided p of McNemar's test that both are right equally often; None unless all values are 0 or 1.

    Under the hypothesis each item on which they differ is a fair coin (McNemar 1947, doi.org/10.1007/BF02295996).
    """
    if not (_binary(ours) and _binary(full)):
        return None
    gained, lost = _discordant(ours, full)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean of (value, weight) pairs: of per-token numbers that items hold as means."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total


def _binary(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and v in (0, 1) for v in values)


def _discordant(ours: Sequence[Any], full: Sequence[Any]) -> tuple[int, int]:
    """On how many items only we are right, and only the full cache is."""
    gained = sum(1 for a, b in zip(ours, full, strict=True) if a > b)
    lost = sum(1 for a, b in zip(ours, full, strict=True) if a < b)
    return gained, lost


def _resamples(n: int, seed: int) -> list[list[int]]:
    rows: list[list[int]] = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n)).tolist()
    return rows


def _percentiles(scores: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(scores, dtype=float), [2.5, 97.5])
    return float(low), float(high)
