"""`full` is the model's own attention, family by family; models whose attention is another are refused with the reason."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import chunked, left_pad, sharp_model, tokens
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration

import kvfold
from kvfold.errors import ModelError
from kvfold.lab.calibrate import calibrate
from kvfold.models.layer import calibration_path

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 24}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {}),
}


def _family(name: str) -> PreTrainedModel:
    family, changes = FAMILIES[name]
    model = sharp_model(family, **changes)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return _family(request.param)


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    # Logits of these models go up to about 30, and layers amplify rounding: relative to their size.
    torch.testing.assert_close(mine, theirs, atol=1e-4 * max(1.0, float(theirs.abs().amax())), rtol=0)


def test_attention_is_far_from_uniform(model: PreTrainedModel) -> None:
    """Else the tests here would compare averages with averages."""
    with torch.no_grad():
        attentions = model(tokens(1, 40), output_attentions=True).attentions
    assert all(a[0, :, -1].amax(-1).mean() > 0.12 for a in attentions)


@pytest.mark.parametrize("sizes", [[60], [20, 1, 1, 30, 8]], ids=str)
def test_full_equals_eager(model: PreTrainedModel, sizes: list[int]) -> None:
    ids = tokens(2, 60)
    with torch.no_grad():
        theirs = model(ids).logits
    mine = chunked(model, kvfold.cache(model, "full"), ids, None, sizes)
    _close(mine, theirs)


@pytest.mark.parametrize("sizes", [[60], [20, 1, 1, 30, 8]], ids=str)
def test_full_equals_eager_in_a_padded_batch(model: PreTrainedModel, sizes: list[int]) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (60, 31, 47)])
    with torch.no_grad():
        theirs = [model(ids[i : i + 1, -n:]).logits[0] for i, n in enumerate((60, 31, 47))]
    mine = chunked(model, kvfold.cache(model, "full"), ids, mask, sizes)
    for i, logits in enumerate(theirs):
        _close(mine[i][mask[i].bool()], logits)


def test_full_gives_the_same_greedy_tokens(model: PreTrainedModel) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (40, 25)])
    wanted = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    theirs = model.generate(ids, past_key_values=DynamicCache(config=model.config), **wanted)
    mine = model.generate(ids, past_key_values=kvfold.cache(model, "full"), **wanted)
    assert torch.equal(mine, theirs)
    assert mine.shape[1] == 60


def test_int8_hardly_changes_what_any_family_predicts(model: PreTrainedModel) -> None:
    ids = tokens(1, 200)
    with torch.no_grad():
        theirs = model(ids).logits.log_softmax(-1)
    mine = chunked(model, kvfold.cache(model, "int8"), ids, None, [100, *[20] * 5]).log_softmax(-1)
    assert F.kl_div(mine[0], theirs[0], log_target=True, reduction="batchmean") < 0.02


def test_sliding_layers_stay_as_transformers_holds_them() -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    model = _family("gemma3")
    cache = kvfold.cache(model, "int4")
    kinds = [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers]
    assert kinds == [t == "sliding_attention" for t in model.config.layer_types]


def test_an_attached_model_still_works_without_kvfolds_cache(model: PreTrainedModel) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (50, 33)])
    with torch.no_grad():
        alone = model(ids, attention_mask=mask, use_cache=False).logits
        kvfold.attach(model)
        _close(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], alone[mask.bool()])
    by_dynamic_cache = chunked(model, DynamicCache(config=model.config), ids, mask, [30, 1, 19])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    kvfold.detach(model)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, position_ids=positions).logits
    _close(by_dynamic_cache[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_detach_restores_the_models_own_attention(own: str) -> None:
    model = sharp_model()
    model.set_attn_implementation(own)
    ids = tokens(1, 30)
    with torch.no_grad():
        before = model(ids).logits
        kvfold.attach(model)
        kvfold.attach(model)
        assert model.config._attn_implementation == "kvfold"
        kvfold.detach(model)
        assert model.config._attn_implementation == own
        assert torch.equal(model(ids).logits, before)
        kvfold.detach(model)
    assert not any("kvfold" in name for name in vars(model))


def test_importing_changes_nothing_in_transformers() -> None:
    code = """
from transformers.modeling_utils import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
before = set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())
import kvfold, kvfold.models.adapter, kvfold.kv_cache, kvfold.catalog
kvfold.cache, kvfold.Plan
assert before == (set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys()))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_without_kvfolds_attention_says_so() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4")
    kvfold.detach(model)
    with pytest.raises(AttributeError, match=r"does not use kvfold's attention.*kvfold\.cache"):
        model(tokens(1, 5), past_key_values=cache)


def test_a_mask_that_is_not_causal_is_refused() -> None:
    model = sharp_model()
    with pytest.raises(ModelError, match="2-D attention mask"):
        model(
            tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool), past_key_values=kvfold.cache(model, "int4")
        )


# -- large constant channels -------------------------------------------------------------------------------------------------


