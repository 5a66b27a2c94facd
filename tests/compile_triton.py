"""Compiles the Triton kernels for a GPU that need not be there, and says what came out: a line of JSON a kernel.

    python tests/compile_triton.py CAPABILITY HEAD_DIM PLAN ...        (90 is Hopper)

The compiler of Triton's wheel needs no driver; only its idea of the current device is taken from elsewhere.
`test_triton_compiles.py` runs this without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from kvfold.kernels import triton as family
from kvfold.kernels.triton import encoding, launch, tuning, turnover
from kvfold.plan import Plan
from kvfold.site import Site

CAPABILITY = divmod(int(sys.argv[1]), 10)
SHARED = 1024 * {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(CAPABILITY, 99)
"""What a program may take of shared memory (CUDA C++ Programming Guide, table of technical specifications)."""
HEAD_DIM, HEADS, GROUPS = int(sys.argv[2]), 2, 4


class Absent:
    """A device that kernels are compiled for and never run on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a kernel: compiles what would be launched."""

    def __init__(self, plan: str, name: str, kernel: Any):
        self.plan, self.name, self.kernel = plan, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **kwargs)
            if made.metadata.shared > SHARED:  # what loading it would say
                raise OutOfResources(made.metadata.shared, SHARED, f"shared memory of {self.plan}'s {self.name}")
            queries = kwargs.get("num_queries", 0)
            known = {"plan": self.plan, "kernel": self.name, "queries": queries, "shared": made.metadata.shared}
            print(json.dumps(known | _resources(made)))

        return compiled


def _resources(made: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def main() -> None:
    driver.set_active(Absent())
    family.capability = lambda device: CAPABILITY  # type: ignore[assignment]
    tuning.shared_memory = lambda device: SHARED  # type: ignore[assignment]
    tuning.choose = launch.choose = lambda *args: tuning.default(torch.device("cpu"))  # type: ignore[assignment]
    kernels = {name: getattr(launch, name) for name in ("attend_kernel", "mass_kernel", "merge_kernel", "received_kernel")}
    encoders = {name: getattr(encoding, name) for name in ("encode_kernel", "encode_float8_kernel")}
    policies = {name: getattr(turnover, name) for name in ("come_kernel", "leave_kernel", "exchange_kernel")}
    for plan in sys.argv[3:]:
        for name, kernel in kernels.items():
            setattr(launch, name, Compiled(plan, name, kernel))
        for name, kernel in encoders.items():
            setattr(encoding, name, Compiled(plan, name, kernel))
        for name, kernel in policies.items():
            setattr(turnover, name, Compiled(plan, name, kernel))
        codec = Plan.parse(plan).store.codec(Site(HEAD_DIM, torch.bfloat16))
        k, v = torch.zeros(2, 2 * HEADS, codec.block, HEAD_DIM).bfloat16()
        fields = codec.encode(k, v)
        table = torch.arange(2 * HEADS).view(HEADS, 2)
        for slots in (None, torch.zeros(2 * HEADS, codec.block, dtype=torch.int32)):
            segment = family.describe_blocks(codec, fields, table, slots, HEAD_DIM)
            spans = ([0] * HEADS, [2 * codec.block] * HEADS) if slots is None else ((), ())
            for num_queries in (1, 64):
                look = family.Look(segment, torch.zeros(HEADS, GROUPS * num_queries, HEAD_DIM), None, *spans)
                at = torch.arange(num_queries)
                launch.attend([look], at, GROUPS, None)
                launch.mass(look, at, GROUPS, None, torch.zeros(HEADS, GROUPS * num_queries), 2 * codec.block)
        whole = family.describe_blocks(codec, fields, table, None, HEAD_DIM)
        on_device = torch.zeros(HEADS, dtype=torch.int32), torch.zeros(HEADS, dtype=torch.int64)  # of a captured step
        look = family.Look(whole, torch.zeros(HEADS, GROUPS, HEAD_DIM), None, (), (), on_device)
        launch.attend([look], torch.arange(1), GROUPS, None)
        thinned = family.describe_blocks(codec, fields, table, torch.zeros(2 * HEADS, codec.block, dtype=torch.int32), HEAD_DIM)
        scores = torch.zeros(HEADS, GROUPS, 2 * codec.block)  # of a step under a keep policy
        launch.attend(
            [family.Look(thinned, torch.zeros(HEADS, GROUPS, HEAD_DIM), None, (), (), None, scores)], at[:1], GROUPS, None
        )
        launch.received(scores, torch.zeros(HEADS, GROUPS), False)
        _take_turns(table)
        for side, x in ((codec.k, k), (codec.v, v)):
            if family.encodes(side, codec.block, *x.shape[-2:]):
                family.encode(side, x)


def _take_turns(table: torch.Tensor) -> None:
    """One token comes and one goes, in all ways."""
    tokens = 64
    pool, run_k, run_v = torch.zeros(2 * HEADS, tokens).int(), *torch.zeros(2, HEADS, 1, HEAD_DIM).bfloat16()
    one, scores = torch.zeros(1, dtype=torch.int64), torch.zeros(HEADS, 2 * tokens + 1)
    slots = torch.zeros(HEADS, 1, dtype=torch.int32)
    turnover.come(run_k, run_v, one, one, (run_k, run_v, slots), (scores, torch.zeros(HEADS, 1)))
    turnover.come(run_k, run_v, one, one, (run_k, run_v, slots), None)
    for goes, moves in ((one, True), (one, False), (None, True)):
        for ranked in (True, False):
            both = (scores, scores) if ranked else None
            turnover.leave(table, pool, slots, goes, (scores, one) if ranked else None, both, moves=moves)
    fields = [(torch.zeros(2 * HEADS * tokens, HEAD_DIM).bfloat16(), run_k[:, 0])] * 2
    turnover.exchange(fields, torch.zeros(HEADS, dtype=torch.int64))


if __name__ == "__main__":
    main()
