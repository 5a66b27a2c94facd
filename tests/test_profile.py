"""`kvfold profile`: counts against formulas, and the files."""

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_model_folder

import kvfold
from kvfold.attention import dispatch
from kvfold.cli.main import main
from kvfold.lab.counting import ATTEND, Ledger, attention_ranges
from kvfold.lab.operations import nsight_commands
from kvfold.lab.roofline import Operation, Roofs

ROOFS = Roofs(read=100e9, copy=80e9, matmul=1e12, dtype="bfloat16", device="CPU", threads=1)


def test_shares_of_the_roof() -> None:
    memory_bound = Operation("mv", 1, seconds=2.0, num_bytes=100 * 10**9, flops=10**9)
    assert memory_bound.share(ROOFS) == pytest.approx(0.5)
    compute_bound = Operation("mm", 1, seconds=4.0, num_bytes=10**9, flops=10**12)
    assert compute_bound.share(ROOFS) == pytest.approx(0.25)
    assert compute_bound.intensity == 1000
    assert Operation("view", 1, 1.0, 0, 0).share(ROOFS) is None


def test_products_are_counted_by_their_formulas() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with Ledger() as ledger:
        (a @ b).t().contiguous()
    assert ledger.flops["aten::mm"] == 2 * 3 * 5 * 7
    assert ledger.num_bytes["aten::mm"] == 4 * (15 + 35 + 21)
    assert ledger.num_bytes["aten::t"] == 0  # moves nothing
    assert ledger.num_bytes["aten::clone"] == 2 * 4 * 21


def test_attention_is_one_operation_with_its_segments_bytes() -> None:
    model = tiny_model()
    cache = kvfold.cache(model, "int4")
    ids = torch.randint(0, 100, (1, 133))
    attend = dispatch.attend
    with torch.no_grad():
        model(ids[:, :132], past_key_values=cache)
        with Ledger() as ledger, attention_ranges(ledger):
            model(ids[:, 132:], past_key_values=cache)
    assert dispatch.attend is attend
    config = model.config
    num_layers = config.num_hidden_layers
    assert ledger.calls[ATTEND] == num_layers
    head_dim = config.hidden_size // config.num_attention_heads
    assert ledger.flops[ATTEND] == num_layers * 4 * head_dim * config.num_attention_heads * 133
    queries = num_layers * 2 * 4 * head_dim * config.num_attention_heads
    assert ledger.num_bytes[ATTEND] == cache.nbytes + queries  # there are no idle blocks


def test_the_command_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The history of the Roman Empire covers much of the Mediterranean. " * 60)
    options = ["--model", str(folder), "--text", str(text), "--context", "80", "--steps", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["profile", "int4", *options, "--dtype", "float32"])
    assert not end.value.code
    assert "of roof" in capsys.readouterr().out
    with (tmp_path / "out" / "operations.csv").open() as file:
        rows = {row["operation"]: row for row in csv.DictReader(file)}
    assert float(rows[ATTEND]["ms"]) > 0
    assert int(rows[ATTEND]["calls"]) > 0
    facts = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert facts["plan"] == "int4"
    assert facts["context"] == 80
    assert facts["roofs"]["read"] > 1e8
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {"decode 0", "decode 1", ATTEND} <= {event.get("name") for event in events}
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_nsight_commands_run_the_same() -> None:
    nsys, ncu = nsight_commands(["/bin/kvfold", "profile", "int4", "--text", "my text.txt"], Path("out dir"))
    assert nsys == "nsys profile --trace=cuda,nvtx --output='out dir/nsys' kvfold profile int4 --text 'my text.txt'"
    assert "--nvtx-include 'decode 0/'" in ncu
