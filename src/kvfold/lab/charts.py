"""What the figures show, before anything is drawn: the PNG files and the page draw the same charts.

Only what was measured is shown. Where there is one context length or one batch size, there is no line to draw, and bars take
its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvfold.catalog import Changes, Strategy
from kvfold.lab.results import Record
from kvfold.lab.table import MIB

Form = Literal["lines", "bars", "stacks", "ranges", "points"]
Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Series:
    """A strategy in a chart: points of a line, or one bar, stack of bars or point.

    `low` and `high` are its spread or interval, where there is one.
    """

    label: str
    changes: Changes
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: of its file.
        better: what to look for.
        caption: the setting, and whatever must be known to read it.
        series: bars and ranges have their value in `ys` and nothing in `xs`; stacks have the values of `parts` in `ys`.
        frontier: of points, those that no other beats in both directions, from left to right.
        parts: what a stack is made of.
        mark: where a line is drawn that values are compared with.
        unit: of a point's x, for those who ask.
        log_y: whether the y axis of lines is logarithmic; their x axis always is.
    """

    name: str
    title: str
    form: Form
    x_label: str
    y_label: str
    better: str
    caption: str
    series: tuple[Series, ...]
    frontier: tuple[tuple[float, float], ...] = ()
    parts: tuple[str, ...] = ()
    mark: float | None = None
    unit: str = ""
    log_y: bool = False


@dataclass(frozen=True)
class Panel:
    """A strategy in a map: `values[row][column]`, None where there was no question."""

    label: str
    changes: Changes
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class HeatMap:
    """A map for each strategy: a share from 0 to 1, by row and column."""

    name: str
    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    better: str
    caption: str
    panels: tuple[Panel, ...]


def charts(records: Sequence[Record]) -> list[Chart]:
    """The charts that the records of one setting can fill."""
    made = [
        _quality(records, "bytes"),
        _quality(records, "bits"),
        _memory(records),
        _throughput(records),
        _decode(records),
        _time_split(records),
    ]
    return [chart for chart in made if chart is not None]


def _memory(records: Sequence[Record]) -> Chart | None:
    batch = min(r.batch for r in records)
    return _lines_or_bars(
        [r for r in records if r.batch == batch and r.kv_bytes],
        Chart(
            name="memory-vs-context",
            title="Memory of the KV cache",
            form="lines",
            x_label="context, tokens",
            y_label="KV cache, MiB",
            better="less is better",
            caption="",
            series=(),
            log_y=True,
        ),
        x=lambda r: r.context,
        y=lambda r: (r.kv_bytes or 0) / MIB,
        fixed=f"batch {batch}",
        single="at a context of {:,} tokens",
    )


def _throughput(records: Sequence[Record]) -> Chart | None:
    timed = [r for r in records if r.tokens_per_s]
    if not timed:
        return None
    context = max(r.context for r in timed)
    return _lines_or_bars(
        [r for r in timed if r.context == context],
        Chart(
            name="throughput-vs-batch",
            title="Decode throughput",
            form="lines",
            x_label="batch size",
            y_label="tokens a second, all sequences",
            better="more is better",
            caption="",
            series=(),
        ),
        x=lambda r: r.batch,
        y=lambda r: r.tokens_per_s,
        fixed=f"context {context:,}",
        single="at batch size {}",
    )


_LEAST_KL = 1e-6


def _quality(records: Sequence[Record], against: Literal["bytes", "bits"]) -> Chart | None:
    """KL against the cache's bytes, or against its bits for each number of K and V of all tokens seen."""
    judged = [r for r in records if r.kl is not None and r.kv_bytes and r.compression]
    if not judged:
        return None
    context = max(r.context for r in judged)
    batch = min(r.batch for r in judged if r.context == context)
    judged = [r for r in judged if (r.context, r.batch) == (context, batch)]
    points = [
        ((r.kv_bytes or 0) / MIB if against == "bytes" else 16 / (r.compression or 1), max(r.kl or 0.0, _LEAST_KL))
        for r in judged
    ]
    caption = f"{judged[0].model}, context {context:,}, quality in {judged[0].quality_dtype}. "
    if against == "bits":
        caption += (
            "Bits are those of the whole cache, dense tokens and scales too, over all numbers of K and V of all tokens seen. "
        )
    caption += "The line joins what no other beats."
    if any((r.kl or 0.0) < _LEAST_KL for r in judged):
        caption += f" A KL below {_LEAST_KL:g} is the rounding of float32 and stands at {_LEAST_KL:g}."
    return Chart(
        name=f"quality-vs-{against}",
        title="Quality against memory" if against == "bytes" else "Quality against bits",
        form="points",
        x_label="KV cache, MiB" if against == "bytes" else "bits for each number of K and V",
        y_label="KL from the full cache, nats a token",
        better="better: down and to the left",
        caption=caption,
        series=tuple(
            Series(r.strategy, changes(r.plan), (x,), (y,))
            for r, (x, y) in sorted(zip(judged, points, strict=True), key=lambda p: p[1])
        ),
        frontier=frontier(points),
        unit="MiB" if against == "bytes" else "bits",
    )


