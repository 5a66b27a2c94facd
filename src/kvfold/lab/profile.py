"""Where the time of a generation goes: a trace, a table by operator, and FLOPs, as files in a folder."""

import csv
import errno
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel

from kvfold.files import make_folder, replacing
from kvfold.kv_cache import KVCache
from kvfold.lab.generate import Generation, generate
from kvfold.layer_cache import LayerCache
from kvfold.models.step import describe
from kvfold.models.weights import PackedLinear, bytes_by_form

TRACED_STEPS = 4
"""Decode steps in the trace: all look alike, and a trace of hundreds opens in no viewer."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations by formula: 2 for each multiply-add of a linear layer, and of q · k and p · v.

    Attributes:
        prefill: of the whole prompt, with attention to every earlier token; a plan that evicts needs less.
        decode_token: of one more token of each sequence, with attention to what the cache holds at the end.
    """

    prefill: int
    decode_token: int


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds. Times are of the run without the profiler, which slows every operator down.

    Attributes:
        profiled_steps: decode steps in the trace, after the prefill.
        profiled_flops: what the profiler counts in them: matrix products, by their shapes, compiled ones left out.
        step: what computes decoder layers while tokens come one by one.
        weight_bytes: of the model's weights, by their form.
    """

    plan: str
    kernel: str
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    kv_bytes: int
    ttft_ms: float
    ms_per_token: float | None
    flops: Flops
    profiled_steps: int
    profiled_flops: int
    step: str
    weight_bytes: dict[str, int]


def profile(
    model: PreTrainedModel,
    make_cache: Callable[[], KVCache],
    input_ids: torch.Tensor,
    generation: Generation,
    cache: KVCache,
    chunk: int,
    folder: Path,
) -> Summary:
    """Runs the prompt and a few decode steps again under torch.profiler and writes what it saw.

    Files: `trace.json` (opens in Perfetto or chrome://tracing), `operators.csv` and `operators.txt` (time and memory by
    operator), `summary.json`.

    Args:
        make_cache: an empty cache of the same plan.
        generation, cache: of the run before this one, without the profiler; the summary's times and bytes are theirs.

    FileError when the folder can't be written to.
    """
    make_folder(folder)
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = min(TRACED_STEPS, generation.tokens.shape[1] - 1)
    with torch.profiler.profile(activities=activities, profile_memory=True, with_flops=True) as profiler:
        generate(model, input_ids, make_cache(), steps + 1, chunk=chunk)
    events = profiler.key_averages()
    with replacing(folder / "trace.json") as path:
        write_trace(profiler, path)
    on_gpu = len(activities) > 1
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with replacing(folder / "operators.txt") as path:
        path.write_text(events.table(sort_by=order, row_limit=-1, max_name_column_width=60), encoding="utf-8")
    with replacing(folder / "operators.csv") as path:
        _write_operators(events, path, order)
    summary = Summary(
        plan=str(cache.plan),
        kernel=cache.kernel,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prompt_tokens=input_ids.shape[1],
        new_tokens=generation.tokens.shape[1],
        kv_bytes=cache.nbytes,
        ttft_ms=generation.ttft_ms,
        ms_per_token=statistics.median(generation.token_ms) if generation.token_ms else None,
        flops=count_flops(model, cache, input_ids, chunk),
        profiled_steps=steps,
        profiled_flops=sum(event.flops for event in events),
        step=describe(model),
        weight_bytes=bytes_by_form(model),
    )
    with replacing(folder / "summary.json") as path:
        path.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def count_flops(model: PreTrainedModel, cache: KVCache, input_ids: torch.Tensor, chunk: int) -> Flops:
    """See `Flops`. `input_ids`: `[B, S]`, the prompt; the head is computed for the last token of each chunk."""
    batch, prompt_len = input_ids.shape
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | PackedLinear)]
    linear = sum(m.in_features * m.out_features for m in linears if m is not head)
    in_head = head.in_features * head.out_features
    config = model.config.get_text_config(decoder=True)
    per_pair = 4 * config.num_attention_heads * cache.fingerprint["head_dim"]
    pairs = sum(_causal_pairs(prompt_len, getattr(layer, "sliding_window", None)) for layer in cache.layers)
    held = sum(_tokens_held(layer) for layer in cache.layers)
    prefill = 2 * linear * prompt_len + 2 * in_head * math.ceil(prompt_len / chunk) + per_pair * pairs
    decode = 2 * (linear + in_head) + per_pair * held
    return Flops(batch * prefill, round(batch * decode))


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _tokens_held(layer: Any) -> float:
    """Tokens of a sequence, the mean over sequences and heads."""
    if isinstance(layer, LayerCache):
        return statistics.mean(map(len, layer.kept_slots()))
    return float(layer.keys.shape[2])


def write_trace(profiler: Any, path: Path) -> None:
    profiler.export_chrome_trace(str(path))
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        if not file.read().rstrip().endswith(b'" }'):
            # The exporter keeps silent when the disk is full, and leaves its own temporary file.
            path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, "the trace is cut short", str(path))


def _write_operators(events: Any, path: Path, order: str) -> None:
    """One row an operator, the slowest first; times in microseconds, memory in bytes."""
    columns = {
        "operator": "key",
        "calls": "count",
        "self_cpu_us": "self_cpu_time_total",
        "cpu_us": "cpu_time_total",
        "self_device_us": "self_device_time_total",
        "device_us": "device_time_total",
        "self_cpu_bytes": "self_cpu_memory_usage",
        "cpu_bytes": "cpu_memory_usage",
        "self_device_bytes": "self_device_memory_usage",
        "device_bytes": "device_memory_usage",
        "flops": "flops",
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for event in sorted(events, key=lambda event: -getattr(event, order)):
            writer.writerow(getattr(event, attribute) for attribute in columns.values())
