"""Everything on a GPU, as far as one that is not there can tell: pretend_gpu.py says what that is."""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import left_pad, sharp_model, tokens
from pretend_gpu import DEVICE, PretendGPU, pretend_gpu
from tiny import tiny_model_folder
from transformers import PreTrainedModel
from typer.testing import CliRunner

import kvfold
from kvfold.catalog import STRATEGIES, resolve
from kvfold.cli.main import app
from kvfold.errors import PlanError
from kvfold.lab.generate import generate
from kvfold.lab.measure import measure
from kvfold.lab.quality import reference_of, stream_quality

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real GPUs")

IDS = tokens(2, 170)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    with pretend_gpu(monkeypatch) as device:
        yield device


@contextlib.contextmanager
def in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's compiled kernels round otherwise than the reference."""
    with monkeypatch.context() as patch:
        patch.setenv("KVFOLD_CPU", "off")
        yield


def model_on(device: str) -> PreTrainedModel:
    return sharp_model().to(device)  # type: ignore[arg-type]


def logits_of(model: PreTrainedModel, plan: str, ids: torch.Tensor) -> torch.Tensor:
    """A prompt in two chunks, and ten tokens one by one."""
    cache = kvfold.cache(model, plan)
    with torch.no_grad():
        parts = ids.split([100, 60, *[1] * 10], 1)
        return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "transformers"])
def test_every_strategy_computes_what_it_computes_on_a_cpu(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = str(resolve(strategy))
    with in_plain_torch(monkeypatch):
        wanted = logits_of(model_on("cpu"), plan, IDS[:1])
    with pretend_gpu(monkeypatch):
        got = logits_of(model_on(DEVICE), plan, IDS[:1].to(DEVICE)).cpu()
    assert torch.equal(got, wanted)


def a_life(model: PreTrainedModel, plan: str, device: str, folder: Path) -> list[Any]:
    """What a cache goes through: padding, beams, cropping, other sequences, a copy, a file; and what comes out of it."""
    ids, mask = (x.to(device) for x in left_pad([IDS[0, :133], IDS[1, :150]]))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seen: list[Any] = []
    cache = kvfold.cache(model, plan)
    beams = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, num_beams=2, **settings)
    cache = kvfold.cache(model, plan)
    greedy = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=66, **settings)
    seen += [beams.cpu(), greedy.cpu()]
    cache.crop(-3)
    cache.batch_select_indices(torch.tensor([1, 0]))
    mask = torch.cat([mask, mask.new_ones(2, cache.get_seq_length() + 1 - mask.shape[1])], 1)[[1, 0]]
    caches = [copy.deepcopy(cache), cache]
    try:
        cache.save(folder / f"{device[:3]}.safetensors")
        caches.append(kvfold.load_cache(folder / f"{device[:3]}.safetensors", model))
    except PlanError as error:
        seen.append(str(error))
    for each in caches:
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1)[:, -1:]
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": each}
            seen.append(model(input_ids=ids[:, :1], use_cache=True, **given).logits.cpu())
        seen.append(str(each.memory()))
    cache.reset()
    return seen


@pytest.mark.parametrize(
    "plan",
    [
        "full",
        "int4",
        "fp8",
        "h2o(50%) | int4",
        "snapkv(50%, heads=ada)",
        "quest(25%) | int4",
        "protect(sink=16, window=32) | int8 | minicache(start=50%)",
        "int4 | tier(device=25%, host)",
    ],
)
def test_a_whole_life(plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with in_plain_torch(monkeypatch):
        wanted = a_life(model_on("cpu"), plan, "cpu", tmp_path)
    with pretend_gpu(monkeypatch):
        got = a_life(model_on(DEVICE), plan, DEVICE, tmp_path)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_cache_goes_from_a_cpu_to_a_gpu_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with in_plain_torch(monkeypatch):
        model = model_on("cpu")
        cache = kvfold.cache(model, "int4")
        generate(model, IDS, cache, 2)
        cache.save(tmp_path / "cache.safetensors")
        wanted = model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True).logits
    with pretend_gpu(monkeypatch):
        model = model_on(DEVICE)
        cache = kvfold.load_cache(tmp_path / "cache.safetensors", model)
        got = model(input_ids=IDS[:, :1].to(DEVICE), past_key_values=cache, use_cache=True).logits
        assert torch.equal(got.cpu(), wanted)


