"""The charts as data and layout of plotly.js, for the page.

Each trace carries its strategy (`meta`), by which the page shows and hides it; sizes and labels that depend on the width of
the window are the page's.
"""

from collections.abc import Sequence
from typing import Any

from kvfold.catalog import Changes
from kvfold.lab.charts import Chart, Series
from kvfold.lab.plots import COLORS, PART_OPACITY

SYMBOLS: dict[Changes, str] = {
    "nothing": "star",
    "how tokens are held": "circle",
    "which tokens stay": "square",
    "both": "triangle-up",
    "what is read": "diamond",
    "which layers hold tokens": "triangle-down",
    "where tokens are": "cross",
}
# Those of the files are too dark for a page that may be black.
_FOR_BLACK_AND_WHITE: dict[Changes, str] = {
    "nothing": "#808080",
    "how tokens are held": "#1c7fcf",
    "what is read": "#a05fbb",
    "which layers hold tokens": "#cc5a50",
}
PAGE_COLORS = COLORS | _FOR_BLACK_AND_WHITE
_DASHES = ("solid", "dash", "dot", "dashdot")


def figure(chart: Chart) -> dict[str, Any]:
    """A chart as the page's script reads it: `form`, `data` and `layout`."""
    makers = {"lines": _lines, "bars": _bars, "stacks": _stacks, "ranges": _ranges, "points": _points}
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": chart.x_label, "standoff": 8}, "automargin": True},
        "yaxis": {"title": {"text": chart.y_label, "standoff": 8}, "automargin": True},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "dragmode": False,
        "showlegend": False,
    }
    if chart.form == "lines":
        places = sorted({x for s in chart.series for x in s.xs})
        layout["xaxis"] |= {"type": "log", "tickvals": places, "ticktext": [f"{x:,.0f}" for x in places]}
        layout["yaxis"] |= {"type": "log", "tickformat": "~r", "dtick": "D2"} if chart.log_y else {"rangemode": "tozero"}
    elif chart.form == "points":
        layout["xaxis"] |= {"type": "log", "tickvals": [2.0**n for n in range(-7, 24)]}
        layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power"}
    else:
        layout["yaxis"] |= {"type": "category", "autorange": "reversed", "ticksuffix": " "}
        layout |= {"barmode": "stack", "bargap": 0.25}
        if chart.form == "ranges":
            layout["shapes"] = [
                {"type": "line", "x0": chart.mark, "x1": chart.mark, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}
            ]
    return {"form": chart.form, "data": makers[chart.form](chart), "layout": layout}


def _meta(s: Series) -> dict[str, str]:
    return {"strategy": s.label, "changes": s.changes}


def _marker(s: Series, size: int) -> dict[str, Any]:
    return {"color": PAGE_COLORS[s.changes], "symbol": SYMBOLS[s.changes], "size": size}


def _whiskers(s: Series) -> dict[str, Any]:
    if s.low is None or s.high is None:
        return {}
    ends = {"array": [s.high - s.ys[-1]], "arrayminus": [s.ys[-1] - s.low]}
    return {"error_x": {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, **ends}}


def _interval(s: Series) -> str:
    return "" if s.low is None or s.high is None else f" [{s.low:.4g}, {s.high:.4g}]"


def _bars(chart: Chart) -> list[dict[str, Any]]:
    return [
        {
            "type": "bar",
            "orientation": "h",
            "meta": _meta(s),
            "x": [s.ys[-1]],
            "y": [s.label],
            "text": [f"{s.ys[-1]:.3g}"],
            "textposition": "inside",
            "insidetextanchor": "start",
            "textangle": 0,
            "marker": {"color": PAGE_COLORS[s.changes]},
            "hovertemplate": f"{plain(s.label)}: {s.ys[-1]:.4g}{_interval(s)}<extra></extra>",
            **_whiskers(s),
        }
        for s in chart.series
    ]


def _stacks(chart: Chart) -> list[dict[str, Any]]:
    return [
        {
            "type": "bar",
            "orientation": "h",
            "meta": _meta(s),
            "x": [value],
            "y": [s.label],
            "marker": {"color": PAGE_COLORS[s.changes], "opacity": opacity},
            "hovertemplate": f"{plain(s.label)}: {part} {value:.4g} s of {sum(s.ys):.4g} s<extra></extra>",
        }
        for s in chart.series
        for part, value, opacity in zip(chart.parts, s.ys, PART_OPACITY, strict=True)
    ]


def _ranges(chart: Chart) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "meta": _meta(s),
            "x": [s.ys[-1]],
            "y": [s.label],
            "marker": _marker(s, 9),
            "hovertemplate": f"{plain(s.label)}: {s.ys[-1]:.4g}{_interval(s)}<extra></extra>",
            **_whiskers(s),
        }
        for s in chart.series
    ]


def _lines(chart: Chart) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "meta": _meta(s),
            "x": s.xs,
            "y": s.ys,
            "line": {"color": PAGE_COLORS[s.changes], "dash": _DASHES[i % len(_DASHES)], "width": 1.6},
            "marker": _marker(s, 7),
            "hovertemplate": f"{plain(s.label)}: %{{y:.4g}} at %{{x}}<extra></extra>",
        }
        for i, s in enumerate(chart.series)
    ]


def _points(chart: Chart) -> list[dict[str, Any]]:
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in chart.frontier],
        "y": [y for _, y in chart.frontier],
        "hoverinfo": "skip",
        "line": {"color": "#888", "dash": "dash", "width": 1},
    }
    return [line, *(_point(s, chart.unit, (s.xs[0], s.ys[0]) in chart.frontier) for s in _best_first(chart))]


def _best_first(chart: Chart) -> Sequence[Series]:
    """Those on the frontier come first, and so get their labels before others take the room."""
    return sorted(chart.series, key=lambda s: (s.xs[0], s.ys[0]) not in chart.frontier)


def _point(s: Series, unit: str, best: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "meta": _meta(s),
        "x": s.xs,
        "y": s.ys,
        "marker": _marker(s, 11 if best else 8),
        "opacity": 1 if best else 0.75,
        "cliponaxis": False,
        "hovertemplate": f"{plain(s.label)}: %{{x:.2f}} {unit}, KL %{{y:.3g}}<extra></extra>",
    }


def plain(label: str) -> str:
    """plotly.js reads a little HTML in labels, and %{…} in templates; plans hold neither by intent."""
    return label.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
