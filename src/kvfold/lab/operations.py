"""Where the time of decoding goes, operation by operation, and how near each comes to the device's roofs."""

import csv
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel

from kvfold.files import make_folder, replacing
from kvfold.kv_cache import KVCache
from kvfold.lab.clock import Clock
from kvfold.lab.counting import ATTEND, Ledger, attention_ranges, nvtx_range
from kvfold.lab.generate import prefill
from kvfold.lab.profile import write_trace
from kvfold.lab.roofline import Operation, Roofs, draw, measure_roofs
from kvfold.lab.setting import machine, versions
from kvfold.models.adapter import attach, detach
from kvfold.models.step import describe, uninstall


@dataclass(frozen=True)
class DecodeProfile:
    """What was seen.

    Attributes:
        operations: of all traced steps, the slowest first.
        step: what ran the steps whose median is `step_ms`, without the profiler (kvfold.models.step). Operations are those of
            the model's own layers.
        kv_bytes: the cache's, all of them.
        utilisation: percent of time in which the GPU ran a kernel, as its driver says; None where it can't be read.
    """

    plan: str
    kernel: str
    step: str
    context: int
    steps: int
    step_ms: float
    kv_bytes: int
    roofs: Roofs
    operations: tuple[Operation, ...]
    utilisation: int | None


def profile_decode(
    model: PreTrainedModel, make_cache: Callable[[], KVCache], input_ids: torch.Tensor, steps: int, chunk: int, folder: Path
) -> DecodeProfile:
    """Prefills `input_ids [B, S]` and profiles `steps` decode steps: once for times, once for bytes and FLOPs.

    Layers that kvfold has compiled into one call run as the model's own code for that, and afterwards as before.

    Writes `trace.json` (opens in Perfetto), `operations.csv`, `roofline.png`, `profile.json` and, on a GPU, `nsight.txt`.
    FileError when the folder can't be written to.
    """
    make_folder(folder)
    device = input_ids.device
    roofs = measure_roofs(device, model.dtype)
    cache = make_cache()
    nvtx = device.type == "cuda"
    with nvtx_range("prefill", nvtx):
        token = prefill(model, cache, input_ids, chunk).argmax(-1, keepdim=True)
    step_ms, run_by = _timed_steps(model, cache, token, steps, device), describe(model)
    uninstall(model)  # a layer that is one compiled call, or a step that is one graph, has no operations to see
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if nvtx else [])
    with attention_ranges(nvtx=nvtx), torch.profiler.profile(activities=activities) as profiler:
        for step in range(steps):
            with torch.profiler.record_function(f"decode {step}"), nvtx_range(f"decode {step}", nvtx):
                _step(model, cache, token)
    with Ledger() as ledger, attention_ranges(ledger):
        for _ in range(steps):
            _step(model, cache, token)
    detach(model)
    attach(model)
    found = DecodeProfile(
        plan=str(cache.plan),
        kernel=cache.kernel,
        step=run_by,
        context=input_ids.shape[1],
        steps=steps,
        step_ms=sorted(step_ms)[len(step_ms) // 2],
        kv_bytes=cache.nbytes,
        roofs=roofs,
        operations=tuple(_operations(profiler, ledger, on_gpu=nvtx)),
        utilisation=_utilisation(device),
    )
    with replacing(folder / "trace.json") as path:
        write_trace(profiler, path)
    _write(found, folder)
    return found


@torch.no_grad()
def _step(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> None:
    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _timed_steps(model: PreTrainedModel, cache: KVCache, token: torch.Tensor, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of decode steps without a profiler, the first left out."""
    clock, times = Clock(device), []
    for _ in range(steps + 1):
        clock.start()
        _step(model, cache, token)
        clock.stop()
        times.append(clock.milliseconds())
    return times[1:]


def _operations(profiler: Any, ledger: Ledger, *, on_gpu: bool) -> list[Operation]:
    """Own times by name, from the profiler, with the ledger's counts. What kvfold's attention calls is inside of it."""
    inside: dict[str, float] = {}
    for event in profiler.events():
        if _within_attention(event) and event.name != ATTEND:
            inside[event.name] = inside.get(event.name, 0.0) + _own(event, on_gpu)
    operations = []
    for event in profiler.key_averages():
        if event.key.startswith(("decode ", "cuda", "cu")) or (on_gpu and not event.key.startswith(("aten::", "kvfold::"))):
            continue
        if event.key == ATTEND:
            microseconds = event.device_time_total if on_gpu else event.cpu_time_total
        else:
            microseconds = _own(event, on_gpu) - inside.get(event.key, 0.0)
        if microseconds > 0:
            counted = (ledger.calls[event.key], ledger.num_bytes[event.key], ledger.flops[event.key])
            operations.append(Operation(event.key, counted[0], microseconds / 1e6, counted[1], counted[2]))
    return sorted(operations, key=lambda x: -x.seconds)


def _within_attention(event: Any) -> bool:
    while event is not None:
        if event.name == ATTEND:
            return True
        event = event.cpu_parent
    return False


def _own(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def _utilisation(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.utilization(device))
    except (ModuleNotFoundError, RuntimeError):  # no pynvml, or no right to read the counters
        return None


def _write(found: DecodeProfile, folder: Path) -> None:
    title = f"{found.plan}, {found.context} tokens, kernel {found.kernel}, {found.roofs.device}"
    draw(found.roofs, found.operations, folder / "roofline.png", title)
    with replacing(folder / "operations.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["operation", "calls", "ms", "bytes", "flops", "flops_a_byte", "share_of_roof"])
        for x in found.operations:
            writer.writerow([x.name, x.calls, 1e3 * x.seconds, x.num_bytes, x.flops, x.intensity, x.share(found.roofs)])
    device = "cuda" if found.roofs.device != "CPU" else "cpu"
    with replacing(folder / "profile.json") as path:
        facts = asdict(found) | {"versions": versions(), "machine": machine(device)}
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if device == "cuda":
        with replacing(folder / "nsight.txt") as path:
            path.write_text("\n".join(nsight_commands(sys.argv, folder)) + "\n", encoding="utf-8")


def nsight_commands(arguments: Sequence[str], folder: Path) -> list[str]:
    """Command lines that run the same under NVIDIA's profilers, whose ranges are `prefill`, `decode N` and `kvfold::attend`."""
    command = shlex.join(["kvfold", *arguments[1:]])
    return [
        f"nsys profile --trace=cuda,nvtx --output={shlex.quote(str(folder / 'nsys'))} {command}",
        f"ncu --nvtx --nvtx-include 'decode 0/' --set roofline --export {shlex.quote(str(folder / 'ncu'))} {command}",
    ]
