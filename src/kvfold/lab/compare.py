"""Two runs side by side: ratios for each strategy, and what got better or worse.

A change counts only when it is larger than what repeats of one run differ by: step times must leave each other's range from
the 20th to the 80th percentile, scores each other's 95 % interval, and the rest a margin that is named in its heading.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvfold.lab.charts import Chart, Series, changes
from kvfold.lab.eval.scores import Score
from kvfold.lab.grid import Cell, Grid, Heading, Row, Verdict
from kvfold.lab.results import Record
from kvfold.lab.score_charts import short
from kvfold.lab.table import MIB, settings

Range = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """What two records are compared by.

    Attributes:
        value: of a record; None where it was not measured.
        margin: the share by which values must differ at least.
        spread: the range of a record's value; where it has one, ranges that overlap are no change.
    """

    title: str
    better: str
    value: Callable[[Record], float | None]
    margin: float
    spread: Callable[[Record], Range | None] = lambda _: None

    def within_margin(self, before: Record, after: Record) -> bool:
        """Also where one was not measured."""
        old, new = self.value(before), self.value(after)
        return old is None or new is None or abs(new - old) <= self.margin * max(abs(old), abs(new))

    def verdict(self, before: Record, after: Record) -> Verdict:
        old, new = self.value(before), self.value(after)
        if old is None or new is None or self.within_margin(before, after):
            return ""
        ranges = self.spread(before), self.spread(after)
        if ranges[0] and ranges[1] and _overlap(ranges[0], ranges[1]):
            return ""
        return "better" if (new > old) == (self.better == "more") else "worse"

    @property
    def meaning(self) -> str:
        least = (
            "times whose ranges overlap are no change"
            if self.title == "ms/token"
            else f"less than {self.margin:.0%} is no change"
        )
        return f"new / old; {least}"


def _step_range(r: Record) -> Range | None:
    low, high = r.ms_per_token_p20, r.ms_per_token_p80
    return None if low is None or high is None else (low, high)


MEASURES = (
    Measure("KV bytes", "less", lambda r: r.kv_bytes, 0.001),
    Measure("ms/token", "less", lambda r: r.ms_per_token_p50, 0.01, _step_range),
    Measure("TTFT", "less", lambda r: r.ttft_ms, 0.1),
    Measure("tok/s", "more", lambda r: r.tokens_per_s, 0.1),
    Measure("peak bytes", "less", lambda r: r.peak_bytes, 0.05),
    Measure("KL", "less", lambda r: r.kl, 0.05),
    Measure("perplexity", "less", lambda r: r.perplexity, 0.005),
)


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common: tables, figures, and a line for each measure of how many got better or worse."""

    grids: tuple[Grid, ...]
    charts: tuple[Chart, ...]
    summary: tuple[str, ...]


def compare(before: Sequence[Record], after: Sequence[Record], old: Sequence[Score], new: Sequence[Score]) -> Comparison:
    """Compares records of the same plan, model, text, context, batch size and number of new tokens, and scores of the same
    plan, model and task.

    Args:
        before, old: records and scores of the run that is compared with.
    """
    pairs = _record_pairs(before, after)
    scored = _score_pairs(old, new)
    grids = [_record_grid(pairs)] if pairs else []
    if scored:
        grids.append(_score_grid(scored))
    return Comparison(tuple(grids), tuple(_ratios(pairs)), tuple(line for grid in grids for line in _summary(grid)))


def _record_pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    known = {_question(r): r for r in sorted(before, key=lambda r: r.date)}
    newest = {_question(r): r for r in sorted(after, key=lambda r: r.date)}
    pairs = [(known[key], record) for key, record in newest.items() if key in known]
    return sorted(pairs, key=lambda pair: (pair[1].context, pair[1].batch, -(pair[1].kv_bytes or 0)))


def _question(r: Record) -> tuple[str | int, ...]:
    """What two records must have in common; machine, code, versions, types and threads are what runs are compared for."""
    return r.plan, r.context, r.batch, r.model, r.text_sha256, r.new_tokens


def _score_pairs(old: Sequence[Score], new: Sequence[Score]) -> list[tuple[Score, Score]]:
    known = {_task(score): score for score in old if score.main}
    return [(known[_task(score)], score) for score in new if _task(score) in known]


def _task(s: Score) -> tuple[str, ...]:
    return s.task, s.metric, s.filter, s.plan, str(s.setting["model"])


