"""A saved cache goes on exactly as the one that was saved, and a file that is not whole or not ours is refused."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, tiny_model
from transformers import PreTrainedModel

import kvfold
from kvfold import persist
from kvfold.errors import FileError
from kvfold.kv_cache import KVCache
from kvfold.lab.generate import prefill

PLANS = [
    "full",
    "int4",
    "int8(k_axis=token)",
    "int2",
    "fp8",
    "kivi(int2)",
    "nf4",
    "turboquant(3)",
    "kvquant(3)",
    "gear(int4, rank=2)",
    "lowrank(50%, tokens=64)",
    "lorc(codes=int8)",
    "layers(0=int8) | int4",
    "h2o(80) | gear(int4, rank=2)",
    "snapkv(64) | lorc",
    "protect(sink=16, window=32) | int8",
    "hybrid(edge=1, edge_store=int8) | int4",
    "window(40)",
    "sink_window(sink=4, window=36)",
    "h2o(50%)",
    "h2o(80, heads=ada) | int4",
    "snapkv(64) | int8(k_axis=token)",
    "tova(30)",
    "random(48) | fp8",
    "l2norm(25%, skip=0) | kivi(int4)",
    "sieve(40)",
    "expected(40, refresh_every=7)",
    "kvzip(30%) | int8(k_axis=token)",
    "lagkv(60, lag=16) | int4",
    "keydiff(40, layers=pyramid)",
    "scissorhands(40)",
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def filled(model: PreTrainedModel, plan: str, batch: int = 1, length: int = 150) -> KVCache:
    cache = kvfold.cache(model, plan)
    prefill(model, cache, prompt(batch, length), chunk=64)
    return cache


@torch.no_grad()
def continue_with(model: PreTrainedModel, cache: KVCache, steps: int = 80, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of a chunk of 70 tokens and then of single ones: enough for new blocks, evictions and merges."""
    batch = cache.layers[-1].batch_size
    tokens = prompt(batch, 70 + steps, seed=1)
    logits = []
    for ids in [tokens[:, :70], *tokens[:, 70:].split(1, dim=1)]:
        inputs = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, ids.shape[1])], 1)
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -ids.shape[1] :]}
        logits.append(model(ids, past_key_values=cache, **inputs).logits)
    return torch.cat(logits, 1)


def assert_same_future(model: PreTrainedModel, cache: KVCache, path: Path, mask: torch.Tensor | None = None) -> None:
    cache.save(path)
    loaded = kvfold.load_cache(path, model)
    assert str(loaded.plan) == str(cache.plan)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert loaded.nbytes <= cache.nbytes
    assert torch.equal(continue_with(model, loaded, mask=mask), continue_with(model, cache, mask=mask))


@pytest.mark.parametrize("plan", PLANS)
def test_continues_exactly(model: PreTrainedModel, plan: str, tmp_path: Path) -> None:
    assert_same_future(model, filled(model, plan, batch=2), tmp_path / "cache")


@pytest.mark.parametrize("plan", ["full", "int4", "h2o(50%) | int4", "sink_window(sink=4, window=36)"])
def test_continues_exactly_with_padding(model: PreTrainedModel, plan: str, tmp_path: Path) -> None:
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[0, :90] = 0
    mask[2, :13] = 0
    cache = kvfold.cache(model, plan)
    prefill(model, cache, prompt(3, 150), chunk=64, attention_mask=mask)
    assert_same_future(model, cache, tmp_path / "cache", mask)


