"""Decode steps that are captured and replayed, on a GPU that is not there (pretend_gpu.py).

Kernels run in Triton's interpreter. Without graphs the same model runs the same kernels, so that tokens must agree to rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import left_pad, sharp_model, tokens
from pretend_gpu import DEVICE, Graph, PretendGPU, pretend_gpu, with_kernels
from transformers import PreTrainedModel

import kvfold
from kvfold import sliding_layer
from kvfold.kernels import triton
from kvfold.layer_cache import LayerCache
from kvfold.models import graph, step
from kvfold.sliding_layer import SlidingLayer

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real GPUs"),
    pytest.mark.skipif(not triton.available(), reason="Triton is not installed: pip install 'kvfold[gpu]'"),
]

IDS = tokens(1, 160)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    with pretend_gpu(monkeypatch) as device:
        with_kernels(device, monkeypatch)
        yield device


def small_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_attention_heads": 2} | changes
    return sharp_model(family, **sizes).to(DEVICE)  # type: ignore[arg-type]


class Stream:
    """A model, a cache, and where in the text it is."""

    def __init__(
        self, model: PreTrainedModel, plan: str, prompt: int, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None
    ):
        self.model, self.cache, self.ids, self.at = model, kvfold.cache(model, plan), ids.to(DEVICE), 0
        self.mask = None if mask is None else mask.to(DEVICE)
        self.steps: list[str] = []
        device = PretendGPU.entered
        assert device is not None
        device.has_kernels = False  # the interpreter takes seconds for a prompt
        self.logits = [self.read(prompt)]
        device.has_kernels = True

    def read(self, num: int, **more: Any) -> torch.Tensor:
        span = slice(self.at, self.at + num)
        ids = self.ids[:, span]
        self.at += num
        if self.mask is not None:
            positions = (self.mask.cumsum(1) - 1).clamp_min(0)
            more |= {"attention_mask": self.mask[:, : self.at], "position_ids": positions[:, span]}
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **more).logits
        return logits[:, -1].cpu()

    def decode(self, num: int, **more: Any) -> "Stream":
        for _ in range(num):
            self.logits.append(self.read(1, **more))
            self.steps.append(step.describe(self.model))
        return self

    @property
    def graph(self) -> Any:
        return vars(self.model)["forward"]._steps[self.cache]._graph


def without_graphs(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Stream]) -> Stream:
    with monkeypatch.context() as patch:
        patch.setenv(graph.VARIABLE, "off")
        return make()


def agree(ours: Stream, theirs: Stream, tolerance: float = 1e-5) -> None:
    scale = max(float(x.abs().max()) for x in theirs.logits)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert float((a - b).abs().max()) < tolerance * scale
    layers = zip(ours.cache.layers, theirs.cache.layers, strict=True)
    for mine, other in layers:
        if isinstance(mine, SlidingLayer):
            assert mine.cumulative_length == other.cumulative_length
            torch.testing.assert_close(mine.keys.cpu(), other.keys.cpu(), atol=1e-3, rtol=1e-3)
            continue
        assert mine.kept_slots() == other.kept_slots()
        assert (mine.num_seen, mine.num_real) == (other.num_seen, other.num_real)
        if isinstance(mine, LayerCache) and other.body.pool.fields:
            for x, y in zip(mine.body.dense(), other.body.dense(), strict=True):
                assert torch.equal(x.cpu()[..., : y.shape[-1]], y.cpu())


def replays_as_one_by_one(run: Callable[[], Stream], monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-5) -> None:
    ours = run()
    assert set(ours.steps) == {"cuda-graph"}
    agree(ours, without_graphs(monkeypatch, run), tolerance)


@pytest.mark.parametrize(
    "plan",
    [
        "full",
        "int4",
        "int8(window=10)",
        "int2",
        "kivi(int4)",
        "fp8",
        "nf4",
        "int4(k_axis=token)",
        "turboquant(4)",
        "protect(sink=5) | fp8(e5m2)",
    ],
)
def test_tokens_come_as_they_do_one_by_one(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of a block, where tokens are encoded or rows get another one."""
    model = small_model()
    replays_as_one_by_one(lambda: Stream(model, plan, 126).decode(8), monkeypatch)


