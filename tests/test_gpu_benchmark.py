"""benchmarks/gpu.py from its first to its last section, on a GPU that is not there: its numbers mean nothing, but it runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend_gpu, with_kernels

from kvfold.kernels import triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real GPUs"),
    pytest.mark.skipif(not triton.available(), reason="Triton is not installed: pip install 'kvfold[gpu]'"),
]


def test_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    benchmark, cases = importlib.import_module("gpu"), importlib.import_module("gpu_cases")
    plans = {"full": "full", "int4": "int4"}
    monkeypatch.setattr(benchmark, "PLANS", plans)
    monkeypatch.setattr(cases, "PLANS", plans)
    monkeypatch.setattr(cases, "STEPS", {"h2o+int4": "h2o(50%) | int4"})
    with pretend_gpu(monkeypatch) as device:
        with_kernels(device, monkeypatch)
        benchmark.main(["--smoke", "--out", str(tmp_path / "gpu.json"), "--seconds", "1000"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["right"] for row in found["correctness"])
    assert not found["left_out"]
    assert {row["variant"] for row in found["decode"]} == {"sdpa-flash bf16", *plans}
    assert not [row for row in found["decode"] if "error" in row]
    assert {row["cache"]: row["step"] for row in found["model"]} == {
        "DynamicCache sdpa": "transformers",
        "int4": "cuda-graph",
        "StaticCache sdpa": "cuda-graph",
    }
    assert list((tmp_path / "triton").iterdir())  # launch configurations are kept
