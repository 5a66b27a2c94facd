"""Bytes are counted, not declared: what the cache says it holds is what a walk over its objects finds."""

import json
import subprocess
import sys

import pytest
import torch
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel

import kvfold
from kvfold.catalog import STRATEGIES
from kvfold.layer_cache import LayerCache
from kvfold.segment import ROOM


def _smollm2_shape(num_layers: int = 2) -> PreTrainedModel:
    """SmolLM2-135M's attention, with random weights and few layers, in bfloat16."""
    model = tiny_model(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, num_hidden_layers=num_layers,
        max_position_embeddings=8192,
    )  # fmt: skip
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_bytes_are_what_a_walk_over_the_storages_finds(name: str) -> None:
    model = sharp_model(num_hidden_layers=5)
    cache = kvfold.cache(model, name)
    assert cache.nbytes == held_bytes(cache, but=model) == _bytes_of_codecs(cache)
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (300, 170)])
    start = 0
    for size in [200, 70, 20, *[1] * 10]:
        _step(model, cache, ids, mask, start, size)
        start += size
        assert cache.nbytes == held_bytes(cache, but=model) > 0
        memory = cache.memory()
        assert memory.total == cache.nbytes == sum(memory.by_layer().values()) == sum(memory.by_component().values())
        assert memory.num_seen == start
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.nbytes == held_bytes(cache, but=model)


def _bytes_of_codecs(cache: kvfold.KVCache) -> int:
    """What codecs hold before any token has come: bases made from weights."""
    return sum(x.nbytes for layer in cache.layers if isinstance(layer, LayerCache) for x in layer.codec.constants().values())


def _step(model: PreTrainedModel, cache: kvfold.KVCache, ids: torch.Tensor, mask: torch.Tensor, start: int, size: int) -> None:
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start : start + size]
    with torch.no_grad():
        model(
            ids[:, start : start + size], attention_mask=mask[:, : start + size], position_ids=positions, past_key_values=cache
        )