def _kl(model: PreTrainedModel, plan: str, ids: torch.Tensor) -> float:
    """Nats a token against the model's own attention; the second half streamed in chunks of 32."""
    half = ids.shape[1] // 2
    sizes = [half, *[32] * (half // 32)]
    full = chunked(model, kvfold.cache(model, "full"), ids, None, sizes)[:, half:].log_softmax(-1)
    mine = chunked(model, kvfold.cache(model, plan), ids, None, sizes)[:, half:].log_softmax(-1)
    return float(F.kl_div(mine[0], full[0], log_target=True, reduction="batchmean"))


def test_large_key_biases_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Qwen2's k_proj biases go up to 158. They shift all keys alike, which a codec must not pay for."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))  # where calibrations lie
    model = sharp_model("qwen2", gain=4.0, head_dim=64, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            # The slow half of the channels: the fast ones turn with the position and are no constants after RoPE.
            for head in range(2):
                channels = 64 * head + 32 * torch.randint(0, 2, (3,), generator=generator) + torch.tensor([26, 29, 31])
                bias[channels] = 150 * torch.tensor([1.0, -1.0, 1.0])
    ids = tokens(1, 512)
    by_token = _kl(model, "int4(k_axis=token, rotate=kv, sink=0)", ids)
    assert by_token > 0.2, "the trap must be one"
    assert _kl(model, "int4", ids) < 0.1 * by_token
    assert _kl(model, "int8", ids) < 1e-3
    assert _kl(model, "banded(4)", ids) < 0.1 * by_token
    calibrate(model, [tokens(1, 512, seed=seed)[0] for seed in (1, 2)]).save(calibration_path(model))
    assert _kl(model, "banded(4, calibrated=true)", ids) < 0.1 * by_token


# -- models that can't be served ---------------------------------------------------------------------------------------------


def _tiny(family: str, **changes: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes}))


_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
UNSERVED = {
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)),
        "cross attention",
    ),
    "deepseek_v2": (lambda: _tiny("deepseek_v2", **_LATENT), "MLA"),
    "deepseek_v3": (lambda: _tiny("deepseek_v3", **_LATENT), "MLA"),
    "gpt_oss": (lambda: _tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=16), "sinks"),
    "mamba": (lambda: _tiny("mamba"), "attention"),
    "qwen3_next": (
        lambda: _tiny(
            "qwen3_next",
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            num_experts=0,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        "linear_attention",
    ),
    "jamba": (
        lambda: _tiny("jamba", num_experts=1, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        "layers of type",
    ),
    "falcon": (
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "falcon", vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
            )
        ),
        "interface",
    ),
    "bloom": (
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("bloom", vocab_size=32, hidden_size=32, n_layer=1, n_head=2)
        ),
        "interface",
    ),
    "gemma3n": (
        lambda: _tiny(
            "gemma3n_text",
            head_dim=16,
            num_kv_shared_layers=1,
            num_hidden_layers=3,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=32,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 3,
            intermediate_size=[32] * 3,
            layer_types=["full_attention"] * 3,
        ),
        "share",
    ),
    "gemma4": (
        lambda: _tiny(
            "gemma4_text",
            head_dim=16,
            num_kv_shared_layers=1,
            num_hidden_layers=3,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=32,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
        "share",
    ),
}


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_attention_that_is_not_known_is_refused(name: str) -> None:
    make, why = UNSERVED[name]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=why) as error:
        kvfold.cache(model, "int4")
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == before, "a refused model stays as it was"


def test_a_foreign_softcap_is_refused() -> None:
    model = sharp_model()
    model.config.router_softcapping = 30.0
    with pytest.raises(ModelError, match=r"capped in a way that is not known.*router_softcapping"):
        kvfold.cache(model, "full")


def test_a_head_dim_that_fills_no_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="head dim 6 is not a multiple of 4"):
        kvfold.cache(sharp_model(head_dim=6), "int2")


@pytest.mark.parametrize("head_dim", [4, 12, 20, 36])
def test_odd_head_dims_are_served(head_dim: int) -> None:
    model = sharp_model(head_dim=head_dim)
    ids = tokens(1, 100)
    with torch.no_grad():
        theirs = model(ids).logits
    _close(chunked(model, kvfold.cache(model, "full"), ids, None, [60, 40]), theirs)
    for plan in ("int8", "int2", "fp8", "kivi"):
        assert chunked(model, kvfold.cache(model, plan), ids, None, [60, 40]).isfinite().all()


# -- the real one ------------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_full_equals_eager_on_smollm2() -> None:
    model, tokenizer = kvfold.load("smollm2-135m", dtype="float32")
    text = (
        "The cache of a language model holds the keys and values of all tokens so far, so that each new token attends to them "
        "without computing them again. It grows with every token, and for long contexts it is larger than the model. "
    )
    ids = tokenizer(text * 8, return_tensors="pt").input_ids[:, :300]
    assert ids.shape == (1, 300)
    model.set_attn_implementation("eager")
    wanted = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with torch.no_grad():
        theirs = model(ids).logits
        their_tokens = model.generate(ids, past_key_values=DynamicCache(config=model.config), **wanted)
    mine = chunked(model, kvfold.cache(model, "full"), ids, None, [200, 1, 99])
    my_tokens = model.generate(ids, past_key_values=kvfold.cache(model, "full"), **wanted)
    kvfold.detach(model)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert torch.equal(my_tokens, their_tokens)