def test_measurements(gpu: PretendGPU) -> None:
    model, ids = model_on(DEVICE), IDS[:1].to(DEVICE)
    timing = measure(model, ids[:, :120], "int4", 4, 64)
    assert timing.token_ms == (1.0,) * 3  # what events of this device say
    assert timing.kernel == "torch-reference"
    assert timing.step == "transformers, without a graph: attention is not Triton's"
    assert timing.peak_method.startswith("torch.cuda.max_memory_allocated")
    reference = reference_of(model, ids[:, :150], 75, 32, 4, lambda _: None)
    assert stream_quality(model, ids[:, :150], "full", reference, lambda _: None).kl < 1e-6
    assert 0 < stream_quality(model, ids[:, :150], "int2", reference, lambda _: None).kl < 10


def test_sampling(gpu: PretendGPU) -> None:
    model = model_on(DEVICE)
    one, two = (generate(model, IDS.to(DEVICE), kvfold.cache(model, "int4"), 5, temperature=0.7, seed=3) for _ in "ab")
    assert torch.equal(one.tokens.cpu(), two.tokens.cpu())


def test_the_command_line(gpu: PretendGPU, tmp_path: Path) -> None:
    folder, runner = tiny_model_folder(tmp_path / "model"), CliRunner()
    asked = [
        "generate",
        "--model",
        str(folder),
        "--device",
        DEVICE,
        "--plan",
        "int4",
        "--prompt",
        "hello",
        "--max-new-tokens",
        "3",
    ]
    for weights in ("dense", "int4"):
        result = runner.invoke(app, [*asked, "--weights", weights])
        assert result.exit_code == 0, result.output
        assert "kernel torch-reference | step transformers, without a graph: attention is not Triton's" in result.output
    assert re.search(r"gpu kernel +torch-reference\n", runner.invoke(app, ["info"]).output)
    assert "this machine has 1 GPU" in str(runner.invoke(app, [*asked[:3], "--device", "cuda:3", *asked[5:]]).exception)


# -- the device itself -------------------------------------------------------------------------------------------------------


def test_two_devices_in_one_operation_are_refused(gpu: PretendGPU) -> None:
    x = torch.ones(3, device=DEVICE)
    assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3  # numbers may come from anywhere
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(3)])


def test_waits_and_copies_are_seen(gpu: PretendGPU) -> None:
    x = torch.arange(6, device=DEVICE)
    assert not gpu.waits
    assert not gpu.uploads
    assert bool((x > 2).any())
    assert len(x[x > 2]) == 3
    assert x.tolist() == [*range(6)]
    assert len(gpu.waits) >= 3
    x + torch.tensor([1], device=DEVICE)
    assert x[torch.tensor([0, 1])].shape == (2,)
    assert len(gpu.uploads) == 2


def test_a_graph_computes_again_on_the_same_memory(gpu: PretendGPU) -> None:
    x, total, graph = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = 2 * x
        total.add_(doubled[0])
    assert total.tolist() == [0.0] * 3  # nothing is computed while it is captured
    for expected in (2.0, 4.0):
        graph.replay()
        assert total.tolist() == [expected] * 3
    x.fill_(5)
    graph.replay()
    assert doubled.tolist() == [10.0] * 3
    assert total.tolist() == [14.0] * 3
    with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.tolist()


def test_a_copy_of_a_tensor_is_another_one(gpu: PretendGPU) -> None:
    x = torch.ones(3, device=DEVICE)
    y = copy.deepcopy(x)
    y.fill_(2)
    assert x.tolist() == [1.0] * 3
