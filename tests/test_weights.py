"""Weights of 4 and 8 bits: the packed form, its products, whole models, and what a GGUF file holds."""

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from tiny import tiny_model
from torch import nn

import kvfold
from kvfold.errors import ModelError
from kvfold.kernels import cpu
from kvfold.kernels.cpu import step
from kvfold.models.gguf_weights import codes_of, take_over
from kvfold.models.weights import (
    PackedEmbedding,
    PackedLinear,
    bytes_by_form,
    describe,
    pack,
    quantize,
    quantize_linears,
    unpack,
)

SETS = [*cpu.available(), "off"]
FORMS = ("int4", "int8")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(cpu.VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("shape", [(16, 32), (33, 96), (1, 64), (48, 160)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_packing_loses_nothing(form: str, shape: tuple[int, int]) -> None:
    codes = quantize(_random(*shape), form)
    packed = pack(codes)
    again = unpack(packed, form, shape[0])
    assert packed.shape == (-(-shape[0] // 16), shape[1] // 32, step.TILE_BYTES[form])
    assert torch.equal(again.codes, codes.codes)
    assert torch.equal(again.scale, codes.scale)
    assert codes.least is None or torch.equal(again.least, codes.least)


@pytest.mark.parametrize(("form", "levels"), [("int4", 15), ("int8", 254)])
def test_rounding_is_to_the_nearest_code(form: str, levels: int) -> None:
    """Half a step at most, and half precision's rounding of scale and minimum; 4 bits may clip for a smaller square error."""
    weight = _random(40, 128)
    codes = quantize(weight, form)
    groups = weight.unflatten(1, (-1, 32))
    error = (codes.dense().unflatten(1, (-1, 32)) - groups).abs()
    width = groups.amax(-1) - groups.amin(-1) if form == "int4" else 2 * groups.abs().amax(-1)
    clipped = 0.075 * width if form == "int4" else 0  # 85 % of the range is the least that is tried
    assert (error.amax(-1) <= width / levels / 2 * 1.01 + clipped + 2e-3).all()
    plain = (width[..., None] / levels) ** 2 / 12  # of rounding without clipping
    assert error.square().mean() <= 1.1 * plain.mean()


def test_equal_weights_are_held_exactly() -> None:
    for value in (0.0, 0.5):
        for form in FORMS:
            assert torch.allclose(quantize(torch.full((3, 32), value), form).dense(), torch.tensor(value), atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_packed_linear_equals_a_dense_one(form: str, dtype: torch.dtype, threads: int, instructions: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns in ((33, 96), (5, 32), (200, 64)):
            linear = PackedLinear(quantize(_random(rows, columns), form), _random(rows, seed=1))
            linear.bias.data = linear.bias.data.to(dtype)
            dense = linear.dense(torch.float32)
            assert torch.equal(dense, unpack(linear.packed, form, rows).dense())
            for count in (1, 2, 3, 7, 8, 9, 20):
                x = _random(count, columns, seed=count).to(dtype)
                wanted = F.linear(x.float(), dense, linear.bias.float())
                rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
                torch.testing.assert_close(linear(x).float(), wanted, atol=rounding * wanted.abs().max(), rtol=rounding)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")
def test_products_with_plain_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cpu.available():
        monkeypatch.setenv(cpu.VARIABLE, name)
        for rows, columns in ((1, 1), (7, 33), (50, 64)):
            weight = _random(rows, columns).to(dtype)
            for count in (1, 3, 8):
                x = _random(count, columns, seed=count).to(dtype)
                out = step.linear(step.dense_weight(weight, None), x).float()
                wanted = x.float() @ weight.float().T
                rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
                torch.testing.assert_close(out, wanted, atol=rounding * wanted.abs().max() + 1e-6, rtol=rounding)


@pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")
def test_bad_input_is_refused_before_the_compiled_code() -> None:
    weight = step.dense_weight(_random(4, 8), None)
    bad = {
        "9 vectors at once": lambda: step.linear(weight, _random(9, 8)),
        "vectors must be": lambda: step.linear(weight, _random(2, 7)),
        "float64": lambda: step.linear(weight, _random(2, 8).double()),
        "two axes": lambda: step.dense_weight(_random(4), None),
        "contiguous": lambda: step.dense_weight(_random(4, 8).T, None),
        "multiple of 32": lambda: step.packed_weight("int4", torch.zeros(1, 1, 320, dtype=torch.uint8), 4, 33, None),
        "packed weight must be": lambda: step.packed_weight("int4", torch.zeros(1, 1, 319, dtype=torch.uint8), 4, 32, None),
        "bias must be": lambda: step.dense_weight(_random(4, 8), _random(3)),
        "not packed": lambda: step.unpack(weight, torch.float32),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()


# -- whole models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_holds_codes_and_nothing_else(form: str, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight.detach().clone()
    dense = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    quantize_linears(model, form)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    sizes = bytes_by_form(model)
    head = -(-100 // 16) * 2 * step.TILE_BYTES["int8"]  # 100 words, 64 channels
    per_weight = step.TILE_BYTES[form] / 512
    if form == "int8":
        assert sizes["int8"] == dense * per_weight + head
    else:
        assert sizes["int4"] == dense * per_weight
        assert sizes["int8"] == head
    assert sum(sizes.values()) == sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    lookup = model.get_input_embeddings()
    ids = torch.arange(100).view(4, 25)
    if tied:
        assert isinstance(lookup, PackedEmbedding)
        assert lookup.packed is model.lm_head.packed
        assert torch.equal(lookup(ids).flatten(0, 1), model.lm_head.dense())
    else:
        assert torch.equal(lookup.weight, embedding)
    assert form in describe(model)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_rounded_weights(form: str, instructions: str) -> None:
    model = tiny_model()
    quantize_linears(model, form)
    plain = tiny_model()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                plain.get_submodule(name).weight.copy_(module.dense())
        ids = torch.arange(4, 34)[None]
        wanted = plain(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
        cache = kvfold.cache(model, "full")
        mine = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 5, 3], dim=1)]
    torch.testing.assert_close(torch.cat(mine, 1), wanted, atol=1e-5, rtol=1e-4)


def test_packed_models_copy_and_have_a_mark_of_their_own() -> None:
    model = tiny_model()
    dense_mark = kvfold.cache(model, "full").fingerprint["weights"]
    kvfold.detach(model)
    quantize_linears(model, "int4")
    cache = kvfold.cache(model, "full")
    other = copy.deepcopy(model)
    ids = torch.arange(4, 9)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert cache.fingerprint["weights"] != dense_mark
    assert kvfold.cache(other, "full").fingerprint == cache.fingerprint
    with pytest.raises(ModelError, match="not saved: save the model as it was"):
        other.save_pretrained("anywhere")


def test_a_model_without_suitable_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer that can be held as int4"):
        quantize_linears(
            tiny_model(hidden_size=24, intermediate_size=24, num_attention_heads=1, num_key_value_heads=1, head_dim=8), "int4"
        )


# -- GGUF ----------------------------------------------------------------------------------------------------------------------

_KINDS = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q4_1", "Q8_0")}


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_blocks_are_taken_over_exactly(kind: str) -> None:
    blocks = gguf_quantize(_random(20, 128).numpy(), _KINDS[kind])
    theirs = torch.from_numpy(dequantize(blocks, _KINDS[kind]))
    codes = codes_of(blocks, kind)
    assert torch.equal(codes.dense(), theirs)
    assert torch.equal(PackedLinear(codes).dense(), theirs)


def test_a_files_codes_replace_the_weights_read_from_it(tmp_path: Path) -> None:
    """Q4_0, Q4_1, Q8_0, rows in llama.cpp's order, a tied head; a tensor of another type stays as it is."""
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    kinds = {"q_proj": "Q4_1", "k_proj": "Q4_0", "v_proj": "Q4_1", "o_proj": "Q8_0", "gate_proj": "Q4_1", "down_proj": "Q4_0"}
    files = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    files |= {"up_proj": "ffn_up", "down_proj": "ffn_down"}
    layer = model.model.layers[0]
    for name, file_name in files.items():
        linear = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
        weight = linear.weight.detach()
        if name in ("q_proj", "k_proj"):  # neighbouring channels turn together in llama.cpp
            weight = weight.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)
        if name not in kinds:
            writer.add_tensor(f"blk.0.{file_name}.weight", weight.numpy())
            continue
        blocks = gguf_quantize(weight.numpy(), _KINDS[kinds[name]])
        writer.add_tensor(f"blk.0.{file_name}.weight", blocks, raw_dtype=_KINDS[kinds[name]])
        read = torch.from_numpy(dequantize(blocks, _KINDS[kinds[name]]))
        if name in ("q_proj", "k_proj"):
            read = read.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
        linear.weight.data.copy_(read)
    blocks = gguf_quantize(model.lm_head.weight.detach().numpy(), _KINDS["Q8_0"])
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=_KINDS["Q8_0"])
    model.lm_head.weight.data.copy_(torch.from_numpy(dequantize(blocks, _KINDS["Q8_0"])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    before = copy.deepcopy(model)
    take_over(model, tmp_path / "tiny.gguf")
    packed = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert set(packed) == {*kinds, "lm_head"}
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.dense(), before.get_submodule(name).weight), name
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_file_without_fast_tensors_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="no linear layer that can be held as native"):
        take_over(tiny_model(), tmp_path / "plain.gguf")


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ModelError, match=r"unknown weights 'int5'.*one of dense, int8, int4, native"):
        kvfold.load("smollm2-135m", weights="int5")
    with pytest.raises(ModelError, match=r"native weights are the codes of a \.gguf file"):
        kvfold.load("owner/name", weights="native")


@pytest.mark.model
def test_native_weights_of_smollm2_are_those_of_the_file() -> None:
    packed, _ = kvfold.load("smollm2-135m", weights="native")
    plain, _ = kvfold.load("smollm2-135m", dtype="float32")
    assert set(bytes_by_form(packed)) == {"int4", "int8", "bfloat16"}
    matrices = [(name, m) for name, m in packed.named_modules() if isinstance(m, PackedLinear)]
    assert len(matrices) == 7 * 30 + 1
    for name, module in matrices:
        assert torch.equal(module.dense(), plain.get_submodule(name).weight), name
