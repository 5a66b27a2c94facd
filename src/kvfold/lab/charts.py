"""What the figures show, before anything is drawn: the PNG files and the page draw the same charts.

Only what was measured is shown. Where there is one context length or one batch size, there is no line to draw, and bars take
its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvfold.catalog import Changes, Strategy
from kvfold.lab.results import Record
from kvfold.lab.table import MIB

Form = Literal["lines", "bars", "points"]
Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Series:
    """A strategy in a chart: points of a line, or one bar or point. `low` and `high` are its spread, where there is one."""

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
        series: bars have their value in `ys` and nothing in `xs`.
        frontier: of points, those that no other beats in both directions, from left to right.
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


def charts(records: Sequence[Record]) -> list[Chart]:
    """The charts that the records of one setting can fill."""
    made = [_memory(records), _throughput(records), _quality(records), _decode(records)]
    return [chart for chart in made if chart is not None]


def _memory(records: Sequence[Record]) -> Chart | None:
    batch = min(r.batch for r in records)
    chosen = [r for r in records if r.batch == batch and r.kv_bytes]
    return _lines_or_bars(
        chosen,
        Chart(
            "memory-vs-context", "Memory of the KV cache", "lines", "context, tokens", "KV cache, MiB", "less is better", "", ()
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
            "throughput-vs-batch",
            "Decode throughput",
            "lines",
            "batch size",
            "tokens a second, all sequences",
            "more is better",
            "",
            (),
        ),
        x=lambda r: r.batch,
        y=lambda r: r.tokens_per_s,
        fixed=f"context {context:,}",
        single="at batch size {}",
    )


def _quality(records: Sequence[Record]) -> Chart | None:
    judged = [r for r in records if r.kl is not None and r.kv_bytes]
    if not judged:
        return None
    context = max(r.context for r in judged)
    judged = [r for r in judged if r.context == context]
    batch = min(r.batch for r in judged)
    judged = [r for r in judged if r.batch == batch]
    positive = [r.kl for r in judged if r.kl]
    floor = min(positive, default=1e-6) / 4
    points = [((r.kv_bytes or 0) / MIB, max(r.kl or 0.0, floor)) for r in judged]
    caption = (
        f"{judged[0].model}, context {context:,}, quality in {judged[0].quality_dtype}. The line joins what no other beats."
    )
    if any(not r.kl for r in judged):
        caption += " A KL of 0 has no place on a logarithmic axis: such points stand at its lower end."
    return Chart(
        name="quality-vs-bytes",
        title="Quality against memory",
        form="points",
        x_label="KV cache, MiB",
        y_label="KL from the full cache, nats a token",
        better="better: down and to the left",
        caption=caption,
        series=tuple(
            Series(r.strategy, _changes(r), (x,), (y,))
            for r, (x, y) in sorted(zip(judged, points, strict=True), key=lambda p: p[1])
        ),
        frontier=frontier(points),
    )


def _decode(records: Sequence[Record]) -> Chart | None:
    timed = [r for r in records if r.ms_per_token_p50 is not None]
    if not timed:
        return None
    context, batch = max(r.context for r in timed), min(r.batch for r in timed)
    timed = sorted((r for r in timed if (r.context, r.batch) == (context, batch)), key=lambda r: r.ms_per_token_p50 or 0)
    if not timed:
        return None
    return Chart(
        name="decode-time",
        title="Time of a decode step",
        form="bars",
        x_label="ms a token, median; whiskers from the 20th to the 80th percentile",
        y_label="",
        better="less is better",
        caption=f"{_caption(timed[0])}, context {context:,}, batch {batch}",
        series=tuple(
            Series(r.strategy, _changes(r), (), (r.ms_per_token_p50 or 0,), r.ms_per_token_p20, r.ms_per_token_p80)
            for r in timed
        ),
    )


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
        Series(name, _changes(rows[0]), tuple(x(r) or 0 for r in rows) if is_line else (), tuple(y(r) or 0 for r in rows))
        for name, rows in by_strategy.items()
    ]
    more_first = empty.better.startswith("more")
    series.sort(key=lambda s: -s.ys[-1] if more_first else s.ys[-1])
    caption = f"{_caption(records[0])}, {fixed}"
    if is_line:
        return Chart(**{**vars(empty), "series": tuple(series), "caption": caption})
    where = single.format(next(iter(places)))
    changes = {
        "form": "bars",
        "x_label": empty.y_label,
        "y_label": "",
        "caption": f"{caption}, {where}",
        "series": tuple(series),
    }
    return Chart(**{**vars(empty), **changes})


def _caption(r: Record) -> str:
    threads = f", {r.threads} thread{'s' if r.threads > 1 else ''}" if r.repeats else ""
    return f"{r.model}, {r.dtype}, {next(iter(r.machine.values()), r.device)}{threads}"


def _changes(record: Record) -> Changes:
    return Strategy(record.strategy, record.plan, "").changes
