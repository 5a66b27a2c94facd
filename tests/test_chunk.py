"""What is between the products of many tokens, compiled, against double precision."""

import pytest
import torch
from oracle import sharp_model, tokens
from torch import nn

import kvfold
from kvfold.kernels import cpu
from kvfold.kernels.cpu import chunk, step

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=cpu.available(), autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, request.param)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(size: int) -> tuple[step.Norm, torch.Tensor]:
    weight = 1 + _random(size, seed=size) / 4
    return step.norm(weight, 1e-5), weight.double()


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _near(got: torch.Tensor, exact: torch.Tensor) -> None:
    """One rounding to the type, and some of float32."""
    assert got.is_contiguous()
    bound = exact.abs() * (torch.finfo(got.dtype).eps / 2 + 4e-6) + 1e-6
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 33, 72), (1, 200, 37)])
def test_norms_and_sums(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    norm, weight = _norm(shape[-1])
    x, hidden = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype, seed=1)
    _near(chunk.normalize(norm, x), _normed(x.double(), weight))
    none = step.norm(None, 0.0)
    for of_x, added in ((none, x.double()), (norm, _normed(x.double(), weight))):
        total, normed = chunk.add(of_x, hidden, x, norm)
        exact = hidden.double() + added
        slack = exact.abs().max() * 1e-6
        assert bool(((total.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + slack).all())
        _near(normed, _normed(exact, weight))
        alone, same = chunk.add(of_x, hidden, x)
        assert alone is same
        assert torch.equal(alone, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(3, 64, 64), (2, 24, 12), (1, 16, 0), (5, 20, 6)])
@pytest.mark.parametrize("batch_of_positions", [1, 2])
def test_heads_are_normed_turned_and_put_side_by_side(
    heads: int, head_dim: int, rotary: int, batch_of_positions: int, dtype: torch.dtype
) -> None:
    batch, length = 2, 37
    x = _random(batch, length, heads * head_dim, dtype=dtype)
    norm, weight = _norm(head_dim)
    angle = 9 * _random(batch_of_positions, length, rotary // 2, seed=2).repeat(1, 1, 2)
    positions = (angle.cos().to(dtype), angle.sin().to(dtype)) if rotary else None
    for of_heads in (None, norm):
        exact = x.double().view(batch, length, heads, head_dim).transpose(1, 2)
        if of_heads:
            exact = _normed(exact, weight)
        if positions:
            cos, sin = (p.double()[:, None] for p in positions)
            turned, rest = exact.split([rotary, head_dim - rotary], -1)
            a, b = turned.chunk(2, -1)
            exact = torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)
        got = chunk.place(of_heads, x, head_dim, positions)
        assert (got.dtype, got.shape) == (dtype, exact.shape)
        assert got.is_contiguous()
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + 2e-6 * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "activation"), [("silu", nn.SiLU()), ("gelu_tanh", nn.GELU("tanh"))])
def test_gates(name: str, activation: nn.Module, dtype: torch.dtype) -> None:
    gate, up = 4 * _random(2, 41, 83, dtype=dtype), _random(2, 41, 83, dtype=dtype, seed=3)
    exact = activation(gate.double()) * up.double()
    given = gate.clone()
    got = chunk.gated(name, given, up)
    assert got is given
    bound = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-5) + 2e-6
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    norm, _ = _norm(48)
    x = _random(3, 290, 48)  # so many that they are shared
    wanted = chunk.normalize(norm, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(chunk.normalize(norm, x), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    norm, _ = _norm(16)
    x = _random(1, 4, 32)
    for call in (
        lambda: chunk.normalize(norm, x),
        lambda: chunk.normalize(norm, x.double()[..., :16].contiguous()),
        lambda: chunk.normalize(norm, _random(1, 4, 32)[..., :16]),
        lambda: chunk.place(norm, x, 8),
        lambda: chunk.place(None, x, 24),
        lambda: chunk.place(None, x, 16, (_random(1, 4, 18), _random(1, 4, 18))),
        lambda: chunk.place(None, x, 16, (_random(1, 4, 8), _random(1, 4, 8).half())),
        lambda: chunk.add(step.norm(None, 0.0), x, x[:, :2]),
        lambda: chunk.gated("silu", x, x.bfloat16()),
    ):
        with pytest.raises(ValueError, match=r"must be|norm|positions"):
            call()


def test_prompts_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a step takes; gradients, other types and hooks are the model's own affair."""
    calls: list[str] = []
    real = chunk.normalize
    monkeypatch.setattr(chunk, "normalize", lambda *args: (calls.append("chunk"), real(*args))[1])
    model = sharp_model()
    kvfold.attach(model)  # which tries both ways
    ids = tokens(2, 12)
    layers = len(model.model.layers)

    def used(grad: bool = False) -> int:
        calls.clear()
        with torch.set_grad_enabled(grad):
            model(ids, past_key_values=kvfold.cache(model, "int8"))
        return len(calls)

    assert used() == layers
    assert used(grad=True) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert used() == 0
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert used() == layers - 1
    hook.remove()
    assert used() == layers
