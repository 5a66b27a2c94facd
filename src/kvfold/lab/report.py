"""One page of results that needs no network: a table that sorts, figures that answer the pointer, PNG files beside it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from kvfold.catalog import Strategy
from kvfold.files import replacing
from kvfold.lab.charts import Chart, Series, charts
from kvfold.lab.plots import COLORS, draw
from kvfold.lab.results import Record
from kvfold.lab.table import PLAN, Column, columns, ordered, setting_of

_SYMBOLS = {"nothing": "star", "how tokens are held": "circle", "which tokens stay": "square", "both": "triangle-up"}
_COLORS = COLORS | {"nothing": "#808080"}  # which is seen on white and on black
_DASHES = ("solid", "dash", "dot", "dashdot")


def write_report(records: Sequence[Record], page: Path) -> Path:
    """Writes the page and its figures beside it; where records come from several settings, a section for each.

    Raises:
        FileError: the folder can't be written to, or the disk is full.
    """
    sections = []
    for number, group in enumerate(_by_setting(records), 1):
        made = charts(group)
        draw(made, page.parent, "" if number == 1 else f"-{number}")
        sections.append(_section(number, group, made))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvfold.lab", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.jinja").render(
        sections=sections,
        colors={what: color for what, color in _COLORS.items() if what in {Strategy("", r.plan, "").changes for r in records}},
        plotly=_in_script(get_plotlyjs()),
    )
    with replacing(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def _by_setting(records: Sequence[Record]) -> list[list[Record]]:
    """Records that may stand in one table; of those that were measured twice, the newest."""
    groups: dict[str, dict[tuple[str, int, int], Record]] = {}
    for record in sorted(records, key=lambda r: r.date):
        groups.setdefault(setting_of(record), {})[record.plan, record.context, record.batch] = record
    return [ordered(list(group.values())) for group in groups.values()]


def _section(number: int, records: Sequence[Record], made: Sequence[Chart]) -> dict[str, Any]:
    chosen = [column for column in columns(records) if column is not PLAN]  # it stands below the strategy's name
    return {
        "number": number,
        "model": records[0].model,
        "setting": setting_of(records[0]),
        "columns": chosen,
        "rows": [(record, [_cell(column, record) for column in chosen]) for record in records],
        "charts": [(chart, _in_script(json.dumps(_plotly(chart)))) for chart in made],
        "continuations": [r for r in records if r.continuation and r.batch == min(x.batch for x in records)],
    }


def _cell(column: Column, record: Record) -> dict[str, Any]:
    value = column.value(record)
    return {"text": column.text(record), "sort": "" if value is None else value}


def _in_script(source: str) -> str:
    """Text that can stand inside a <script> element, whose end it must not contain."""
    return re.sub(r"</(?=script)", r"<\\/", source, flags=re.IGNORECASE)


# -- interactive figures -----------------------------------------------------------------------------------------------------


def _plotly(chart: Chart) -> dict[str, Any]:
    """A chart as the data and layout of plotly.js."""
    traces = {"lines": _line_traces, "bars": _bar_traces, "points": _point_traces}[chart.form](chart)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": chart.x_label}, "automargin": True},
        "yaxis": {"title": {"text": chart.y_label}, "automargin": True},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "height": 420,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "dragmode": False,
        "legend": {"orientation": "h", "y": -0.2},
    }
    if chart.form == "bars":
        layout["height"] = 110 + 24 * len(chart.series)
        layout["yaxis"] |= {"autorange": "reversed", "ticksuffix": " "}
        layout["showlegend"] = False
    elif chart.form == "lines":
        layout["yaxis"]["rangemode"] = "tozero"
        layout["xaxis"] |= {"tickvals": sorted({x for s in chart.series for x in s.xs})}
    else:
        layout["xaxis"] |= {"type": "log", "tickvals": [2**n for n in range(-7, 20)]}
        layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power"}
        layout["showlegend"] = False
    return {"data": traces, "layout": layout}


def _bar_traces(chart: Chart) -> list[dict[str, Any]]:
    bars: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "x": [s.ys[-1] for s in chart.series],
        "y": [s.label for s in chart.series],
        "text": [f"{s.ys[-1]:.3g}" for s in chart.series],
        "textposition": "auto",
        "insidetextanchor": "start",
        "marker": {"color": [_color(s) for s in chart.series]},
        "hovertemplate": "%{y}: %{x:.4g}<extra></extra>",
    }
    if all(s.low is not None and s.high is not None for s in chart.series):
        bars["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [(s.high or 0) - s.ys[-1] for s in chart.series],
            "arrayminus": [s.ys[-1] - (s.low or 0) for s in chart.series],
            "thickness": 1,
        }
    return [bars]


def _line_traces(chart: Chart) -> list[dict[str, Any]]:
    traces = []
    for i, s in enumerate(chart.series):
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": s.label,
                "x": s.xs,
                "y": s.ys,
                "line": {"color": _color(s), "dash": _DASHES[i % len(_DASHES)], "width": 2},
                "marker": {"symbol": _SYMBOLS[s.changes], "size": 8},
                "hovertemplate": f"{_plain(s.label)}: %{{y:.4g}}<extra></extra>",
            }
        )
    return traces


def _point_traces(chart: Chart) -> list[dict[str, Any]]:
    xs, ys = zip(*chart.frontier, strict=True)
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "hoverinfo": "skip",
        "line": {"color": "#888", "dash": "dash"},
    }
    sides = ("middle right", "middle left")
    points: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": s.xs,
            "y": s.ys,
            "text": [_plain(s.label)],
            # neighbours, which are in order of their bytes, get their names on different sides
            "textposition": sides[i % 2],
            "marker": {"color": _color(s), "symbol": _SYMBOLS[s.changes], "size": 11},
            "cliponaxis": False,
            "hovertemplate": f"{_plain(s.label)}: %{{x:.2f}} MiB, KL %{{y:.3g}}<extra></extra>",
        }
        for i, s in enumerate(chart.series)
    ]
    return [line, *points]


def _color(series: Series) -> str:
    return _COLORS[series.changes]


def _plain(label: str) -> str:
    """plotly.js reads a little HTML in labels, and %{…} in templates; plans hold neither by intent."""
    return label.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
