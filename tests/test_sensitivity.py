"""The list of layers that need more bits."""

import pytest
import torch
from oracle import sharp_model, tokens

from kvfold.lab.sensitivity import plan_for, sensitivity
from kvfold.plan import Plan


def test_the_layer_that_matters_is_found() -> None:
    """A layer whose output is nearly nothing can be held in any way; the others can't."""
    model = sharp_model(num_hidden_layers=4, head_dim=32)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1e-4)
    seen: list[int] = []
    divergences = sensitivity(model, tokens(1, 260), 200, chunk=20, on_layer=lambda index, _: seen.append(index))
    assert seen == [0, 1, 2, 3]
    assert divergences[2] < 0.1 * min(divergences[i] for i in (0, 1, 3))


@pytest.mark.parametrize(
    ("share", "plan"),
    [(0, "int4"), (0.125, "layers(5=int8) | int4"), (0.5, "layers(0+3-5=int8) | int4"), (1, "layers(0-7=int8) | int4")],
)
def test_the_plan_names_the_most_sensitive_layers(share: float, plan: str) -> None:
    divergences = [0.5, 0.1, 0.0, 0.3, 0.4, 0.9, 0.2, 0.05]
    assert plan_for(divergences, share) == plan
    assert str(Plan.parse(plan)) == plan
