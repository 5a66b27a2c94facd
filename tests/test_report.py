"""`kvfold report`: the page, the figures and the tables."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from kvfold.catalog import STRATEGIES, resolve
from kvfold.cli.bench import _print_table
from kvfold.cli.main import main
from kvfold.errors import FileError
from kvfold.lab.charts import charts, frontier
from kvfold.lab.plots import spread
from kvfold.lab.report import Results, write_report
from kvfold.lab.results import RECORDS, Record, read_records, write_records
from kvfold.lab.table import columns, markdown, ordered

FIGURES = {"memory-vs-context", "throughput-vs-batch", "quality-vs-bytes", "quality-vs-bits", "decode-time", "time-split"}


def record(strategy: str = "full", context: int = 512, batch: int = 1, **changes: object) -> Record:
    """A record with numbers that follow from its strategy's place in the catalog."""
    place = list(STRATEGIES).index(strategy) if strategy in STRATEGIES else 30
    kv_bytes = context * batch * 23_040 // (1 + place)
    made = Record(
        strategy=strategy,
        plan=str(resolve(strategy)),
        model="tiny",
        model_source="folder: tiny",
        text="times.txt",
        text_sha256="0" * 64,
        context=context,
        batch=batch,
        new_tokens=8,
        kv_bytes=kv_bytes,
        kv_bytes_per_token=kv_bytes / context / batch,
        compression=1.0 + place,
        ttft_ms=100.0,
        ms_per_token_p20=9.0,
        ms_per_token_p50=10.0 + place,
        ms_per_token_p80=40.0,
        tokens_per_s=100.0 * batch,
        peak_bytes=10**7,
        peak_method="VmHWM",
        perplexity=18.0,
        perplexity_full=18.0,
        kl=0.001 * place,
        top1=1 - 0.01 * place,
        rouge_l_full=1.0,
        rouge_l_text=0.5,
        continuation="and so on </script><b>",
        quality_prefill_len=context // 2,
        quality_chunk=32,
        quality_dtype="float32",
        kernel="torch-reference",
        dtype="bfloat16",
        device="cpu",
        threads=2,
        seed=0,
        repeats=3,
        chunk=512,
        how="a fresh process",
        versions={"kvfold": "0.1.0"},
        code="0123456789abcdef",
        git_commit=None,
        machine={"cpu": "a processor", "cores": "2 cores"},
        date="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **changes)


@pytest.fixture
def grid() -> list[Record]:
    return [record(name, context, batch) for name in STRATEGIES for context in (512, 2048) for batch in (1, 4)]


class Loads(HTMLParser):
    """What a browser would fetch to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.found.append(f"{tag} {name}={value}")


def test_page_shows_every_strategy_and_loads_nothing(grid: list[Record], tmp_path: Path) -> None:
    page = write_report(Results(tuple(grid)), tmp_path / "page.html").read_text(encoding="utf-8")
    table = page.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = re.findall(r"<tr data-strategy=\"([^\"]*)\"", table)
    assert len(rows) == len(grid)
    assert set(rows) == set(STRATEGIES)
    assert all(name in page for name in FIGURES)
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_text_of_the_model_can_not_break_the_page(tmp_path: Path) -> None:
    page = write_report(Results((record(),)), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "and so on &lt;/script&gt;&lt;b&gt;" in page
    assert page.count("<script") == page.count("</script>")


def test_figures_are_drawn_for_grids_and_for_single_points(grid: list[Record], tmp_path: Path) -> None:
    single = [record(name) for name in list(STRATEGIES)[:6]]
    for name, records in (("grid", grid), ("single", single), ("one", single[:1])):
        folder = tmp_path / name
        folder.mkdir()
        write_report(Results(tuple(records)), folder / "page.html")
        files = {path.stem: path for path in folder.glob("*.png")}
        assert set(files) == FIGURES
        for path in files.values():
            with Image.open(path) as image:
                crowded = name == "grid" and path.stem.startswith("quality-vs")
                assert image.width == (1650 if crowded else 1200)
                assert len(image.convert("L").getcolors() or []) > 10


def test_only_what_was_measured_is_drawn() -> None:
    assert [c.name for c in charts([record(ms_per_token_p50=None, tokens_per_s=None)])] == [
        "quality-vs-bytes",
        "quality-vs-bits",
        "memory-vs-context",
    ]
    assert [c.name for c in charts([record(kl=None)])] == [
        "memory-vs-context",
        "throughput-vs-batch",
        "decode-time",
        "time-split",
    ]
    single = {c.name: c.form for c in charts([record("full"), record("int4")])}
    assert single["memory-vs-context"] == single["throughput-vs-batch"] == "bars"
    lines = {c.name: c for c in charts([record("full", 512), record("full", 2048), record("int4", 512)])}
    assert lines["memory-vs-context"].form == "lines"
    assert {s.label: s.xs for s in lines["memory-vs-context"].series} == {"full": (512, 2048), "int4": (512,)}


def test_frontier() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0), (5.0, 1.0)]
    assert frontier(points) == ((1.0, 9.0), (2.0, 4.0), (4.0, 1.0))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0, 50], [5, 50]),
        ([50, 50, 50], [40, 50, 60]),
        ([20, 50, 52], [20, 46, 56]),
        ([], []),
    ],
)
def test_labels_are_spread(wanted: list[float], expected: list[float]) -> None:
    assert spread(wanted, 10, 5) == pytest.approx(expected)


def test_labels_stay_below_the_top() -> None:
    assert spread([0, 95, 96, 99], 10, 5, 100) == pytest.approx([5, 80, 90, 100])


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    records = [record(), record(threads=8), record(kv_bytes=1, date="2025-01-01T00:00:00+00:00")]
    page = write_report(Results(tuple(records)), tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<section class="bench">') == 2
    assert (tmp_path / "memory-vs-context-2.png").exists()
    assert "11.25" in page  # the newer of two records of the same measurement


def test_strategies_on_other_kernels_stand_in_one_table(tmp_path: Path) -> None:
    records = [record(), record("int4", kernel="cpu-avx512")]
    page = write_report(Results(tuple(records)), tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<section") == 1
    assert "cpu-avx512" in markdown(records)


def test_table_has_columns_for_what_differs(grid: list[Record]) -> None:
    titles = [c.title for c in columns(grid)]
    assert titles[:4] == ["strategy", "plan", "context", "batch"]
    titles = [c.title for c in columns([record(), record("int4", kl=None, top1=None)])]
    assert "context" not in titles
    rows = markdown([record("int4"), record("full")]).splitlines()
    assert rows[2].startswith("| full |")
    assert "–" in markdown([record(), record("int4", kl=None)])
    assert [r.strategy for r in ordered([record("int4"), record("full")])] == ["full", "int4"]


def test_records_survive_the_disk(grid: list[Record], tmp_path: Path) -> None:
    write_records(tmp_path, grid)
    assert read_records(tmp_path) == grid
    table = pd.read_csv(tmp_path / "records.csv")
    assert list(table["strategy"]) == [r.strategy for r in grid]
    assert list(table["kv_bytes"]) == [r.kv_bytes for r in grid]


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    write_records(tmp_path, [record()])
    path = tmp_path / RECORDS
    good = path.read_text()
    path.write_text(good.replace('"batch": 1', '"batch": "one"'))
    with pytest.raises(FileError, match="line 1: 'batch' has no value of its type"):
        read_records(tmp_path)
    path.write_text(good[:50])
    with pytest.raises(FileError, match="line 1, is not a record"):
        read_records(tmp_path)


def test_the_command_joins_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("full", "int4"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, [record(name)])
    out = tmp_path / "made" / "page.html"
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path / "full"), str(tmp_path / "int4"), "--out", str(out)])
    assert exit_.value.code == 0
    assert "2 records" in capsys.readouterr().out
    assert {"page.html", "page.csv", "page.md", "page.tex"} | {f"{name}.png" for name in FIGURES} == {
        p.name for p in out.parent.iterdir()
    }
    assert "int4" in out.read_text(encoding="utf-8")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (
        (tmp_path, "holds no records.jsonl and no scores.jsonl"),
        (tmp_path / "missing", "is not a folder"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["report", str(folder), "--out", str(tmp_path / "page.html")])
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]


@pytest.mark.parametrize("width", [80, 92, 100, 130, 200])
def test_a_terminal_shows_whole_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns are left out rather than cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    records = [record(), record("int4", kernel="cpu-avx512_bf16", kl=0.12345, top1=1.0)]
    _print_table(records)
    lines = capsys.readouterr().out.splitlines()
    for made in records:
        (row,) = (line for line in lines if line.split()[:1] == [made.strategy])
        texts = {column.text(made) for column in columns(records)}
        assert set(row.split()) <= {word for text in texts for word in text.split()}
    assert ("kernel" in lines[2].split()) == (width >= 92)
