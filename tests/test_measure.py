"""Bytes, time and peak memory of one run."""

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model

import kvfold
from kvfold.lab.generate import prefill
from kvfold.lab.measure import measure, nbytes_in_16_bits, peak_memory


def test_timing_counts_bytes_and_tokens() -> None:
    model = tiny_model()
    ids = torch.randint(0, VOCAB_SIZE, (3, 100), generator=torch.Generator().manual_seed(0))
    timing = measure(model, ids, "full", num_new=5, chunk=32)
    assert timing.num_seen == 104
    assert len(timing.token_ms) == 4
    assert timing.fp16_bytes == 2 * 3 * 104 * 2 * 2 * 2 * 16  # bytes, sequences, tokens, K and V, layers, heads, head dim
    assert timing.kv_bytes > 2 * timing.fp16_bytes  # the model is in float32


@pytest.mark.parametrize("plan", ["full", "int4", "h2o(25%)", "h2o(50%) | fp8", "dense | minicache", "transformers"])
def test_bytes_in_16_bits_are_those_of_a_model_in_16_bits(plan: str) -> None:
    ids = torch.randint(0, VOCAB_SIZE, (2, 200), generator=torch.Generator().manual_seed(0))
    caches = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        caches.append(kvfold.cache(model, plan))
        prefill(model, caches[-1], ids, 64)
    assert nbytes_in_16_bits(caches[0]) == caches[1].nbytes
    assert nbytes_in_16_bits(caches[1]) == caches[1].nbytes


def test_sliding_windows_are_no_merit_of_a_plan() -> None:
    model = tiny_model("gemma3_text")  # one of two layers has a window of 16
    ids = torch.randint(0, VOCAB_SIZE, (1, 100), generator=torch.Generator().manual_seed(0))
    timing = measure(model, ids, "full", num_new=2, chunk=32)
    assert timing.fp16_bytes == 2 * (101 + 15) * 2 * 2 * 16


def test_peak_memory_sees_a_large_tensor() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 60 * 2**20 < peak.num_bytes < 200 * 2**20
