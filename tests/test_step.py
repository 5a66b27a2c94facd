"""The compiled step of decoder layers against the model's own code, and when it must not be used."""

import pytest
import torch
from oracle import left_pad, sharp_model, tokens
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import kvfold
from kvfold.kernels import cpu
from kvfold.kernels.cpu import step as native
from kvfold.layer_cache import LayerCache
from kvfold.models import step
from kvfold.models.weights import quantize_linears
from kvfold.segment import ROOM

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")

COMPILED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]


def _streamed(model: PreTrainedModel, plan: str, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = kvfold.cache(model, plan)
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], 1)


def _own(model: PreTrainedModel, plan: str, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    kvfold.attach(model)
    step.uninstall(model)
    return _streamed(model, plan, ids, sizes)


@pytest.mark.parametrize("instructions", cpu.available())
@pytest.mark.parametrize("family", COMPILED)
def test_steps_equal_the_models_own(family: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, single tokens and short chunks; K and V dense, so that rounding can't hide anything."""
    monkeypatch.setenv(cpu.VARIABLE, instructions)
    model = sharp_model(family)
    kvfold.attach(model)
    assert step.describe(model) == f"cpu-{instructions}"
    ids = tokens(2, 140)
    sizes = [60, *[1] * 70, 3, 7]
    mine = _streamed(model, "full", ids, sizes)
    theirs = _own(model, "full", ids, sizes)
    torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    "plan", ["int8", "int4", "protect(sink=3, window=5) | int8(k_axis=token)", "fp8", "sink_window(sink=2, window=30)"]
)
def test_steps_under_plans(plan: str) -> None:
    """The same tokens are kept and the same blocks encoded; codes may differ where a number lies between two."""
    model = sharp_model(gain=3.0)
    ids = tokens(1, 150)
    sizes = [20, *[1] * 130]
    mine = _streamed(model, plan, ids, sizes)
    theirs = _own(model, plan, ids, sizes)
    assert (mine - theirs).norm() <= 2e-3 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_half_precision_are_no_worse(dtype: torch.dtype) -> None:
    ids = tokens(1, 40)
    sizes = [10, *[1] * 30]
    exact = _own(sharp_model(gain=4.0), "full", ids, sizes)
    own = _own(sharp_model(gain=4.0).to(dtype), "full", ids, sizes).float()
    model = sharp_model(gain=4.0).to(dtype)
    mine = _streamed(model, "full", ids, sizes).float()
    assert step.describe(model).startswith("cpu-")
    assert (mine - exact).norm() <= 1.1 * (own - exact).norm()


def test_padding_beams_and_several_turns_go_the_long_way_and_back() -> None:
    model, plain = sharp_model(), sharp_model()
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (30, 21)])
    kvfold.attach(plain)
    step.uninstall(plain)
    wanted = {"max_new_tokens": 12, "min_new_tokens": 12}
    for options in ({}, {"num_beams": 3}):
        mine = model.generate(ids, attention_mask=mask, past_key_values=kvfold.cache(model, "full"), **wanted, **options)
        theirs = plain.generate(ids, attention_mask=mask, past_key_values=kvfold.cache(plain, "full"), **wanted, **options)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("plan", ["full", "int8", "protect(sink=3, window=9) | int4", "fp8", "kivi(int2)", "int4(window=5)"])
