"""One page of results that needs no network: tables that sort, figures that answer the pointer, PNG files beside it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from kvfold.catalog import Changes
from kvfold.errors import FileError
from kvfold.files import replacing
from kvfold.lab.charts import Chart, HeatMap, charts
from kvfold.lab.compare import Comparison, compare
from kvfold.lab.eval.items import SCORES
from kvfold.lab.eval.scores import Score, read_scores, setting_line
from kvfold.lab.figures import PAGE_COLORS, figure
from kvfold.lab.grid import Grid, latex, markdown, record_grid, score_grid, write_text
from kvfold.lab.plots import draw
from kvfold.lab.results import RECORDS, Record, read_records
from kvfold.lab.score_charts import score_charts
from kvfold.lab.table import ordered, setting_of


@dataclass(frozen=True)
class Results:
    """What results folders hold: records of `kvfold bench` and scores of `kvfold eval`."""

    records: tuple[Record, ...] = ()
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page: a table of one setting with its figures. `number` tells the files of sections apart."""

    kind: str
    number: int
    title: str
    grid: Grid
    charts: tuple[Chart | HeatMap, ...]
    continuations: tuple[Record, ...] = ()


def read_results(folders: Sequence[Path]) -> Results:
    """Everything that the folders hold. FileError for a folder with neither records nor scores, or with damaged ones."""
    records: list[Record] = []
    scores: list[Score] = []
    for folder in folders:
        found = read_scores(folder) if folder.is_dir() else []
        if not found or (folder / RECORDS).exists():
            if folder.is_dir() and not (folder / RECORDS).exists():
                raise FileError(f"{folder} holds no {RECORDS} and no {SCORES}: run 'kvfold bench' or 'kvfold eval' first")
            records += read_records(folder)
        scores += found
    return Results(tuple(records), tuple(scores))


def write_report(results: Results, page: Path, before: Results | None = None) -> Path:
    """Writes the page and its figures beside it; where results come from several settings, a section for each.

    Args:
        before: another run that this one is compared with.

    Raises:
        FileError: the folder can't be written to, or the disk is full.
    """
    sections = _sections(results)
    comparison = _compared(before, results) if before else None
    for section in sections:
        draw(section.charts, page.parent, "" if section.number == 1 else f"-{section.number}")
    if comparison:
        draw(comparison.charts, page.parent)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvfold.lab", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    present = {row.changes for section in sections for row in section.grid.rows}
    html = environment.get_template("report.html.jinja").render(
        sections=sections,
        comparison=comparison,
        colors={what: color for what, color in PAGE_COLORS.items() if what in present},
        num_strategies=len({row.strategy for section in sections for row in section.grid.rows}),
        figure=_figure_json,
        shade=_shade,
        plotly=_in_script(get_plotlyjs()),
    )
    with replacing(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def write_tables(results: Results, page: Path, before: Results | None = None) -> None:
    """LaTeX beside the page, Markdown too for scores and a comparison: `<page>-scores.md`, `<page>-comparison.tex` …"""
    if results.records:
        write_text(page.with_suffix(".tex"), latex(record_grid(ordered(results.records))))
    if results.scores:
        _write_grid(score_grid(results.scores), page.with_name(f"{page.stem}-scores"))
    if before:
        for number, grid in enumerate(_compared(before, results).grids, 1):
            _write_grid(grid, page.with_name(f"{page.stem}-comparison" + ("" if number == 1 else f"-{number}")))


def _write_grid(grid: Grid, path: Path) -> None:
    write_text(path.with_name(f"{path.name}.md"), markdown(grid))
    write_text(path.with_name(f"{path.name}.tex"), latex(grid))


def _compared(before: Results, after: Results) -> Comparison:
    comparison = compare(before.records, after.records, before.scores, after.scores)
    if not comparison.grids:
        raise FileError(
            "the two runs have no plan in common on the same model, text, context, batch and new tokens, or on the same task"
        )
    return comparison


def _sections(results: Results) -> list[Section]:
    measured = [
        Section("bench", number, group[0].model, record_grid(group), tuple(charts(group)), _continuations(group))
        for number, group in enumerate(_by_setting(results.records), 1)
    ]
    scored = [
        Section("eval", number, str(group[0].setting["model"]), score_grid(group), tuple(score_charts(group)))
        for number, group in enumerate(_scores_by_setting(results.scores), 1)
    ]
    return measured + scored


def _by_setting(records: Sequence[Record]) -> list[list[Record]]:
    """Records that may stand in one table; of those that were measured twice, the newest."""
    groups: dict[str, dict[tuple[str, int, int], Record]] = {}
    for record in sorted(records, key=lambda r: r.date):
        groups.setdefault(setting_of(record), {})[record.plan, record.context, record.batch] = record
    return [ordered(list(group.values())) for group in groups.values()]


def _scores_by_setting(scores: Sequence[Score]) -> list[list[Score]]:
    """Scores that may stand in one table; of those of the same task and plan, the last."""
    groups: dict[str, dict[tuple[str, str, str, str], Score]] = {}
    for s in scores:
        groups.setdefault(setting_line(s) + s.setting["code"], {})[s.task, s.metric, s.filter, s.plan] = s
    return [list(group.values()) for group in groups.values()]


def _continuations(records: Sequence[Record]) -> tuple[Record, ...]:
    batch = min(r.batch for r in records)
    return tuple(r for r in records if r.continuation and r.batch == batch)


# -- for the template --------------------------------------------------------------------------------------------------------


def _figure_json(chart: Chart) -> str:
    return _in_script(json.dumps(figure(chart)))


def _in_script(source: str) -> str:
    """Text that can stand inside a <script> element, whose end it must not contain."""
    return re.sub(r"</(?=script)", r"<\\/", source, flags=re.IGNORECASE)


def _shade(value: float) -> str:
    """Background and ink of a map's field: from orange at 0 over white to blue at 1; in grey the numbers tell them apart."""
    ends: tuple[Changes, Changes] = ("which tokens stay", "how tokens are held")
    strength = round(80 * min(1.0, abs(2 * value - 1)))
    return f"background:color-mix(in srgb, {PAGE_COLORS[ends[value >= 0.5]]} {strength}%, #fff)"
