"""The levels of tables: NF4, FP4 and those that are best for a known distribution."""

import functools
import math
from statistics import NormalDist

import torch


@functools.cache
def nf4() -> tuple[float, ...]:
    """NormalFloat (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of a normal distribution, with a zero.

    Eight levels are negative and the last is -1, seven are positive and the last is 1.
    """
    # The outermost quantile: the mean of those that 15 and 16 even parts would leave out, as in the paper's code.
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()

    def positive(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [normal.inv_cdf(outermost - i * step) for i in range(count)]

    largest = normal.inv_cdf(outermost)
    return tuple(sorted([-x / largest for x in positive(7)] + [0.0] + [x / largest for x in positive(8)]))


@functools.cache
def e2m1() -> tuple[float, ...]:
    """4-bit floats with 2 bits of exponent and 1 of mantissa (OCP Microscaling Formats, version 1.0, section 5.3.3).

    In ascending order, zero twice, as the format has it: codes here are places in this list, not the format's own bits.
    """
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return tuple([-x for x in reversed(magnitudes)] + magnitudes)


@functools.cache
def on_a_sphere(bits: int, dim: int) -> tuple[float, ...]:
    """The 2^bits levels of least squared error for a coordinate of a point on a sphere of radius sqrt(dim), uniformly drawn.

    Its density is proportional to (1 - x² / dim)^((dim - 3) / 2), which tends to the normal one (TurboQuant, arXiv 2504.19874,
    lemma 1). Lloyd and Max: each level is the mean of what is nearest to it (equation 4 of the paper).
    """
    reach = min(math.sqrt(dim), 8.0)
    x = torch.linspace(-reach, reach, 20001, dtype=torch.float64)
    density = (1 - x.square() / dim).clamp_min(0) ** ((dim - 3) / 2)
    mass, moment = _integral(density), _integral(density * x)
    levels = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)], dtype=torch.float64)
    ends = torch.tensor([reach], dtype=torch.float64)
    for _ in range(2000):
        bounds = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        before, levels = levels, _between(moment, bounds, reach) / _between(mass, bounds, reach)
        if float((levels - before).abs().max()) < 1e-9:
            break
    return tuple(((levels - levels.flip(0)) / 2).tolist())  # even as the density is, rounding aside


def _integral(y: torch.Tensor) -> torch.Tensor:
    """From the first point of an even grid to each of its points, by trapezoids, in steps of the grid."""
    return torch.cat([y.new_zeros(1), ((y[1:] + y[:-1]) / 2).cumsum(0)])


def _between(integral: torch.Tensor, bounds: torch.Tensor, reach: float) -> torch.Tensor:
    """What lies between neighbouring bounds, of an integral on a grid from -reach to reach."""
    place = (bounds + reach) / (2 * reach) * (len(integral) - 1)
    left = place.floor().long().clamp(0, len(integral) - 2)
    return torch.lerp(integral[left], integral[left + 1], place - left).diff()
