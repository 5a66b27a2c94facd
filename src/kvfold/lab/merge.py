"""From measurements to records: repeats become medians and percentiles, speed and quality of a strategy meet in one row."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kvfold.lab.results import Measurement, Record, Setting


def merge(measurements: Sequence[Measurement], setting: Setting, names: Mapping[str, str]) -> list[Record]:
    """One record for each plan, context and batch size that was measured, in the order of the measurements.

    Args:
        names: of plans, name to text; a plan that has none, from an earlier run, is found in the catalog or called by its text.
    """
    plan_names = {plan: name for name, plan in names.items()}
    timings: dict[tuple[str, int, int], list[Measurement]] = {}
    qualities: dict[tuple[str, int], Measurement] = {}
    for m in measurements:
        if m.cell.kind == "timing":
            timings.setdefault((m.cell.plan, m.cell.context, m.cell.batch), []).append(m)
        else:
            qualities[m.cell.plan, m.cell.context] = m
    keys = list(timings)
    timed = {(plan, context) for plan, context, _ in keys}
    keys += [(plan, context, 1) for plan, context in qualities if (plan, context) not in timed]
    return [
        _record(plan_names.get(key[0]) or _catalog_name(key[0]), key, timings.get(key, []), qualities.get(key[:2]), setting)
        for key in keys
    ]


def _record(
    name: str, key: tuple[str, int, int], timings: list[Measurement], quality: Measurement | None, setting: Setting
) -> Record:
    plan, context, batch = key
    last = max([*timings, *([quality] if quality else [])], key=lambda m: m.date)
    found = _quality_fields(quality) | (_timing_fields(timings, batch) if timings else _bytes_of(quality, setting))
    shared = asdict(setting)
    return Record(
        strategy=name,
        plan=plan,
        context=context,
        batch=batch,
        **(shared | found),
        git_commit=last.git_commit,
        date=last.date,
    )


def _timing_fields(timings: list[Measurement], batch: int) -> dict[str, Any]:
    runs = [m.result for m in timings]
    steps = [ms for run in runs for ms in run["token_ms"]]
    p20, p50, p80 = (float(p) for p in np.percentile(steps, [20, 50, 80]))
    first = runs[0]
    return {
        "kv_bytes": first["kv_bytes"],
        "kv_bytes_per_token": first["kv_bytes"] / (batch * first["num_seen"]),
        "compression": first["fp16_bytes"] / first["kv_bytes"],
        "ttft_ms": statistics.median(run["ttft_ms"] for run in runs),
        "ms_per_token_p20": p20,
        "ms_per_token_p50": p50,
        "ms_per_token_p80": p80,
        "tokens_per_s": 1000 * batch * len(steps) / sum(steps),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "peak_method": first["peak_method"],
        "kernel": first["kernel"],
        "step": first["step"],
        "repeats": len(runs),
    }


def _bytes_of(quality: Measurement | None, setting: Setting) -> dict[str, Any]:
    """Bytes of the quality run, where speed was not measured; the record's type is then that of the quality run."""
    assert quality is not None
    kv_bytes, context = quality.result["kv_bytes"], quality.cell.context
    return {
        "kv_bytes": kv_bytes,
        "kv_bytes_per_token": kv_bytes / context,
        "compression": 16 / quality.result["bits_per_element"],
        "dtype": setting.quality_dtype,
        "kernel": quality.result["kernel"],
        "repeats": 0,
    } | dict.fromkeys(
        ("ttft_ms", "ms_per_token_p20", "ms_per_token_p50", "ms_per_token_p80", "tokens_per_s", "peak_bytes", "peak_method")
    )


def _quality_fields(quality: Measurement | None) -> dict[str, Any]:
    names = ("perplexity", "perplexity_full", "kl", "top1", "rouge_l_full", "rouge_l_text", "continuation")
    result = quality.result if quality else {}
    return {name: result.get(name) for name in names} | {"quality_prefill_len": result.get("prefill_len")}


def _catalog_name(plan: str) -> str:
    from kvfold.catalog import STRATEGIES, resolve

    return next((name for name in STRATEGIES if str(resolve(name)) == plan), plan)