def _at_longest(records: Sequence[Record]) -> list[Record]:
    """Timed records of the longest context and, there, the smallest batch."""
    timed = [r for r in records if r.ms_per_token_p50 is not None and r.tokens_per_s and r.ttft_ms is not None]
    if not timed:
        return []
    context = max(r.context for r in timed)
    batch = min(r.batch for r in timed if r.context == context)
    return [r for r in timed if (r.context, r.batch) == (context, batch)]


def _decode(records: Sequence[Record]) -> Chart | None:
    timed = sorted(_at_longest(records), key=lambda r: r.ms_per_token_p50 or 0)
    if not timed:
        return None
    return Chart(
        name="decode-time",
        title="Time of a decode step",
        form="bars",
        x_label="ms a token: median, whiskers from the 20th to the 80th percentile",
        y_label="",
        better="less is better",
        caption=f"{_caption(timed[0])}, context {timed[0].context:,}, batch {timed[0].batch}",
        series=tuple(
            Series(r.strategy, changes(r.plan), (), (r.ms_per_token_p50 or 0,), r.ms_per_token_p20, r.ms_per_token_p80)
            for r in timed
        ),
    )


def _time_split(records: Sequence[Record]) -> Chart | None:
    timed = _at_longest(records)
    if not timed:
        return None
    first = timed[0]
    series = [Series(r.strategy, changes(r.plan), (), (_prefill_s(r), _decode_s(r))) for r in timed]
    return Chart(
        name="time-split",
        title="Where a request's time goes",
        form="stacks",
        x_label=f"seconds for a prompt of {first.context:,} tokens and {first.new_tokens:,} new ones",
        y_label="",
        better="less is better",
        caption=f"{_caption(first)}, batch {first.batch}. Prefill reads the prompt by {first.chunk} and compresses it.",
        series=tuple(sorted(series, key=lambda s: sum(s.ys))),
        parts=("prefill", "decode"),
    )


def _prefill_s(r: Record) -> float:
    return (r.ttft_ms or 0) / 1000


def _decode_s(r: Record) -> float:
    """All decode steps of a run; the first new token belongs to the prefill."""
    return (r.new_tokens - 1) * r.batch / (r.tokens_per_s or 1)


def frontier(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points that no other point beats: none has as little of both. From left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return tuple(best)


def _lines_or_bars(records: Sequence[Record], empty: Chart, x: Value, y: Value, fixed: str, single: str) -> Chart | None:
    if not records:
        return None
    by_strategy: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: x(r) or 0):
        by_strategy.setdefault(record.strategy, []).append(record)
    places = {x(r) for r in records}
    is_line = len(places) > 1
    series = [
        Series(name, changes(rows[0].plan), tuple(x(r) or 0 for r in rows) if is_line else (), tuple(y(r) or 0 for r in rows))
        for name, rows in by_strategy.items()
    ]
    more_first = empty.better.startswith("more")
    series.sort(key=lambda s: -s.ys[-1] if more_first else s.ys[-1])
    caption = f"{_caption(records[0])}, {fixed}"
    if is_line:
        return replace(empty, series=tuple(series), caption=caption)
    where = single.format(next(iter(places)))
    return replace(empty, form="bars", x_label=empty.y_label, y_label="", caption=f"{caption}, {where}", series=tuple(series))


def _caption(r: Record) -> str:
    threads = f", {r.threads} thread{'s' if r.threads > 1 else ''}" if r.repeats else ""
    return f"{r.model}, {r.dtype}, {next(iter(r.machine.values()), r.device)}{threads}"


def changes(plan: str) -> Changes:
    """What a plan changes."""
    return Strategy("", plan, "").changes
