"""TurboQuant's promise: a distortion that depends on no data; and levels that are fitted to a block."""

import math

import pytest
import torch
from vectors import size, values

from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.fitted import Fitted


def _codec(plan: str, head_dim: int):
    return Plan.parse(plan).store.codec(Site(head_dim)).k


@pytest.mark.parametrize("rotation", ["random", "hadamard"])
@pytest.mark.parametrize(("bits", "listed"), [(2, 0.117), (3, 0.03), (4, 0.009)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_distortion_is_that_of_theorem_1(head_dim: int, bits: int, listed: float, rotation: str) -> None:
    """The paper lists 0.117, 0.03 and 0.009 times |x|² for 2, 3 and 4 bits, and proves a bound for all."""
    codec = _codec(f"turboquant({bits}, rotation={rotation})", head_dim)
    x = values("normal", 4000, head_dim) * torch.logspace(-2, 2, 4000)[:, None]
    relative = (codec.decode(codec.encode(x)) - x).square().sum(-1) / x.square().sum(-1)
    assert float(relative.mean()) == pytest.approx(listed, rel=0.17)
    assert float(relative.mean()) <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_large_channel_is_spread_over_all(bits: int) -> None:
    x = values("normal", 500, 64)
    x[:, 7] *= 20
    codec = _codec(f"turboquant({bits})", 64)
    plain = Affine(bits, "token", 64) if bits != 3 else Affine(2, "token", 64)
    error, without = ((c.decode(c.encode(x)) - x).square().mean() for c in (codec, plain))
    assert error < without / 2


@pytest.mark.parametrize(("norms", "extra"), [("log8", 1), ("half", 2)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_of_a_token(bits: int, norms: str, extra: int) -> None:
    codec = _codec(f"turboquant({bits}, norms={norms})", 128)
    assert size(codec.encode(values("normal", 10, 128))) == 10 * (128 * bits // 8 + extra)


# -- fitted levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_levels_lowers_the_error(bits: int, axis: str) -> None:
    x = values("normal", 6, 64, 64).pow(3)  # far from normal
    errors = []
    for rounds in (0, 1, 6, 20):
        codec = Fitted(bits, axis, rounds=rounds)
        errors.append(float((codec.decode(codec.encode(x)) - x).square().mean()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2] * 1.02


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_what_takes_few_values_is_kept(axis: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values_of_a_line = torch.tensor([-1.0, -0.2, 0.4, 1.0])
    x = values_of_a_line[torch.randint(4, (3, 64, 64), generator=generator)]
    codec = Fitted(2, axis, scales="half")
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, atol=2e-3, rtol=0)


def test_bytes_of_a_fitted_block() -> None:
    x = values("normal", 2, 64, 64)
    assert size(Fitted(3, "channel").encode(x)) == 2 * (64 * 64 * 3 // 8 + 64 * 3 + 2 + 8 * 2)
    assert size(Fitted(3, "token", 32).encode(x)) == 2 * (64 * 64 * 3 // 8 + 128 * 3 + 8 * 2)