def test_padded_batches_are_compiled_as_well(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows begin where their sequences do: each fills its blocks in its own time. A chunk, bytes and a crop come in between."""
    lengths = (30, 93, 61)
    ids, mask = left_pad([tokens(1, n + 151, seed=n)[0] for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    calls: list[str] = []
    real = native.DecoderLayer.step
    monkeypatch.setattr(native.DecoderLayer, "step", lambda self, *args: (calls.append("step"), real(self, *args))[1])

    def run(model: PreTrainedModel) -> tuple[torch.Tensor, kvfold.KVCache]:
        cache, at, outputs = kvfold.cache(model, plan), 0, []
        for size in [93, *[1] * 70, 5, *[1] * 30, 0, *[1] * 30, -4, *[1] * 20]:
            if size == 0:
                assert cache.nbytes > 0
            elif size < 0:
                cache.crop(size)
                at += size
            else:
                span = slice(at, at := at + size)
                given = {"attention_mask": mask[:, :at], "position_ids": positions[:, span], "past_key_values": cache}
                with torch.no_grad():
                    outputs.append(model(ids[:, span], **given).logits)
        return torch.cat(outputs, 1), cache

    mine, cache = run(sharp_model(num_hidden_layers=1))
    assert len(calls) > 100, "hardly any token was compiled"
    plain = sharp_model(num_hidden_layers=1)
    kvfold.attach(plain)
    step.uninstall(plain)
    theirs, other = run(plain)
    seen = torch.cat([mask[:, :228], mask[:, 224:244]], 1).bool()
    assert (mine - theirs)[seen].norm() <= 2e-3 * theirs[seen].norm()
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert a.kept_slots() == b.kept_slots()
    rows, head_dim = 3 * cache.fingerprint["num_kv_heads"], cache.fingerprint["head_dim"]
    room = ROOM * rows * (2 * head_dim * 4 + 4)
    assert other.nbytes <= cache.nbytes <= other.nbytes + room


def test_a_tail_is_closed_before_anyone_looks() -> None:
    """Slots, crops, copies and reorderings in between single tokens."""
    model = sharp_model()
    for plan in ("full", "int8", "protect(window=7) | int4"):
        cache = kvfold.cache(model, plan)
        ids = tokens(2, 120)
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
            for i in range(50, 100):
                model(ids[:, i : i + 1], past_key_values=cache)
                if i % 9 == 0:
                    layer = cache.layers[0]
                    assert isinstance(layer, LayerCache)
                    assert layer.kept_slots() == [list(range(i + 1))] * 4
                    assert cache.get_seq_length() == i + 1
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([1, 1]))
        with torch.no_grad():
            mine = [model(ids[[1, 1], i : i + 1], past_key_values=cache).logits for i in range(70, 80)]
        assert cache.layers[0].kept_slots() == [list(range(80))] * 4
        assert torch.equal(mine[-1][0], mine[-1][1])


def test_a_run_that_another_one_continues_is_not_overwritten() -> None:
    """Two caches that share a run's room, as a copy of a layer's state does, each see their own tokens."""
    from kvfold.segment import Run

    def run(first: int, count: int) -> Run:
        x = torch.arange(first, first + count).float()[None, :, None].expand(1, -1, 4).contiguous()
        return Run(x, x.clone(), torch.arange(first, first + count, dtype=torch.int32)[None], whole=True)

    base = run(0, 5).grown(run(5, 1))
    one, other = base.grown(run(6, 1)), base.grown(run(60, 2))
    assert one.k[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert other.k[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 60, 61]
    assert one.grown(run(7, 12)).slots[0].tolist() == list(range(19))


# -- when the model's own code must run --------------------------------------------------------------------------------------


def _calls(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the native calls that a token makes."""
    called: list[str] = []
    for name in ("step", "before_attention"):
        real = getattr(native.DecoderLayer, name)

        def noted(self, *args, _name=name, _real=real):
            called.append(_name)
            return _real(self, *args)

        monkeypatch.setattr(native.DecoderLayer, name, noted)
    return called


def test_what_is_not_known_stays_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model("phi3")  # one projection for q, k and v
    kvfold.attach(model)
    assert step.describe(model) == "transformers"
    partly = sharp_model()
    monkeypatch.setattr(type(partly.model.layers[0].mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    kvfold.attach(partly)
    assert step.describe(partly) == "transformers", "a layer that computes something else is noticed"


def test_hooks_gradients_and_replaced_parts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "full")
    called = _calls(model, monkeypatch)
    ids = tokens(1, 40)

    def token(grad: bool = False) -> list[str]:
        called.clear()
        with torch.set_grad_enabled(grad):
            model(ids[:, :1], past_key_values=cache)
        return list(called)

    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    assert token() == ["step", "step"]
    assert token(grad=True) == []
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert token() == ["step"]
    assert seen == [1]
    hook.remove()
    layer = model.model.layers[1]
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    assert token() == ["step"]
    layer.mlp.up_proj = nn.Linear(64, 64, bias=False)
    assert token() == ["step", "step"]
    monkeypatch.setenv(cpu.VARIABLE, "off")
    assert token() == []


def test_weights_that_change_later_count() -> None:
    model = sharp_model()
    ids = tokens(1, 30)
    _streamed(model, "full", ids, [28, 1, 1])
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(1.5)
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[1].mlp.down_proj.weight * 2)
        model.lm_head.weight.mul_(0.5)
    mine = _streamed(model, "full", ids, [20, *[1] * 10])
    theirs = _own(model, "full", ids, [20, *[1] * 10])
    torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


def test_detach_and_another_attention_leave_nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model()
    ids = tokens(1, 12)
    with torch.no_grad():
        before = model(ids).logits
    kvfold.attach(model)
    called = _calls(model, monkeypatch)
    kvfold.detach(model)
    assert not any("forward" in vars(m) for m in model.modules())
    kvfold.attach(model)
    model.set_attn_implementation("sdpa")
    called.clear()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        after = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([6, 1, 5], dim=1)], 1)
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=1e-4)
    assert called == []


def test_packed_weights_and_a_dynamic_cache() -> None:
    """kvfold's attention also serves other caches; their steps are compiled as well."""
    model = sharp_model("qwen3", gain=2.0)
    quantize_linears(model, "int8")
    kvfold.attach(model)
    assert step.describe(model).startswith("cpu-")
    ids = tokens(2, 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        mine = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([10, *[1] * 10], dim=1)], 1)
        kvfold.detach(model)
        theirs = model(ids).logits
    torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