@pytest.mark.parametrize("length", [5, 60, 150])  # before, at and beyond the windows of 16
@pytest.mark.parametrize("plan", ["int4", "h2o(50%)"])
def test_layers_with_a_sliding_window(plan: str, length: int, tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    assert_same_future(model, filled(model, plan, length=length), tmp_path / "cache")


@pytest.mark.parametrize("plan", ["full", "int4", "h2o(50%) | int8(k_axis=token)"])
def test_beams_still_share_their_blocks(model: PreTrainedModel, plan: str, tmp_path: Path) -> None:
    cache = filled(model, plan)
    single = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.nbytes < 3 * single
    assert_same_future(model, cache, tmp_path / "cache")


def test_an_empty_cache(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    kvfold.cache(model, "int4").save(path)
    loaded = kvfold.load_cache(path, model)
    assert loaded.get_seq_length() == 0
    assert loaded.nbytes == 0
    prefill(model, loaded, prompt(1, 20))


def test_writes_no_idle_blocks(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(model, "int4", length=300)
    cache.crop(-200)
    path = tmp_path / "cache"
    cache.save(path)
    header = 8192
    assert path.stat().st_size < cache.nbytes + header
    assert kvfold.load_cache(path, model).nbytes <= cache.nbytes


def test_saves_over_an_older_file_and_leaves_nothing_else(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("older")
    filled(model, "int4").save(path)
    kvfold.load_cache(path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


# -- what can't be saved or loaded --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    filled(model, "int4").save(path)
    return path


def refused(path: Path, model: PreTrainedModel, message: str) -> None:
    """Loading fails with one line that matches, and leaves the model alone."""
    kvfold.detach(model)
    attention = model.config._attn_implementation
    with pytest.raises(FileError, match=message) as caught:
        kvfold.load_cache(path, model)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert model.config._attn_implementation == attention


def test_every_flipped_byte_is_noticed(saved: Path, model: PreTrainedModel) -> None:
    content = bytearray(saved.read_bytes())
    for at in [*range(0, 16), *range(20, len(content), len(content) // 60), len(content) - 1]:
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        saved.write_bytes(damaged)
        with pytest.raises(FileError):
            kvfold.load_cache(saved, model)


@pytest.mark.parametrize("kept", [0, 3, 8, 500, 0.5, 0.999])
def test_a_file_cut_short(saved: Path, model: PreTrainedModel, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    refused(saved, model, "not a safetensors file, or was cut short")


def test_not_a_safetensors_file(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a cache at all, but long enough to look like one to a hasty reader")
    refused(path, model, "not a safetensors file")


def test_a_foreign_safetensors_file(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(4)}, path, {"format": "pt"})
    refused(path, model, "no cache that kvfold saved")


def test_a_missing_file_and_a_folder(tmp_path: Path, model: PreTrainedModel) -> None:
    refused(tmp_path / "nowhere", model, "no such file")
    refused(tmp_path, model, "is a folder")


def rewritten(path: Path, version: int = persist.VERSION, **changes: object) -> None:
    """The same file with another header, and a checksum that fits."""
    metadata = persist.safe_open(path, framework="pt").metadata()
    header = json.dumps({**json.loads(metadata["header"]), **changes})
    tensors = load_file(path)
    metadata |= {"header": header, "version": str(version), "sha256": persist._digest(header, tensors)}
    save_file(tensors, path, metadata)


def test_another_format_version(saved: Path, model: PreTrainedModel) -> None:
    rewritten(saved, version=99)
    refused(saved, model, "version 99")


def test_a_plan_that_this_version_does_not_know(saved: Path, model: PreTrainedModel) -> None:
    rewritten(saved, plan="int4plus")
    refused(saved, model, "unknown method 'int4plus'")


def test_a_plan_whose_defaults_have_changed(saved: Path, model: PreTrainedModel) -> None:
    rewritten(saved, meaning="Int4(k_group=32)", kvfold="0.0.9")
    refused(saved, model, r"saved by kvfold 0\.0\.9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_layers is 2 there and 3 here"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 2 there and 4 here"),
        ({"head_dim": 32}, "head_dim is 16 there and 32 here"),
        ({"vocab_size": 101}, "vocab_size is 100 there and 101 here"),
        ({"seed": 1}, "other weights"),
    ],
)
def test_another_model(saved: Path, changes: dict[str, int], message: str) -> None:
    refused(saved, tiny_model(**changes), message)


def test_another_family(saved: Path) -> None:
    refused(saved, tiny_model("qwen3"), "model_type is llama there and qwen3 here")


def test_another_type(saved: Path) -> None:
    refused(saved, tiny_model().to(torch.bfloat16), "saved with a model in float32, and this one is in bfloat16")


def test_a_folder_that_is_not_there(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file or folder"):
        filled(model, "int4").save(tmp_path / "nowhere" / "cache")


def test_a_full_disk_keeps_the_older_file(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FileError, match=re.escape(str(path))):
            filled(model, "full").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
