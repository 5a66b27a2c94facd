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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "head_dim", "plans"),
    [(86, 128, ["fp8", "int4"]), (89, 256, ["full"]), (90, 128, ["full", "fp8", "int8", "int2", "nf4"]), (100, 128, ["int4"])],
    ids=["RTX 30", "RTX 40", "Hopper", "Blackwell"],
)
def test_kernels_compile_and_fit(capability: int, head_dim: int, plans: list[str], tmp_path: Path) -> None:
    """Decoding, masses, a chunk of a prompt, and encoding, within shared memory; loops of decoding spill nothing."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", triton.VARIABLE)}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py"), str(capability), str(head_dim), *plans],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(x["plan"], x["kernel"]) for x in found} >= {
        (p, f"{k}_kernel") for p in plans for k in ("attend", "mass", "merge", "received", "come", "leave", "exchange")
    }
    assert not [x for x in found if x["queries"] == 1 and x["spilled"]]
    assert (plans == ["full"]) != any(x["kernel"] == "encode_kernel" for x in found)
    assert ("fp8" in plans) == any(x["kernel"] == "encode_float8_kernel" for x in found)
