"""Tables of results as text, whatever they hold: for the page, Markdown and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvfold.catalog import Changes
from kvfold.files import replacing
from kvfold.lab.charts import changes
from kvfold.lab.eval.scores import Score, setting_line
from kvfold.lab.results import Record
from kvfold.lab.score_charts import short
from kvfold.lab.table import MIB, PLAN, columns, settings

Verdict = Literal["", "better", "worse"]

LOCAL = "Tasks on local data: their scores are not the official ones."


@dataclass(frozen=True)
class Heading:
    """Of a column. `better` is "less", "more" or empty; `meaning` one line for those who ask."""

    title: str
    is_number: bool
    better: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Cell:
    """Text, what it is sorted by (None: last), and how a comparison judges it; `detail` is for those who ask."""

    text: str
    sort: str | float | None = None
    verdict: Verdict = ""
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """Of one strategy."""

    strategy: str
    plan: str
    changes: Changes
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """A table: the first column is the strategy. `notes` must not be left out when numbers are quoted."""

    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def record_grid(records: Sequence[Record]) -> Grid:
    """Speed, bytes and quality, a row for each record; the plan stands with the strategy's name."""
    chosen = [column for column in columns(records) if column is not PLAN]
    return Grid(
        headings=tuple(Heading(c.title, bool(c.form), c.better, c.meaning) for c in chosen),
        rows=tuple(
            Row(r.strategy, r.plan, changes(r.plan), tuple(Cell(c.text(r), c.value(r)) for c in chosen)) for r in records
        ),
        notes=tuple(settings(records)),
    )


_SCORE_HEADINGS = (
    Heading("strategy", False, "", "its name in the catalog, or its plan"),
    Heading("task", False, "", "without 'kvfold_' and '_local'"),
    Heading("metric", False, "", "↑: more is better, ↓: less is better"),
    Heading("n", True, "", "questions, the same ones for every plan"),
    Heading("score", True, "", "with its 95 % interval"),
    Heading("− full", True, "", "paired difference to the full cache on the same questions, with its 95 % interval"),
    Heading("p", True, "", "McNemar's exact test: plan and full cache are right equally often"),
    Heading("KL", True, "less", "mean KL divergence of answer tokens from the full cache's, nats a token"),
    Heading("top-1 %", True, "more", "share of answer tokens with the full cache's top token"),
    Heading("KV MiB", True, "less", "mean of the largest cache while a question is answered, dense tokens with 16 bits"),
    Heading("× smaller", True, "more", "than K and V of all tokens seen in 16 bits"),
    Heading("s/item", True, "less", "mean time to answer"),
)


def score_grid(scores: Sequence[Score]) -> Grid:
    """Main metrics, a row for each task and plan."""
    main = [score for score in scores if score.main]
    notes = tuple(dict.fromkeys(setting_line(score) for score in main))
    return Grid(
        headings=_SCORE_HEADINGS,
        rows=tuple(Row(s.strategy, s.plan, changes(s.plan), _score_cells(s)) for s in main),
        notes=(*notes, LOCAL) if any(score.local for score in main) else notes,
    )


def _score_cells(s: Score) -> tuple[Cell, ...]:
    verdict: Verdict = ""
    if s.diff_low is not None and s.diff_high is not None and not s.diff_low <= 0 <= s.diff_high:
        verdict = "better" if (s.diff_low > 0) == s.higher_is_better else "worse"
    diff = "–" if s.diff is None else f"{s.diff:+.3f} [{s.diff_low:+.3f}, {s.diff_high:+.3f}]"
    metric = s.metric + (f", {s.filter}" if s.filter not in ("", "none") else "")
    return (
        Cell(s.strategy, s.strategy),
        Cell(short(s.task), s.task, detail=s.task),
        Cell(f"{metric} {'↑' if s.higher_is_better else '↓'}", metric),
        Cell(str(s.num_items), s.num_items),
        Cell(f"{s.score:.3f} [{s.low:.3f}, {s.high:.3f}]", s.score, detail=s.interval),
        Cell(diff, s.diff, verdict, s.diff_interval or ""),
        _number(s.mcnemar_p, ".2g"),
        _number(s.kl, ".5f"),
        _number(None if s.top1 is None else 100 * s.top1, ".1f"),
        _number(s.kv_bytes / MIB, ".2f"),
        _number(s.compression, ".2f"),
        _number(s.seconds, ".1f"),
    )


def _number(value: float | None, form: str) -> Cell:
    return Cell("–", None) if value is None else Cell(format(value, form), value)


# -- as text -----------------------------------------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    lines = ["| " + " | ".join(h.title for h in grid.headings) + " |"]
    lines.append("|" + "|".join(" --: " if h.is_number else " :-- " for h in grid.headings) + "|")
    lines += ["| " + " | ".join(_judged(c).replace("|", "\\|") for c in row.cells) + " |" for row in grid.rows]
    return "\n".join([*lines, "", *grid.notes]) + "\n"


def latex(grid: Grid) -> str:
    """A longtable, which goes over pages, in the style of booktabs; the notes are comments and the caption's source."""
    form = "".join("r" if h.is_number else "l" for h in grid.headings)
    heads = " & ".join(_escaped(h.title) for h in grid.headings)
    lines = [
        "% needs \\usepackage{booktabs,longtable}",
        *(f"% {note}" for note in grid.notes),
        f"\\begin{{longtable}}{{{form}}}",
        f"\\toprule\n{heads} \\\\\n\\midrule\n\\endhead",
        *(" & ".join(_escaped(_judged(cell)) for cell in row.cells) + " \\\\" for row in grid.rows),
        "\\bottomrule",
        "\\end{longtable}",
    ]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """All or nothing. FileError when that fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _judged(cell: Cell) -> str:
    return cell.text + (f" ({cell.verdict})" if cell.verdict and cell.text else "")


_LATEX = {
    "\\": "\\textbackslash{}",
    "&": "\\&",
    "%": "\\%",
    "$": "\\$",
    "#": "\\#",
    "_": "\\_",
    "{": "\\{",
    "}": "\\}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "|": "\\textbar{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "×": "$\\times$",
    "−": "$-$",
    "–": "--",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "[": "{[}",
}


def _escaped(text: str) -> str:
    """Without what LaTeX reads as its own; an opening bracket after a line's end would be an argument."""
    return "".join(_LATEX.get(character, character) for character in text)
