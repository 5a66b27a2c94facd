"""`--log` of bench and eval: every measurement as it is made, in CSV files or Weights & Biases."""

import csv
import json
from pathlib import Path

import pytest
from tiny import tiny_model_folder

from kvfold.cli.main import main
from kvfold.errors import FileError
from kvfold.lab.run_log import open_log


def test_rows_are_appended_under_one_heading(tmp_path: Path) -> None:
    for values in ({"plan": "full", "kl": 0.0}, {"plan": "h2o(25%), x", "kl": None}):
        with open_log("csv", tmp_path, {}) as add:
            add("quality", values)
    with (tmp_path / "log-quality.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"plan": "full", "kl": "0.0"}, {"plan": "h2o(25%), x", "kl": ""}]
    with open_log("csv", tmp_path, {}) as add, pytest.raises(FileError, match="other columns"):
        add("quality", {"plan": "full"})


@pytest.mark.slow
def test_a_bench_logs_what_it_measures(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    model = tiny_model_folder(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["bench", "full", "int4", "--model", str(model), "--text", str(text), "--contexts", "64", "--new-tokens", "3"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--threads", "1", "--out", str(out), "--log", "csv"])
    assert exit_.value.code == 0
    records = {r["plan"]: r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}
    for kind, names in (("timing", ("kv_bytes", "ttft_ms")), ("quality", ("kl", "top1"))):
        with (out / f"log-{kind}.csv").open(newline="") as file:
            rows = {row["plan"]: row for row in csv.DictReader(file)}
        assert set(rows) == {"full", "int4"}
        for plan, row in rows.items():
            assert [float(row[name]) for name in names] == pytest.approx([records[plan][name] for name in names])


def test_weights_and_biases_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_log("wandb", tmp_path / "out", {"model": "tiny"}) as add:
        add("timing", {"plan": "int4", "kv_bytes": 1234, "kl": None})
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data = log.read_bytes()
    assert b"timing/kv_bytes" in data
    assert b"1234" in data
    assert b"timing/kl" not in data
