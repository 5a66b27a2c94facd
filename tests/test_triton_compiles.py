"""The Triton kernels compiled for GPUs that need not be there: what the interpreter can't tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.kernels import triton

pytestmark = pytest.mark.skipif(
    not triton.available() or sys.platform != "linux", reason="Triton is not installed: pip install 'kvfold[gpu]'"
)

SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""What a program may take of shared memory (CUDA C++ Programming Guide, table of technical specifications)."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "plans"),
    [(80, ["fp8", "int4"]), (90, ["full", "fp8", "int8", "int2", "nf4"]), (100, ["int4"])],
    ids=["Ampere", "Hopper", "Blackwell"],
)
def test_kernels_compile_and_fit(capability: int, plans: list[str], tmp_path: Path) -> None:
    """Decoding, masses, a chunk of a prompt, and encoding; the decoding loop keeps everything in registers."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", triton.VARIABLE)}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py"), str(capability), "128", *plans],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(x["plan"], x["kernel"]) for x in found} >= {(p, f"{k}_kernel") for p in plans for k in ("attend", "mass", "merge")}
    assert all(x["shared"] <= 1024 * SHARED_KIB[capability] for x in found)
    assert not [x for x in found if x["queries"] == 1 and x["spilled"]]
    assert any(x["kernel"] == "encode_kernel" for x in found)
