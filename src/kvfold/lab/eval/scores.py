"""From items to scores: one for each task, metric and plan, with how sure it is and how it compares with the full cache."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvfold.files import replacing
from kvfold.lab.eval import statistics
from kvfold.lab.eval.items import SCORES, EvalSetting, Item
from kvfold.lab.eval.statistics import Statistic
from kvfold.lab.journal import read_lines

FULL = "full"


@dataclass(frozen=True)
class Score:
    """A row of the results. None stands for what was not measured or has no meaning.

    Attributes:
        task, version: the harness' or ours; `local` tasks have local data, and their scores are not official ones.
        metric, filter: of the harness; `main` marks the task's first metric.
        higher_is_better: of the metric.
        strategy, plan: the plan's name in the catalog, or its text; its text.
        num_items: questions, the same ones for every plan of the task.
        score, low, high: the metric and its 95 % interval, made by `interval`.
        diff, diff_low, diff_high: score minus that of `full` on the same items, and its 95 % interval, made by `diff_interval`.
        mcnemar_p: exact two-sided p that plan and full are right equally often; for metrics of 0 and 1.
        kl, kl_low, kl_high: mean KL(full || plan) over answer tokens in nats, with its bootstrap interval over items.
        top1: share of answer tokens with the same most probable token.
        num_answer_tokens: that KL and top-1 were measured on, all items.
        num_context_tokens: mean over items.
        kv_bytes: mean over items of the largest cache.
        compression: 16-bit bytes of K and V of all tokens seen over kv_bytes.
        seconds: mean time to answer an item.
        by: the metric's mean for each value of the question's facts, as in {"depth=0.5 length=1024": 1.0}; empty without facts.
    """

    task: str
    version: str
    local: bool
    metric: str
    filter: str
    main: bool
    higher_is_better: bool
    strategy: str
    plan: str
    num_items: int
    score: float
    low: float
    high: float
    interval: str
    diff: float | None
    diff_low: float | None
    diff_high: float | None
    diff_interval: str | None
    mcnemar_p: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    top1: float | None
    num_answer_tokens: int
    num_context_tokens: float
    kv_bytes: float
    compression: float
    seconds: float
    kernel: str
    by: dict[str, float]
    setting: dict[str, Any]


@dataclass(frozen=True)
class TaskFacts:
    """What a score needs to know of a task.

    Attributes:
        aggregate: how items become a score, by metric.
        higher_is_better: by metric.
    """

    name: str
    version: str
    local: bool
    aggregate: Mapping[str, Statistic]
    higher_is_better: Mapping[str, bool]


def scores_of(
    task: TaskFacts, by_plan: Mapping[str, Sequence[Item]], names: Mapping[str, str], setting: EvalSetting
) -> list[Score]:
    """The scores of one task.

    Args:
        by_plan: a plan's text to its items; those of every plan are of the same questions, in one order.
        names: a plan's text to its name.
    """
    scores = []
    full = by_plan.get(FULL)
    for plan, items in by_plan.items():
        if not items:
            continue
        for number, key in enumerate(items[0].metrics):
            metric, _, filter_name = key.rpartition(",")
            aggregate = task.aggregate[metric]
            values = [item.metrics[key] for item in items]
            theirs = [item.metrics[key] for item in full] if full and plan != FULL else None
            shared: dict[str, Any] = {
                "task": task.name,
                "version": task.version,
                "local": task.local,
                "metric": metric,
                "filter": filter_name,
                "main": number == 0,
                "higher_is_better": bool(task.higher_is_better.get(metric, True)),
                "strategy": names.get(plan, plan),
                "plan": plan,
                "num_items": len(items),
                "setting": json.loads(json.dumps(asdict(setting))),  # as it is read again
            }
            found = _measured(values, theirs, aggregate, setting.seed) | _costs(items, setting.seed)
            scores.append(Score(**shared, **found, by=_by(items, values)))
    return scores


def _measured(values: Sequence[Any], full: Sequence[Any] | None, aggregate: Statistic, seed: int) -> dict[str, Any]:
    own = statistics.score(values, aggregate, seed)
    found: dict[str, Any] = {"score": own.value, "low": own.low, "high": own.high, "interval": own.method}
    if full is None:
        return found | dict.fromkeys(("diff", "diff_low", "diff_high", "diff_interval", "mcnemar_p"))
    diff = statistics.difference(values, full, aggregate, seed)
    return found | {
        "diff": diff.value,
        "diff_low": diff.low,
        "diff_high": diff.high,
        "diff_interval": diff.method,
        "mcnemar_p": statistics.mcnemar(values, full),
    }


def _costs(items: Sequence[Item], seed: int) -> dict[str, Any]:
    measured = [item for item in items if item.kl is not None and item.num_answer_tokens]
    kl = top1 = None
    if measured:
        kl = statistics.score([(i.kl, i.num_answer_tokens) for i in measured], statistics.weighted_mean, seed)
        top1 = statistics.weighted_mean([(i.top1 or 0.0, i.num_answer_tokens) for i in measured])
    num = len(items)
    return {
        "kl": kl.value if kl else None,
        "kl_low": kl.low if kl else None,
        "kl_high": kl.high if kl else None,
        "top1": top1,
        "num_answer_tokens": sum(item.num_answer_tokens for item in items),
        "num_context_tokens": sum(item.num_context_tokens for item in items) / num,
        "kv_bytes": sum(item.kv_bytes for item in items) / num,
        "compression": sum(item.fp16_bytes for item in items) / sum(item.kv_bytes for item in items),
        "seconds": sum(item.seconds for item in items) / num,
        "kernel": items[0].kernel,
    }


def _by(items: Sequence[Item], values: Sequence[Any]) -> dict[str, float]:
    """The mean for each combination of facts: the map of a needle test."""
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, values, strict=True):
        if item.facts and isinstance(value, int | float):
            groups.setdefault(" ".join(f"{k}={v:g}" for k, v in sorted(item.facts.items())), []).append(float(value))
    return {key: sum(found) / len(found) for key, found in sorted(groups.items())}


# -- files -------------------------------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> list[Score]:
    """The scores of a results folder; none where there is no file of them. FileError when a line can't be read."""
    path = folder / SCORES
    return read_lines(path, lambda values: Score(**values)) if path.exists() else []