@pytest.mark.parametrize(
    "plan",
    [
        *("h2o(40)", "h2o(30%, recent=25%, sink=3, group=max)", "tova(40)", "snapkv(40, window=8)", "sieve(40)"),
        *("scissorhands(40, window=9)", "keydiff(40)", "window(30%)", "sink_window(sink=3, window=30)"),
        *("h2o(100) | fp8", "random(50%) | int8(k_axis=token)", "l2norm(100, skip=0) | kivi(int4, residual=16)"),
    ],
)
def test_one_comes_and_one_goes_as_one_by_one(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(num_key_value_heads=2, num_attention_heads=4)
    replays_as_one_by_one(lambda: Stream(model, plan, 100).decode(5), monkeypatch)


@pytest.mark.parametrize("plan", ["h2o(60%) | int4", "window(126) | int4", "h2o(60%)", "l2norm(50, skip=1) | fp8"])
def test_blocks_fill_while_tokens_go(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recent is encoded, or rows get one block more; two sequences, two layers, of which one may keep everything."""
    model, ids = small_model(num_hidden_layers=2), tokens(2, 220)
    # Probabilities in half precision meet other neighbours where the newest token is a segment of its own.
    widths: list[int] = []

    def held(stream: Stream) -> int:
        body = stream.cache.layers[1].body
        return body.num_tokens()[0] if "int4" in plan else body.width

    def run() -> Stream:
        stream = Stream(model, plan, 212, ids)
        widths.append(held(stream))
        stream.decode(7)
        widths.append(held(stream))
        return stream

    replays_as_one_by_one(run, monkeypatch, 1e-3)
    assert plan.startswith("l2norm") or widths[1] > widths[0] + 8


@pytest.mark.parametrize("plan", ["int4", "h2o(50) | fp8", "sink_window(sink=3, window=50) | int4"])
def test_a_replay_waits_for_nothing_and_copies_nothing(plan: str, gpu: PretendGPU) -> None:
    stream = Stream(small_model(num_hidden_layers=2), plan, 125).decode(1)
    ids = stream.ids[:, 126:127]
    gpu.waits.clear()
    gpu.uploads.clear()
    with torch.no_grad():
        stream.model(input_ids=ids, past_key_values=stream.cache, use_cache=True)
    assert not gpu.waits
    assert not gpu.uploads


def test_a_graph_holds_over_blocks_that_fill(gpu: PretendGPU) -> None:
    """The pool grows by a sixteenth, and so a graph is seldom captured anew."""
    stream = Stream(small_model(), "int4", 130)
    layer = stream.cache.layers[0]
    marks = set()
    for _ in range(3):
        for _ in range(64):
            tail = layer.static_tail()
            layer.num_seen += 1
            layer.took_statically()
            layer.num_seen -= 1
        marks.add(tail.mark)
    assert len(marks) == 3  # of two blocks a sixteenth is none
    del marks
    layer.body.pool.reserve(40, 40)
    marks = set()
    for _ in range(3):
        marks.add(layer.static_tail().mark)
        for _ in range(layer.static_tail().left):
            layer.took_statically()
    assert len(marks) == 1


def test_a_batch(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(), tokens(3, 140)
    replays_as_one_by_one(lambda: Stream(model, "int4", 130, ids).decode(4), monkeypatch)


@pytest.mark.parametrize("plan", ["int4", "full", "protect(sink=3) | fp8"])
def test_a_padded_batch(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows fill their blocks one after the other."""
    model = small_model()
    ids, mask = left_pad([tokens(1, n + 20, seed=n)[0] for n in (140, 61, 126)])
    replays_as_one_by_one(lambda: Stream(model, plan, 136, ids, mask).decode(8), monkeypatch)


@pytest.mark.parametrize("plan", ["int4", "full", "h2o(70) | int4"])
def test_what_happens_between_tokens(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, bytes asked for, cropping, copies and files leave the next tokens what they are without graphs."""
    model = small_model()

    def run() -> Stream:
        stream = Stream(model, plan, 120).decode(3)
        stream.logits.append(stream.read(4))
        stream.decode(2)
        assert stream.cache.nbytes > 0
        stream.decode(1)
        stream.cache.crop(-5)
        stream.at -= 5
        stream.decode(2)
        copied = stream.cache.copy()
        stream.decode(1)
        stream.cache, stream.at = copied, stream.at - 1
        return stream.decode(3)

    replays_as_one_by_one(run, monkeypatch)


def test_a_cache_that_was_emptied(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other memory, a graph of its own: the one before wrote to what is gone."""
    model = small_model()

    def run() -> Stream:
        stream = Stream(model, "int4", 70).decode(2)
        for start in (5, 9):
            stream.cache.reset()
            stream.at = start
            stream.logits.append(stream.read(64 + start))
            stream.decode(2)
        return stream

    replays_as_one_by_one(run, monkeypatch)


def test_caches_take_turns(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()

    def run() -> list[Stream]:
        streams = [Stream(model, "int4", 100), Stream(model, "full", 60, tokens(1, 100, seed=1))]
        for _ in range(3):
            for stream in streams:
                stream.decode(1)
        return streams

    for ours, theirs in zip(run(), without_graphs(monkeypatch, run), strict=True):  # type: ignore[arg-type]
        agree(ours, theirs)


def test_beams_and_greedy_search(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generated(**more: Any) -> torch.Tensor:
        result = model.generate(IDS[:, :20].to(DEVICE), past_key_values=kvfold.cache(model, "int4"), **settings, **more)
        tokens: torch.Tensor = result.cpu()
        return tokens

    for more in ({}, {"num_beams": 2}):
        ours = generated(**more)
        monkeypatch.setenv(graph.VARIABLE, "off")
        assert torch.equal(ours, generated(**more))
        monkeypatch.delenv(graph.VARIABLE)
    generated()
    assert step.describe(model) == "cuda-graph"


@pytest.mark.parametrize(
    ("plan", "more", "why"),
    [
        ("quest(128, skip=0) | int4", {}, "its plan does more than to put a token behind the last one"),
        ("expected(50%)", {}, "expected reads numbers back from the device"),
        ("h2o(50%, heads=ada)", {}, "heads share a budget"),
        ("h2o(64KiB)", {}, "a budget of bytes has no place for what a captured step holds"),
        ("protect(window=8) | fp8", {}, "each token pushes another one out of its dense window"),
        ("gear(int4)", {}, "the Triton kernels don't read its codec"),
        ("int4", {"output_hidden_states": True}, "output_hidden_states asked for"),
        ("int4", {"attention_mask": torch.tensor([[1] * 100 + [0]])}, "the newest token is padding"),
    ],
)
def test_why_not(plan: str, more: dict[str, Any], why: str, gpu: PretendGPU) -> None:
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    stream = Stream(small_model(), plan, 100).decode(1, **given)
    assert stream.steps == [f"transformers, without a graph: {why}"]


@pytest.mark.parametrize(("family", "plan"), [("gemma2", "int4"), ("gemma3_text", "h2o(30) | fp8")])
def test_layers_with_windows_of_their_own(family: str, plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are full, and one that fills while it grows."""
    monkeypatch.setattr(sliding_layer, "GROWTH", 8)
    for window, prompt in ((16, 60), (40, 30)):
        model = small_model(family, num_hidden_layers=2, sliding_window=window)
        replays_as_one_by_one(lambda: Stream(model, plan, prompt).decode(9), monkeypatch, 1e-4)  # noqa: B023


def test_padding_in_windows(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("gemma3_text", num_hidden_layers=2, sliding_window=24)
    ids, mask = left_pad([tokens(1, n + 20, seed=n)[0] for n in (30, 12)])
    replays_as_one_by_one(lambda: Stream(model, "int4", 26, ids, mask).decode(8), monkeypatch, 1e-4)


def test_gradients_and_listeners(gpu: PretendGPU) -> None:
    model = small_model()
    stream = Stream(model, "int4", 100)
    model(input_ids=stream.ids[:, 100:101], past_key_values=stream.cache, use_cache=True)
    assert step.describe(model) == "transformers, without a graph: gradients are on"
    heard: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
    stream.decode(1)
    assert heard
    hook.remove()
    assert stream.decode(1).steps == ["transformers, without a graph: someone listens to a part of the model", "cuda-graph"]


def test_other_weights_are_seen(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()

    def run() -> Stream:
        torch.manual_seed(1)
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(torch.randn(100, 64, device=DEVICE))
        stream = Stream(model, "int4", 100).decode(2)
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(torch.randn(100, 64, device=DEVICE))
        return stream.decode(2)

    replays_as_one_by_one(run, monkeypatch)


@pytest.mark.parametrize("plan", ["int4", "h2o(50) | fp8", "sieve(50)"])
def test_a_replay_that_differs_is_not_used(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has done is undone: under a keep policy a token is gone."""
    model = small_model()
    theirs = without_graphs(monkeypatch, lambda: Stream(model, plan, 100).decode(3))
    replay = Graph.replay

    def wrong(self: Graph) -> None:
        replay(self)
        self.made[-1].zero_()

    monkeypatch.setattr(Graph, "replay", wrong)
    ours = Stream(model, plan, 100).decode(3)
    assert all("a replay differs from its operations one by one" in how for how in ours.steps)
    agree(ours, theirs)


@pytest.mark.parametrize("plan", ["int4", "h2o(50) | fp8"])
def test_a_step_that_waits_is_not_captured(plan: str, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x) * float(x.abs().max() > 0))
    ours = Stream(model, plan, 100).decode(2)
    assert all(how.startswith("transformers, without a graph: the step can't be captured") for how in ours.steps)
    agree(ours, without_graphs(monkeypatch, lambda: Stream(model, plan, 100).decode(2)))


def test_detached_models_have_their_own_forward(gpu: PretendGPU) -> None:
    model = small_model()
    Stream(model, "int4", 100)
    assert "forward" in vars(model)
    kvfold.detach(model)
    assert "forward" not in vars(model)
    assert step.describe(model) == "transformers"


def test_a_step_s_memory_is_counted(gpu: PretendGPU) -> None:
    stream = Stream(small_model(), "int4", 100).decode(1)
    layer = stream.cache.layers[0]
    tail = layer.static_tail()
    held = {x.untyped_storage().data_ptr() for _, _, x in stream.cache.tensors()}
    assert {x.untyped_storage().data_ptr() for _, x in tail.tensors()} <= held


def test_a_forgotten_cache_frees_its_graph(gpu: PretendGPU) -> None:
    stream = Stream(small_model(), "int4", 100).decode(1)
    steps = vars(stream.model)["forward"]._steps
    assert len(steps) == 1
    del stream.cache
    assert not len(steps)


def test_a_word_that_is_not_known(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graph.VARIABLE, "no")
    with pytest.raises(graph.GraphError, match="may be 'off'"):
        Stream(small_model(), "int4", 100).decode(1)