def _tokens_in_bytes(layer: LayerCache) -> int:
    """What a layer's tokens take at the least: codes and their scales for the tokens in blocks, rounded up to whole blocks,
    dense vectors for the others; a slot for each where slots are kept, a score where there is one."""
    block, head_dim = layer.body.codec.block, layer.site.head_dim
    probe = torch.zeros(1, 1, block, head_dim)
    per_block = sum(x.nbytes for x in layer.body.codec.encode(probe, probe).values())
    scored = layer.plan.keep is not None and layer.plan.keep.scored
    blocks = sum(-(-n // block) for n in layer.body.counts().tolist())
    size = blocks * (per_block + (0 if layer.body.contiguous else block * 4) + block * 4 * scored)
    rows = layer.body.pool.table.shape[0]
    for run, extra in ((layer.sink, 0), (layer.recent, 4 * scored)):
        size += rows * run.width * (2 * head_dim * layer.dtype.itemsize + 4 + extra)
    return size


ALONE = ["nothing", "which tokens stay", "how tokens are held", "both"]


@pytest.mark.parametrize("name", sorted({n for n, s in STRATEGIES.items() if s.changes in ALONE} - {"transformers"}))
def test_no_storage_is_larger_than_its_tokens_need(name: str) -> None:
    """At most a sixty-fourth of a growing pool lies idle, or an eighth of one that shrinks; the table of blocks; and room for
    the next tokens where they come one by one."""
    model = sharp_model(num_hidden_layers=5)
    cache = kvfold.cache(model, name)
    model_inputs = tokens(2, 700)
    for step, size in enumerate([400, 200, 50, *[1] * 20, 30]):
        with torch.no_grad():
            model(model_inputs[:, :size], past_key_values=cache)
        for layer in cache.layers:
            assert isinstance(layer, LayerCache)
            held = sum(x.untyped_storage().nbytes() for name, x in layer.tensors() if not name.startswith("codec"))
            table = layer.body.pool.table.nbytes
            slack = 1 / 64 if layer.body.contiguous else 1 / 7
            room = 0 if layer.recent.room is None else (ROOM - 1) * layer.recent.nbytes // layer.recent.width
            assert held - table - room <= _tokens_in_bytes(layer) * (1 + slack), f"step {step}"


def test_no_copy_of_the_chunk_is_left_behind() -> None:
    """Keys and values of a chunk are views of larger tensors; the cache must not keep those alive."""
    model = sharp_model("phi3")  # one projection makes q, k and v
    for plan in ("full", "window(16)", "protect(sink=2, window=9) | int4", "protect(window=9) | int4"):
        for length in (6, 130):
            cache = kvfold.cache(model, plan)
            chunked(model, cache, tokens(1, length), None, [length])
            for _, name, tensor in cache.tensors():
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, name


@pytest.mark.parametrize(("plan", "share"), [("int8", 0.54), ("int4", 0.29), ("fp8", 0.54), ("int2", 0.17)])
def test_share_of_fp16_at_4096_tokens(plan: str, share: float) -> None:
    model = _smollm2_shape()
    cache = kvfold.cache(model, plan)
    chunked(model, cache, tokens(1, 4096), None, [512] * 8)
    fp16 = 2 * 2 * 3 * 64 * 2 * 4096
    assert held_bytes(cache, but=model) == cache.nbytes
    assert cache.nbytes / fp16 <= share
    full = kvfold.cache(model, "full")
    chunked(model, full, tokens(1, 4096), None, [512] * 8)
    assert fp16 <= full.nbytes <= 1.02 * fp16


def test_full_takes_no_more_than_transformers_own_cache() -> None:
    model = sharp_model()
    theirs = DynamicCache()
    chunked(model, theirs, tokens(2, 1000), None, [1000])
    mine = kvfold.cache(model, "full")
    chunked(model, mine, tokens(2, 1000), None, [1000])
    assert mine.nbytes <= 1.05 * held_bytes(theirs)


def test_evicted_tokens_free_their_memory() -> None:
    model = sharp_model()
    sizes = {}
    for plan in ("full", "h2o(25%)", "random(25%)", "window(25%)", "snapkv(25%)", "tova(25%)", "l2norm(25%, skip=0)"):
        cache = kvfold.cache(model, plan)
        chunked(model, cache, tokens(1, 2048), None, [512] * 4)
        sizes[plan] = cache.nbytes
    for plan, size in sizes.items():
        assert plan == "full" or size <= 0.31 * sizes["full"], plan  # 16 numbers of 4 bytes; slot and score are 1 / 16 of that


# -- peaks -------------------------------------------------------------------------------------------------------------------


def _peak(model: PreTrainedModel, plan: str, length: int, chunk: int) -> int:
    cache = kvfold.cache(model, plan)
    ids, peak = tokens(1, length), 0
    for start in range(0, length, chunk):
        with torch.no_grad():
            model(ids[:, start : start + chunk], past_key_values=cache)
        peak = max(peak, held_bytes(cache, but=model))
    return peak


@pytest.mark.parametrize("plan", ["sink_window(sink=4, window=508)", "h2o(512)", "h2o(512) | int4", "snapkv(512, heads=ada)"])
def test_what_is_held_while_a_long_prompt_is_read_is_bounded(plan: str) -> None:
    model = tiny_model(hidden_size=32, head_dim=8)
    assert _peak(model, plan, 8192, 512) <= 1.3 * _peak(model, plan, 2048, 512)


_RSS = """
import json, resource, sys, threading, time
import psutil, torch
sys.path.insert(0, "tests")
from tiny import tiny_model
import kvfold
from kvfold.lab.measure import give_back_free_memory
torch.set_num_threads(1)
model = tiny_model(hidden_size=256, head_dim=64, num_hidden_layers=8, num_key_value_heads=4, max_position_embeddings=16384)
process, length = psutil.Process(), int(sys.argv[1])
ids = torch.randint(4, 100, (1, length))

def prefill(n):
    cache = kvfold.cache(model, sys.argv[2])
    for start in range(0, n, 512):
        with torch.no_grad():
            model(ids[:, start : start + 512], past_key_values=cache, logits_to_keep=1)

prefill(1024)
give_back_free_memory()  # what is free by now would hide what is needed, more or less of it each time
before, peak, done = process.memory_info().rss, 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
prefill(length)
done = True
thread.join()
print(json.dumps(peak - before))
"""


@pytest.mark.slow
def test_resident_memory_while_a_long_prompt_is_read_is_bounded() -> None:
    """The whole process, not what is counted: above its state before, 8k tokens take no more than 2k and some noise."""

    def extra(length: int, plan: str) -> int:
        run = subprocess.run([sys.executable, "-c", _RSS, str(length), plan], check=True, capture_output=True, text=True)
        return int(json.loads(run.stdout))

    noise = 8 << 20
    short, long = (min(extra(n, "sink_window(4, 508)") for _ in range(2)) for n in (2048, 8192))
    assert long <= 1.3 * short + noise
    full = extra(8192, "full")
    assert full > 4 * 8192 * 4 * 64 * 8, "the measurement sees what a full cache holds"
