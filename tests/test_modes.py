"""Caches that are filled under one of torch's modes and used under another."""

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model

import kvfold
from kvfold.lab.generate import prefill

PLANS = [
    *(
        "full",
        "int4",
        "fp8",
        "banded(3)",
        "h2o(50)",
        "h2o(50%) | int4",
        "expected(50%)",
        "kvzip(50%)",
        "snapkv(50%, heads=ada)",
    ),
    *("sink_window(sink=4, window=40) | int8", "quest(25%) | int4", "minicache", "share", "lowrank(50%)"),
    *("int4 | tier(device=64, disk)", "fp8 | tier(device=64, host=64, disk)"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_prefilled_in_inference_mode_and_used_without(plan: str) -> None:
    """Prompt, steps, beams and a crop: the same as under `no_grad` all the time, whichever mode comes first."""
    model = tiny_model(num_hidden_layers=4)
    ids = torch.randint(3, VOCAB_SIZE, (2, 150), generator=torch.Generator().manual_seed(0))
    step = ids[:, :1]
    outputs = []
    for first, second in (
        (torch.no_grad, torch.no_grad),
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
    ):
        cache = kvfold.cache(model, plan)
        with first():
            prefill(model, cache, ids, 64)
        with second():
            logits = [model(step, past_key_values=cache).logits for _ in range(70)]
        with first():
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(model(step, past_key_values=cache).logits)
            cache.crop(-3)
            cache = cache.copy()
        with second():
            logits += [model(step, past_key_values=cache).logits for _ in range(3)]
        outputs.append(torch.cat(logits, 1).clone())
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_under_autocast(plan: str) -> None:
    """The model's products are in bfloat16, a cache's own are not: its rotations and scores stay float32."""
    model = tiny_model(num_hidden_layers=4)
    ids = torch.randint(3, VOCAB_SIZE, (2, 150), generator=torch.Generator().manual_seed(0))

    def run(cast: bool, plan: str) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.no_grad():
            cache = kvfold.cache(model, plan)
            logits = [prefill(model, cache, ids, 64)[:, None]]
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70)]
        assert not any(x.dtype == torch.bfloat16 for _, _, x in cache.tensors())
        return torch.cat(logits, 1).float()

    exact = run(False, plan)
    own = (run(True, "transformers") - run(False, "transformers")).norm()
    assert (run(True, plan) - exact).norm() <= max(2 * own, 0.05 * exact.norm())


def test_under_inference_mode_in_threads() -> None:
    """The tier's thread reads for a model that runs under inference mode from beginning to end."""
    model = tiny_model()
    ids = torch.randint(3, VOCAB_SIZE, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = kvfold.cache(model, "int4 | tier(device=64, disk)")
        for part in ids.split(50, 1):
            logits = model(part, past_key_values=cache).logits
    with torch.no_grad():
        plain = kvfold.cache(model, "int4")
        for part in ids.split(50, 1):
            wanted = model(part, past_key_values=plain).logits
    torch.testing.assert_close(logits.clone(), wanted, atol=1e-4, rtol=1e-4)
