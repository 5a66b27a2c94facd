"""`kvfold report` on scores, on mixed folders, and on two runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_report import record

from kvfold.catalog import resolve
from kvfold.cli.main import main
from kvfold.errors import FileError
from kvfold.lab.charts import Chart, HeatMap, Series, charts
from kvfold.lab.compare import MEASURES, compare
from kvfold.lab.eval.scores import Score, write_scores
from kvfold.lab.grid import latex, record_grid, score_grid
from kvfold.lab.report import Results, read_results, write_report
from kvfold.lab.results import write_records
from kvfold.lab.score_charts import score_charts

SETTING = {
    "model": "tiny",
    "model_source": "folder: tiny",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "seed": 0,
    "chunk": 512,
    "answer_chunk": 32,
    "code": "0123456789abcdef",
    "machine": {"cpu": "a processor"},
}
PLACES = [(depth, length) for depth in (0, 0.5, 1) for length in (512, 2048)]


def score(strategy: str = "full", task: str = "kvfold_needle_local", value: float = 1.0, **changes: object) -> Score:
    """A score of a needle task, whose place at depth 0.5 and length 2048 is 0."""
    diff = None if strategy == "full" else value - 1.0
    made = Score(
        task=task,
        version="1.0",
        local=True,
        metric="recall",
        filter="none",
        main=True,
        higher_is_better=True,
        strategy=strategy,
        plan=str(resolve(strategy)),
        num_items=6,
        score=value,
        low=value - 0.1,
        high=value + 0.1,
        interval="wilson",
        diff=diff,
        diff_low=None if diff is None else diff - 0.2,
        diff_high=None if diff is None else diff + 0.2,
        diff_interval=None if diff is None else "bonett-price",
        mcnemar_p=None if diff is None else 0.5,
        kl=0.0,
        kl_low=0.0,
        kl_high=0.0,
        top1=1.0,
        num_answer_tokens=10,
        num_context_tokens=1000.0,
        kv_bytes=2.0**20,
        compression=2.0,
        seconds=1.0,
        kernel="torch-reference",
        by={f"depth={d:g} length={n:g}": float((d, n) != (0.5, 2048)) for d, n in PLACES},
        setting=SETTING,
    )
    return replace(made, **changes)


def test_scores_become_differences_and_maps() -> None:
    differences, needles = score_charts([score(), score("int4", value=0.9), score("h2o", value=0.4)])
    assert isinstance(differences, Chart)
    assert [s.label for s in differences.series] == ["int4", "h2o"]
    assert differences.series[1].ys == pytest.approx((-0.6,))
    assert (differences.series[1].low, differences.series[1].high) == pytest.approx((-0.8, -0.4))
    assert isinstance(needles, HeatMap)
    assert (needles.rows, needles.columns) == (("0 %", "50 %", "100 %"), ("512", "2,048"))
    assert [panel.label for panel in needles.panels] == ["full", "int4", "h2o"]
    assert needles.panels[0].values == ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def test_a_task_by_length_is_a_map_of_one_row() -> None:
    (needles,) = score_charts([score(by={"length=2048": 0.5, "length=512": 1.0})])
    assert isinstance(needles, HeatMap)
    assert needles.rows == ("all",)
    assert needles.panels[0].values == ((1.0, 0.5),)


def test_where_less_is_better_the_order_turns_round() -> None:
    scores = [score(by={}), score("int4", value=1.2, by={}), score("h2o", value=3.0, by={})]
    (chart,) = score_charts([replace(s, higher_is_better=False) for s in scores])
    assert isinstance(chart, Chart)
    assert [s.label for s in chart.series] == ["int4", "h2o"]
    assert chart.better == "better: to the left"


def test_a_difference_is_judged_by_its_interval() -> None:
    cells = [row.cells[5] for row in score_grid([score(), score("int4", value=0.9), score("h2o", value=0.4)]).rows]
    assert [cell.verdict for cell in cells] == ["", "", "worse"]
    assert cells[2].text == "-0.600 [-0.800, -0.400]"


def test_time_is_split_into_prefill_and_decode() -> None:
    made = {c.name: c for c in charts([record(ttft_ms=500.0, tokens_per_s=20.0, new_tokens=11), record("int4")])}
    full = next(s for s in made["time-split"].series if s.label == "full")
    assert full.ys == pytest.approx((0.5, 0.5))  # 10 steps of 50 ms


def test_bits_are_those_of_the_whole_cache() -> None:
    made = {c.name: c for c in charts([record(compression=0.98), record("int4", compression=3.6)])}
    assert {s.label: s.xs[0] for s in made["quality-vs-bits"].series} == pytest.approx({"full": 16 / 0.98, "int4": 16 / 3.6})


def test_latex_escapes_what_plans_and_units_hold() -> None:
    text = latex(record_grid([replace(record("int4"), strategy="h2o(25%) | int4_x"), record(kl=None)]))
    assert "h2o(25\\%) \\textbar{} int4\\_x" in text
    assert "$\\times$ smaller" in text
    rows = [line for line in text.splitlines() if line.endswith(" \\\\")]
    assert len({line.replace("\\&", "").count("&") for line in rows}) == 1


def test_two_runs_are_compared_plan_by_plan() -> None:
    before = [record(), record("int4"), record("int8")]
    faster = {"ms_per_token_p20": 2.0, "ms_per_token_p50": 3.0, "ms_per_token_p80": 4.0, "tokens_per_s": 300.0}
    after = [record(), record("int4", **faster), record("h2o")]
    comparison = compare(before, after, [score()], [score(value=0.5)])
    grid, scores = comparison.grids
    assert [row.strategy for row in grid.rows] == ["full", "int4"]
    at = {heading.title: number for number, heading in enumerate(grid.headings)}
    cells = {row.strategy: row.cells for row in grid.rows}
    old = next(r for r in before if r.strategy == "int4").ms_per_token_p50
    assert old is not None
    assert cells["int4"][at["ms/token"]].sort == pytest.approx(3.0 / old)
    assert [cells["int4"][at[title]].verdict for title in ("ms/token", "tok/s", "TTFT")] == ["better", "better", ""]
    assert {cell.verdict for cell in cells["full"]} == {""}
    assert scores.rows[0].cells[-1].text == "-0.500"
    assert scores.rows[0].cells[-1].verdict == "worse"
    assert "ms/token: 1 better, 0 worse, 1 within the noise" in comparison.summary
    assert [chart.name for chart in comparison.charts] == ["ratio-ms-per-token"]
    assert comparison.charts[0].series[0] == Series(
        "int4", "how tokens are held", (), (pytest.approx(3.0 / old),), pytest.approx(2.0 / 40.0), pytest.approx(4.0 / 9.0)
    )


def test_only_the_same_question_is_compared() -> None:
    for other in (record(new_tokens=99), record(text_sha256="1" * 64), record(model="larger"), record(context=1024)):
        assert compare([record()], [other], [], []).grids == ()
    assert len(compare([record()], [record(threads=8, dtype="float32", code="f" * 16)], [], []).grids) == 1


def test_times_whose_ranges_overlap_are_no_change() -> None:
    step = next(m for m in MEASURES if m.title == "ms/token")
    old = record(ms_per_token_p20=9.0, ms_per_token_p50=10.0, ms_per_token_p80=12.0)
    slower = replace(old, ms_per_token_p20=11.0, ms_per_token_p50=14.0, ms_per_token_p80=15.0)
    assert step.verdict(old, slower) == ""
    assert step.verdict(old, replace(slower, ms_per_token_p20=13.0)) == "worse"


def test_the_command_takes_mixed_folders_and_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kv_bytes in (("a", 1000), ("b", 2000)):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, [record(), record("int4", kv_bytes=kv_bytes)])
    write_scores(tmp_path / "b", [score(), score("int4", value=0.9)])
    out = tmp_path / "made" / "page.html"
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path / "b"), "--against", str(tmp_path / "a"), "--out", str(out)])
    assert exit_.value.code == 0
    assert "2 records and 2 scores" in capsys.readouterr().out
    made = {path.name for path in out.parent.iterdir()}
    assert made >= {
        *("page.html", "page.csv", "page.md", "page.tex", "page-scores.md", "page-scores.tex"),
        *("page-comparison.md", "page-comparison.tex", "difference-kvfold_needle_local.png", "map-kvfold_needle_local.png"),
    }
    assert "2.00 (worse)" in (out.parent / "page-comparison.md").read_text()


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no plan in common"):
        write_report(Results((record(),)), tmp_path / "page.html", Results((record("int4"),)))


def test_folders_of_scores_alone_are_read(tmp_path: Path) -> None:
    write_scores(tmp_path, [score()])
    assert read_results([tmp_path]) == Results((), (score(),))
