"""Speed and bytes of one plan at one context length and batch size, measured in a process that does nothing else.

Peak memory is what the process needed beyond the loaded model. It is read from the kernel's own high-water mark where that can
be reset (Linux), from a sampling thread elsewhere, and from torch's allocator on a GPU; `peak_method` says which.
"""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from kvfold.kv_cache import KVCache
from kvfold.lab.generate import generate
from kvfold.models.adapter import cache as make_cache
from kvfold.models.step import describe
from kvfold.plan import Plan

_SAMPLE_S = 0.005
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Timing:
    """What one run of prefill and decode took.

    Attributes:
        ttft_ms: the prefill in chunks and the choice of the first token.
        token_ms: each decode step, for the whole batch.
        kv_bytes: `cache.nbytes` at the end, all sequences together.
        num_seen: tokens of each sequence that have been through the cache by then: the context and all new tokens but the last.
        fp16_bytes: K and V of those tokens in 16 bits, with nothing else.
        peak_bytes: the most memory used at once, beyond the loaded model.
        peak_method: how that was measured.
        kernel: what attended to the compressed segments.
        step: what computed decode steps: compiled layers, a CUDA graph, or transformers.
    """

    ttft_ms: float
    token_ms: tuple[float, ...]
    kv_bytes: int
    num_seen: int
    fp16_bytes: int
    peak_bytes: int
    peak_method: str
    kernel: str
    step: str


def measure(model: PreTrainedModel, ids: torch.Tensor, plan: str | Plan, num_new: int, chunk: int) -> Timing:
    """Prefills `ids [B, S] long` in chunks and decodes greedily, after a short warm-up of the same plan and batch size.

    Args:
        num_new: tokens to generate, 2 or more; end tokens do not stop it.
        chunk: tokens prefilled at a time.

    Raises:
        PlanError: the plan can't be read, or does not suit this model.
    """
    generate(model, ids[:, :_WARM_UP_TOKENS], make_cache(model, plan), 3, chunk=chunk)
    with peak_memory(ids.device) as peak:
        cache = make_cache(model, plan)
        run = generate(model, ids, cache, num_new, chunk=chunk)
    num_seen = cache.get_seq_length()
    return Timing(
        ttft_ms=run.ttft_ms,
        token_ms=run.token_ms,
        kv_bytes=cache.nbytes,
        num_seen=num_seen,
        fp16_bytes=2 * len(ids) * num_full_elements(cache, num_seen),
        peak_bytes=peak.num_bytes,
        peak_method=peak.method,
        kernel=cache.kernel,
        step=describe(model),
    )


def num_full_elements(cache: KVCache, num_seen: int) -> int:
    """The numbers in K and V of one sequence of `num_seen` tokens when nothing is dropped.

    Layers with a sliding window count with what they hold by themselves: no plan takes credit for the model's own window.
    """
    per_token = 2 * cache.fingerprint["num_kv_heads"] * cache.fingerprint["head_dim"]
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    return int(per_token * sum(num_seen if window is None else min(num_seen, window - 1) for window in windows))


def nbytes_in_16_bits(cache: KVCache) -> int:
    """`cache.nbytes` as it is for a model in 16 bits: dense keys and values of one in float32 count half.

    Quality is measured in float32, as bfloat16's noise hides what 8 bits cost; models are served in bfloat16.
    """
    dense = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, name, tensor in cache.tensors()
        if tensor.dtype == torch.float32 and name.rpartition(".")[2] in ("k", "v", "x")
    }
    return cache.nbytes - sum(dense.values()) // 2


# -- peak memory -------------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most memory that was used inside a `peak_memory` block beyond what was in use at its start."""

    method: str
    num_bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the peak memory of a block; the result is there when the block has ended."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        peak = Peak("torch.cuda.max_memory_allocated beyond the loaded model")
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    give_back_free_memory()
    if _reset_high_water_mark():
        before = _status_bytes("VmRSS")
        peak = Peak("VmHWM of a fresh process beyond its resident memory with the model loaded")
        yield peak
        peak.num_bytes = max(0, _status_bytes("VmHWM") - before)
        return
    with _sampled(Peak(f"resident memory sampled every {1000 * _SAMPLE_S:g} ms, beyond that with the model loaded")) as peak:
        yield peak


def give_back_free_memory() -> None:
    """Hands what the warm-up freed back to the system (glibc only), or the peak would hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(fields[name].split()[0])


@contextmanager
def _sampled(peak: Peak) -> Iterator[Peak]:
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(_SAMPLE_S):
            peak.num_bytes = max(peak.num_bytes, process.memory_info().rss - before)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