def _record_grid(pairs: Sequence[tuple[Record, Record]]) -> Grid:
    measures = [m for m in MEASURES if any(m.value(a) is not None and m.value(b) is not None for a, b in pairs)]
    headings = (
        Heading("strategy", False, "", "its name in the catalog, or its plan"),
        Heading("context", True, "", "tokens of each sequence before generation"),
        Heading("batch", True, "", "sequences at once"),
        *(Heading(m.title, True, m.better, m.meaning) for m in measures),
    )
    rows = tuple(
        Row(
            b.strategy,
            b.plan,
            changes(b.plan),
            (
                Cell(b.strategy, b.strategy),
                Cell(str(b.context), b.context),
                Cell(str(b.batch), b.batch),
                *(_ratio_cell(m, a, b) for m in measures),
            ),
        )
        for a, b in pairs
    )
    notes = [f"Before: {line}" for line in settings([a for a, _ in pairs])]
    return Grid(headings, rows, (*notes, *(f"After: {line}" for line in settings([b for _, b in pairs]))))


def _ratio_cell(measure: Measure, before: Record, after: Record) -> Cell:
    old, new = measure.value(before), measure.value(after)
    if old is None or new is None:
        return Cell("–", None)
    scale = MIB if "bytes" in measure.title else 1
    detail = f"{old / scale:.4g} → {new / scale:.4g}" + (" MiB" if scale == MIB else "")
    if old == 0:
        same = new == 0
        return Cell("1.00" if same else "∞", 1.0 if same else None, measure.verdict(before, after), detail)
    return Cell(f"{new / old:.2f}", new / old, measure.verdict(before, after), detail)


def _score_grid(pairs: Sequence[tuple[Score, Score]]) -> Grid:
    headings = (
        Heading("strategy", False, "", "its name in the catalog, or its plan"),
        Heading("task", False, "", "without 'kvfold_' and '_local'"),
        Heading("before", True, "", "score with its 95 % interval"),
        Heading("after", True, "", "score with its 95 % interval"),
        Heading("change of score", True, "", "after − before; intervals that overlap are no change"),
    )
    rows = tuple(
        Row(
            b.strategy,
            b.plan,
            changes(b.plan),
            (
                Cell(b.strategy, b.strategy),
                Cell(short(b.task), b.task, detail=b.task),
                Cell(f"{a.score:.3f} [{a.low:.3f}, {a.high:.3f}]", a.score, detail=f"{a.num_items} items"),
                Cell(f"{b.score:.3f} [{b.low:.3f}, {b.high:.3f}]", b.score, detail=f"{b.num_items} items"),
                Cell(f"{b.score - a.score:+.3f}", b.score - a.score, _score_verdict(a, b)),
            ),
        )
        for a, b in pairs
    )
    return Grid(headings, rows, ())


def _score_verdict(before: Score, after: Score) -> Verdict:
    if _overlap((before.low, before.high), (after.low, after.high)):
        return ""
    return "better" if (after.score > before.score) == after.higher_is_better else "worse"


def _overlap(a: Range, b: Range) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _summary(grid: Grid) -> list[str]:
    """How many rows got better or worse, for each column that says so of any."""
    lines = []
    for at, heading in enumerate(grid.headings):
        counts = Counter(row.cells[at].verdict for row in grid.rows)
        if counts["better"] or counts["worse"]:
            lines.append(f"{heading.title}: {counts['better']} better, {counts['worse']} worse, {counts['']} within the noise")
    return lines or [f"All {len(grid.rows)} are within the noise."]


def _ratios(pairs: Sequence[tuple[Record, Record]]) -> list[Chart]:
    """Ratios at the longest context and, there, the smallest batch: of step times, first tokens and bytes."""
    if not pairs:
        return []
    context = max(b.context for _, b in pairs)
    batch = min(b.batch for _, b in pairs if b.context == context)
    chosen = [(a, b) for a, b in pairs if (b.context, b.batch) == (context, batch)]
    made = []
    for measure in MEASURES[:3]:
        series = [
            Series(b.strategy, changes(b.plan), (), (new / old,), *_ratio_range(measure, a, b))
            for a, b in chosen
            if (old := measure.value(a)) and (new := measure.value(b)) is not None
        ]
        if all(measure.within_margin(a, b) for a, b in chosen):
            continue
        chart = Chart(
            name=f"ratio-{measure.title.lower().replace('/', '-per-').replace(' ', '-')}",
            title=f"{measure.title}: after over before",
            form="ranges",
            x_label=f"{measure.title}, ratio; 1 is unchanged",
            y_label="",
            better="better: to the left",
            caption=f"Context {context:,}, batch {batch}.",
            series=tuple(sorted(series, key=lambda s: s.ys)),
            mark=1.0,
        )
        if any(s.low is not None for s in series):
            bounds = "From the 20th percentile over the 80th before it, to the 80th over the 20th."
            chart = replace(chart, caption=f"{chart.caption} {bounds}")
        made.append(chart)
    return made


def _ratio_range(measure: Measure, before: Record, after: Record) -> tuple[float | None, float | None]:
    old, new = measure.spread(before), measure.spread(after)
    if not old or not new or not old[0]:
        return None, None
    return new[0] / old[1], new[1] / old[0]
