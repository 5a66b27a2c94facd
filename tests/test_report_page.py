"""The page in a real browser: it draws, sorts and filters, fits a phone and paper, and has nothing to complain about."""

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from test_report import record
from test_report_scores import score

from kvfold.catalog import STRATEGIES
from kvfold.lab.report import Results, write_report

PROGRAM = browser.find()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAM is None, reason="no Chromium found: install one (apt-get install chromium) or name it in KVFOLD_CHROMIUM"
    ),
]

ROWS = "[...document.querySelectorAll('section.bench table.results tbody tr')]"
TRACES = "[...document.querySelectorAll('.chart')].map(place => place.data.filter(trace => trace.meta).length)"
SETTLED = "drawing.then(() => true)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every strategy of the catalog at two contexts and batch sizes, three of them on a task, against a run that was slower."""
    records = tuple(record(name, context, batch) for name in STRATEGIES for context in (512, 8192) for batch in (1, 4))
    slower = tuple(record(name, ttft_ms=200.0) for name in STRATEGIES)
    scores = (score(), score("int4", value=0.9), score("h2o", value=0.4))
    path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvfold.lab.report.draw", lambda *_: [])  # files of figures are for test_report.py
        return write_report(Results(records, scores), path, Results(slower, scores))


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    assert PROGRAM is not None
    started = browser.Browser(PROGRAM)
    yield started
    started.close()


def test_every_figure_is_drawn_and_nothing_is_fetched(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    assert chromium.run("document.querySelectorAll('.chart .main-svg').length") > 0
    drawn = chromium.run(TRACES)
    assert len(drawn) == 8  # six of the bench, one of the task, one ratio
    assert all(drawn)
    assert chromium.run("document.querySelectorAll('.map').length") == 3
    assert chromium.run("performance.getEntriesByType('resource').length") == 0
    assert chromium.complaints == []


def test_a_heading_sorts_both_ways(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    click = "[...document.querySelectorAll('section.bench th button')].find(b => b.textContent === 'KV MiB').click()"
    values = f"{ROWS}.map(row => Number(row.cells[3].dataset.sort))"
    chromium.run(click)
    ascending = chromium.run(values)
    chromium.run(click)
    descending = chromium.run(values)
    assert len(ascending) == 4 * len(STRATEGIES)
    assert ascending == sorted(ascending)
    assert descending == ascending[::-1]


def test_filters_act_on_tables_figures_and_maps(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    chromium.run("field.value = 'h2o'; field.dispatchEvent(new Event('input'))")
    chromium.run(SETTLED)
    shown = set(chromium.run(f"{ROWS}.filter(row => !row.hidden).map(row => row.dataset.strategy)"))
    wanted = {name for name, strategy in STRATEGIES.items() if "h2o" in f"{name} {strategy.plan}"}
    assert shown == wanted
    assert max(chromium.run(TRACES)) <= 2 * len(wanted)
    assert chromium.run("[...document.querySelectorAll('.map')].filter(map => !map.hidden).length") == 1
    assert chromium.run("document.getElementById('shown').textContent") == f"{len(wanted)} of {len(STRATEGIES)} strategies"
    chromium.run("field.value = ''; buttons.find(b => b.dataset.changes === 'both').click()")
    chromium.run(SETTLED)
    shown = set(chromium.run(f"{ROWS}.filter(row => !row.hidden).map(row => row.dataset.strategy)"))
    assert shown == {name for name, strategy in STRATEGIES.items() if strategy.changes != "both"}
    assert chromium.complaints == []


def test_the_pointer_shows_numbers(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    chromium.run("Plotly.Fx.hover('chart-bench-1-quality-vs-bytes', [{curveNumber: 1, pointNumber: 0}])")
    name = chromium.run("document.getElementById('chart-bench-1-quality-vs-bytes').data[1].meta.strategy")
    shown = chromium.run("document.querySelector('#chart-bench-1-quality-vs-bytes .hoverlayer').textContent")
    assert shown.startswith(f"{name}: ")
    assert "MiB, KL" in shown


def test_names_of_lines_do_not_collide(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    labels = "document.querySelectorAll('#chart-bench-1-memory-vs-context .annotation-text')"
    tops = chromium.run(f"[...{labels}].map(label => label.getBoundingClientRect().top)")
    assert len(tops) == len(STRATEGIES)
    gaps = [b - a for a, b in zip(sorted(tops), sorted(tops)[1:], strict=False)]
    assert min(gaps) >= 11  # pixels: the height of the letters


def test_a_phone_needs_no_sideways_scrolling(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 400, phone=True)
    assert chromium.run("document.documentElement.scrollWidth") <= 400
    assert chromium.run("Math.max(...[...document.querySelectorAll('.chart')].map(p => p._fullLayout.width))") <= 400


def test_it_prints(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page, 1280)
    assert chromium.pdf().startswith(b"%PDF")
    assert chromium.complaints == []
