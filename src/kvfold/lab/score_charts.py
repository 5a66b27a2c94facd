"""What the figures of `kvfold eval` show: each plan's difference to the full cache by task, and maps of needles."""

from collections.abc import Iterable, Sequence

from kvfold.lab.charts import Chart, HeatMap, Panel, Series, changes
from kvfold.lab.eval.scores import Score


def score_charts(scores: Sequence[Score]) -> list[Chart | HeatMap]:
    """The charts that the scores of one setting can fill, task by task."""
    made: list[Chart | HeatMap] = []
    by_task: dict[str, list[Score]] = {}
    for score in scores:
        if score.main:
            by_task.setdefault(score.task, []).append(score)
    for task, own in by_task.items():
        made += [chart for chart in (_differences(task, own), _map(task, own)) if chart is not None]
    return made


def short(task: str) -> str:
    """A task's name as titles write it: without what all of kvfold's own tasks have in common."""
    return task.removeprefix("kvfold_").removesuffix("_local").replace("_", " ")


def _differences(task: str, scores: Sequence[Score]) -> Chart | None:
    compared = [s for s in scores if s.diff is not None]
    if not compared:
        return None
    first = compared[0]
    full = next((s.score for s in scores if s.diff is None), None)
    sign = -1 if first.higher_is_better else 1
    than = "" if full is None else f" (full: {full:.3g})"
    return Chart(
        name=f"difference-{task.replace('/', '-')}",
        title=f"{short(task)}: difference to the full cache",
        form="ranges",
        x_label=f"{first.metric} minus that of the full cache{than}",
        y_label="",
        better="better: to the right" if first.higher_is_better else "better: to the left",
        caption=(
            f"Paired on the same {first.num_items} items, with 95 % intervals: one that reaches over 0 can't tell the "
            f"plan from the full cache. {first.setting['model']}, {_local(first)}."
        ),
        series=tuple(
            Series(s.strategy, changes(s.plan), (), (s.diff or 0.0,), s.diff_low, s.diff_high)
            for s in sorted(compared, key=lambda s: (sign * (s.diff or 0.0), s.strategy))
        ),
        mark=0.0,
    )


def _local(score: Score) -> str:
    return "local data, not the official score" if score.local else f"task version {score.version}"


def _map(task: str, scores: Sequence[Score]) -> HeatMap | None:
    """Depth × length of each plan; a task without depths has one row. None where questions have no lengths."""
    found = [(s, {_place(key): value for key, value in s.by.items()}) for s in scores if s.by]
    places = {place for _, values in found for place in values}
    if not places or any(length is None for _, length in places):
        return None
    lengths = _ascending(length for _, length in places)
    depths = _ascending(depth for depth, _ in places)
    return HeatMap(
        name=f"map-{task.replace('/', '-')}",
        title=f"{short(task)}: {'depth × length' if depths[0] is not None else 'by length'}",
        x_label="context, tokens",
        y_label="depth in the text",
        columns=tuple(f"{length:,.0f}" for length in lengths if length is not None),
        rows=tuple("all" if depth is None else f"{100 * depth:.0f} %" for depth in depths),
        better="1: always found",
        caption=f"Mean {scores[0].metric} at each place, 0 to 1. {scores[0].setting['model']}, {_local(scores[0])}.",
        panels=tuple(
            Panel(
                s.strategy, changes(s.plan), tuple(tuple(values.get((depth, length)) for length in lengths) for depth in depths)
            )
            for s, values in found
        ),
    )


def _place(key: str) -> tuple[float | None, float | None]:
    """`depth=0.5 length=1024` as (0.5, 1024.0); None for what the key does not name."""
    facts = dict(part.split("=", 1) for part in key.split(" "))
    depth, length = (float(facts[name]) if name in facts else None for name in ("depth", "length"))
    return depth, length


def _ascending(values: Iterable[float | None]) -> list[float | None]:
    return sorted(set(values), key=lambda value: -1.0 if value is None else value)