def write_scores(folder: Path, scores: Sequence[Score]) -> None:
    """Writes scores.jsonl, .csv and .md, each all or nothing. FileError when that fails."""
    rows = [asdict(score) for score in scores]
    with replacing(folder / SCORES) as temporary:
        temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    with replacing(folder / "scores.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Score)])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    with replacing(folder / "scores.md") as temporary:
        temporary.write_text(markdown(scores), encoding="utf-8")


COLUMNS = (
    "task",
    "metric",
    "plan",
    "n",
    "score [95 %]",
    "− full [95 %]",
    "p",
    "KL",
    "top-1 %",
    "KV MiB",
    "× smaller",
    "s/item",
)


NUM_TASK_COLUMNS = 2
"""How many of the columns say the same for every plan of a task."""


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The main metric of each task and plan as text, in the order of `COLUMNS`."""
    return [_row(score) for score in scores if score.main]


def _row(s: Score) -> tuple[str, ...]:
    metric = s.metric + (f", {s.filter}" if s.filter not in ("", "none") else "")
    diff = "–" if s.diff is None else f"{s.diff:+.3f} [{s.diff_low:+.3f}, {s.diff_high:+.3f}]"
    return (
        s.task,
        f"{metric} {'↑' if s.higher_is_better else '↓'}",
        s.strategy,
        str(s.num_items),
        f"{s.score:.3f} [{s.low:.3f}, {s.high:.3f}]",
        diff,
        "–" if s.mcnemar_p is None else f"{s.mcnemar_p:.2g}",
        "–" if s.kl is None else f"{s.kl:.5f}",
        "–" if s.top1 is None else f"{100 * s.top1:.1f}",
        f"{s.kv_bytes / 2**20:.2f}",
        f"{s.compression:.2f}",
        f"{s.seconds:.1f}",
    )


def markdown(scores: Sequence[Score]) -> str:
    """A Markdown table of the main metrics, with the setting below it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " :-- |" * 3 + " --: |" * (len(COLUMNS) - 3)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(scores)]
    lines += ["", *dict.fromkeys(setting_line(score) for score in scores)]
    if any(score.local for score in scores):
        lines += ["", "Tasks that end in `_local` are on local data: their scores are not the official ones."]
    return "\n".join(lines) + "\n"


def setting_line(score: Score) -> str:
    s = score.setting
    machine = s["machine"].get("gpu") or s["machine"].get("cpu", "")
    threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"
    return (
        f"{s['model']} ({s['model_source']}), {s['dtype']}, {s['device']}, {machine}, {threads}; contexts read "
        f"{s['chunk']} tokens at a time, answers {s['answer_chunk']}; seed {s['seed']}."
    )
