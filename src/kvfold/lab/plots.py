"""The charts as PNG files. Colour tells what a strategy changes, and so do markers and hatching: they are readable in grey."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from kvfold.catalog import Changes
from kvfold.files import replacing
from kvfold.lab.charts import Chart, HeatMap, Panel, Series

COLORS: dict[Changes, str] = {
    "nothing": "#222222",
    "how tokens are held": "#0b6fb8",
    "which tokens stay": "#e08214",
    "both": "#3c9d62",
    "what is read": "#8e4fa8",
    "which layers hold tokens": "#b8443c",
    "where tokens are": "#2a9aa0",
}
PART_OPACITY = (0.45, 1.0)
"""Of the parts of a stack."""
_MARKERS: dict[Changes, str] = {
    "nothing": "*",
    "how tokens are held": "o",
    "which tokens stay": "s",
    "both": "^",
    "what is read": "D",
    "which layers hold tokens": "v",
    "where tokens are": "P",
}
_HATCHES: dict[Changes, str] = {
    "nothing": "",
    "how tokens are held": "",
    "which tokens stay": "///",
    "both": "...",
    "what is read": "xxx",
    "which layers hold tokens": "---",
    "where tokens are": "\\\\\\",
}
_DASHES = ("-", "--", ":", "-.")
_DPI = 150
_LONGEST_END_LABEL = 24
"""Characters for which there is room to the right of lines."""
_ROWS = ("bars", "stacks", "ranges")
"""Forms with a row for each strategy."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "hatch.color": "white",
}


def draw(charts: Sequence[Chart | HeatMap], folder: Path, suffix: str = "") -> list[Path]:
    """Writes each chart to `folder/<name><suffix>.png`. FileError when that fails."""
    paths = []
    for chart in charts:
        path = folder / f"{chart.name}{suffix}.png"
        with mpl.rc_context(_STYLE), replacing(path) as temporary:
            (_maps(chart) if isinstance(chart, HeatMap) else _figure(chart)).savefig(temporary, format="png", dpi=_DPI)
        paths.append(path)
    return paths


def _figure(chart: Chart) -> Figure:
    height = 1.7 + 0.27 * len(chart.series) if chart.form in _ROWS else _height(len(chart.series), chart.form)
    width = 11 if chart.form == "points" and len(chart.series) >= 30 else 8  # their names need room
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    {"lines": _lines, "bars": _bars, "stacks": _stacks, "ranges": _ranges, "points": _points}[chart.form](axes, chart)
    axes.set_title(chart.title, loc="left", fontweight="bold", fontsize=12)
    axes.set_title(chart.better, loc="right", fontstyle="italic")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    figure.supxlabel(textwrap.fill(chart.caption, 140), fontsize=7, color="#555555", x=0.01, ha="left")
    if chart.form not in _ROWS:
        # Labels are placed where room is left, which is known only after the layout.
        canvas.draw()
        figure.set_layout_engine("none")
        if chart.form == "lines":
            _label_ends(axes, chart)
        else:
            _label_points(axes, chart, canvas.get_renderer())
    return figure


def _bars(axes: Axes, chart: Chart) -> None:
    values = [s.ys[-1] for s in chart.series]
    tops = [s.high or s.ys[-1] for s in chart.series]
    bars = axes.barh(range(len(values)), values, color=[COLORS[s.changes] for s in chart.series], height=0.72)
    for bar, series in zip(bars, chart.series, strict=True):
        bar.set_hatch(_HATCHES[series.changes])
    for i, s in enumerate(chart.series):
        if s.low is not None and s.high is not None:
            axes.plot([s.low, s.high], [i, i], color="black", linewidth=1, marker="|", markersize=5)
        axes.annotate(f"{s.ys[-1]:.3g}", (tops[i], i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * max(tops))
    _rows(axes, chart)


def _stacks(axes: Axes, chart: Chart) -> None:
    for i, s in enumerate(chart.series):
        left = 0.0
        for value, opacity in zip(s.ys, PART_OPACITY, strict=True):
            axes.barh(i, value, left=left, color=COLORS[s.changes], alpha=opacity, height=0.72)
            left += value
        axes.annotate(f"{left:.3g}", (left, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * max(sum(s.ys) for s in chart.series))
    _rows(axes, chart)
    parts = [Patch(facecolor="#808080", alpha=a, label=p) for p, a in zip(chart.parts, PART_OPACITY, strict=True)]
    axes.legend(handles=parts, loc="upper right", frameon=True, fontsize=8)


def _ranges(axes: Axes, chart: Chart) -> None:
    for i, s in enumerate(chart.series):
        if s.low is not None and s.high is not None:
            axes.plot([s.low, s.high], [i, i], color=COLORS[s.changes], linewidth=1.2, marker="|", markersize=5)
        axes.plot(s.ys[-1], i, color=COLORS[s.changes], marker=_MARKERS[s.changes], markersize=6)
    if chart.mark is not None:
        axes.axvline(chart.mark, color="black", linewidth=1, linestyle=":")
    _rows(axes, chart)


def _rows(axes: Axes, chart: Chart) -> None:
    """Names on the left, from the top down, and what colours mean."""
    axes.set_yticks(range(len(chart.series)), [_short(s.label, 40) for s in chart.series])
    axes.set_ylim(len(chart.series) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    present = {s.changes for s in chart.series}
    handles = [Patch(facecolor=COLORS[c], hatch=_HATCHES[c], label=f"changes {c}") for c in COLORS if c in present]
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=7.5)


def _height(num_series: int, form: str) -> float:
    """Inches, so that every name has room: lines need one below the other, points room around them."""
    return max(5.2, 1.4 + 0.155 * num_series if form == "lines" else 3.6 + 0.1 * num_series)


def _short(label: str, longest: int) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"


def _maps(chart: HeatMap) -> Figure:
    across = min(4, len(chart.panels))
    down = -(-len(chart.panels) // across)
    figure = Figure(figsize=(8, 1.0 + down * (0.75 + 0.22 * len(chart.rows))), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(chart.panels):
            _panel(axes, chart, chart.panels[place], place % across == 0)
        else:
            axes.set_visible(False)
    figure.suptitle(f"{chart.title} ({chart.better})", x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supylabel(chart.y_label)
    caption = textwrap.fill(f"Across: {chart.x_label}. {chart.caption}", 140)
    figure.supxlabel(caption, fontsize=7, color="#555555", x=0.01, ha="left")
    return figure


def _panel(axes: Axes, chart: HeatMap, panel: Panel, first: bool) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in panel.values]
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for y, row in enumerate(panel.values):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color="white" if value < 0.5 else "black")
    axes.set_title(_short(panel.label, 26), fontsize=8, color=COLORS[panel.changes])
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=7)
    axes.set_yticks(range(len(chart.rows)), chart.rows if first else [""] * len(chart.rows), fontsize=7)
    axes.grid(visible=False)


def _lines(axes: Axes, chart: Chart) -> None:
    dashes: dict[Changes, int] = {}
    for s in chart.series:
        style = _DASHES[dashes.get(s.changes, 0) % len(_DASHES)]
        dashes[s.changes] = dashes.get(s.changes, 0) + 1
        line = style if len(s.xs) > 1 else "none"
        axes.plot(s.xs, s.ys, color=COLORS[s.changes], marker=_MARKERS[s.changes], linestyle=line, markersize=5, linewidth=1.4)
    places = sorted({x for s in chart.series for x in s.xs})
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{x:,.0f}" for x in places])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(places[0] / 1.08, places[-1] * (places[-1] / places[0]) ** 0.38)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    _legend(axes, chart.series, "upper left")


def _points(axes: Axes, chart: Chart) -> None:
    for s in chart.series:
        size = 110 if s.changes == "nothing" else 45
        axes.scatter(s.xs, s.ys, s=size, color=COLORS[s.changes], marker=_MARKERS[s.changes], zorder=3, edgecolor="white")
    axes.plot(*zip(*chart.frontier, strict=True), color="#777777", linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = [s.xs[0] for s in chart.series]
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.35)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}") if max(xs) < 20 * min(xs) else NullFormatter())
    axes.tick_params(axis="x", which="minor", labelsize=7)
    _legend(axes, chart.series, "best")


def _legend(axes: Axes, series: Sequence[Series], place: Literal["best", "upper left"]) -> None:
    present = {s.changes for s in series}
    handles = [
        Line2D([], [], color=COLORS[c], marker=_MARKERS[c], linestyle="none", label=f"changes {c}")
        for c in COLORS
        if c in present
    ]
    axes.legend(handles=handles, loc=place, frameon=False, fontsize=7.5)


def _label_ends(axes: Axes, chart: Chart) -> None:
    """Names at the right ends of lines, moved apart where lines end close together."""
    pixels_per_point = _DPI / 72
    step = 11 * pixels_per_point
    ends = [(*axes.transData.transform((s.xs[-1], s.ys[-1])), s) for s in chart.series]
    ends.sort(key=lambda end: end[1])
    heights = spread([y for _, y, _ in ends], step, axes.bbox.y0 + step / 2, axes.bbox.y1 - step / 2)
    right = max(x for x, _, _ in ends)
    for height, (x, y, s) in zip(heights, ends, strict=True):
        axes.annotate(
            _short(s.label, _LONGEST_END_LABEL),
            (x, y),
            xycoords="figure pixels",
            xytext=(right + 22 * pixels_per_point, height),
            textcoords="figure pixels",
            va="center",
            fontsize=7.5,
            color=COLORS[s.changes],
            arrowprops={
                "arrowstyle": "-",
                "color": "#aaaaaa",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Sequence[float], step: float, lowest: float, highest: float = float("inf")) -> list[float]:
    """Places `step` apart at least, near those wanted, which ascend; crowds share their middle.

    None is below `lowest`, nor above `highest` as long as all have room below it.
    """
    groups: list[list[float]] = []  # what each member wants, less its place in the group

    def start(group: list[float]) -> float:
        return max(lowest, min(highest - step * (len(group) - 1), sum(group) / len(group)))

    for want in wanted:
        groups.append([want])
        while len(groups) > 1 and start(groups[-2]) + step * len(groups[-2]) > start(groups[-1]):
            last = groups.pop()
            groups[-1] += [w - step * len(groups[-1]) for w in last]
    return [start(group) + step * i for group in groups for i in range(len(group))]


def _label_points(axes: Axes, chart: Chart, renderer: RendererAgg) -> None:
    """Names beside points: each at the nearest of several places that nothing else covers yet."""
    dots = [axes.transData.transform((s.xs[0], s.ys[0])) for s in chart.series]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent(renderer))
    for s in chart.series:
        label = axes.annotate(
            s.label,
            (s.xs[0], s.ys[0]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=COLORS[s.changes],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},  # the frontier passes below it
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": COLORS[s.changes], "shrinkA": 0, "shrinkB": 3},
        )
        for dx, dy, ha, va in _PLACES:
            label.set(ha=ha, va=va)
            label.xyann = (dx, dy)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # of the words alone, without the line to the point
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:
            label.set(ha="left", va="center")
            label.xyann = (7, 0)
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(max(map(abs, label.xyann)) > 14)  # who stands beside its point needs no line
        taken.append(Text.get_window_extent(label, renderer))


_PLACES = tuple(
    place
    for far in (1, 2, 3, 5, 7, 9, 12)
    for place in (
        (7 * far, 0, "left", "center"),
        (-7 * far, 0, "right", "center"),
        (0, 7 * far, "center", "bottom"),
        (0, -7 * far, "center", "top"),
        (5 * far, 5 * far, "left", "bottom"),
        (5 * far, -5 * far, "left", "top"),
        (-5 * far, 5 * far, "right", "bottom"),
        (-5 * far, -5 * far, "right", "top"),
    )
)
