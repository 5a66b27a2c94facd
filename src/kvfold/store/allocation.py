"""How many bits each channel gets: reverse water-filling in whole bits."""

import functools

import torch

from kvfold.errors import PlanError
from kvfold.store.bands import BAND, MOST_BITS, distortion

_BITS = range(MOST_BITS + 1)
_K_SCALES = 16 / 64
"""Bits that the scale and the offset of a channel of K cost each of 64 tokens."""


def fixed_bits(head_dim: int, outliers: int) -> float:
    """Bits an element of a block, K and V together, that are not codes: V's gains and K's outliers."""
    return (8 / head_dim + 32 * outliers / (64 * head_dim)) / 2


def allocate(k_loss: torch.Tensor, v_loss: torch.Tensor, bits: float, outliers: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Bits of K's and V's channels in every layer, with the least loss at a mean of `bits` an element, scales counted.

    Minimises Σ_c loss_c · d(b_c), d the distortion of a channel of variance 1 in b bits, by one multiplier for all layers: each
    channel takes the bits with the least loss_c · d(b) + μ · cost(b), and μ is the smallest that fits.

    Args:
        k_loss, v_loss: `[L, D]`, in descending order in each layer.
        bits: an element, K and V together.

    Returns:
        For each layer the bits of K's channels and of V's, in descending order.

    Raises:
        PlanError: `bits` is below what the scales alone need.
    """
    num_layers, head_dim = k_loss.shape
    losses = [k_loss.double(), v_loss.double().unflatten(1, (-1, BAND)).sum(-1)]
    costs = [
        torch.tensor([b + _K_SCALES * (b > 0) for b in _BITS], dtype=torch.float64),
        torch.tensor([float(BAND * b) for b in _BITS], dtype=torch.float64),
    ]
    room = (bits - fixed_bits(head_dim, outliers)) * 2 * head_dim * num_layers
    if room < 0:
        raise PlanError(f"{bits:g} bits are too few: scales and outliers alone take {fixed_bits(head_dim, outliers):.2f}")
    loss_of = torch.tensor([distortion(b) for b in _BITS], dtype=torch.float64)

    def choose(log_price: float) -> list[torch.Tensor]:
        return [(x[..., None] * loss_of + 2**log_price * cost).argmin(-1) for x, cost in zip(losses, costs, strict=True)]

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        taken = sum(float(cost[b].sum()) for b, cost in zip(choose(middle), costs, strict=True))
        low, high = (middle, high) if taken > room else (low, middle)
    k_bits, v_bits = choose(high)
    v_bits = v_bits.repeat_interleave(BAND, dim=1)
    return [
        (tuple(sorted(k, reverse=True)), tuple(sorted(v, reverse=True)))
        for k, v in zip(k_bits.tolist(), v_bits.tolist(), strict=True)
    ]


@functools.cache
def even(head_dim: int, bits: float, outliers: int) -> tuple[int, int]:
    """The bits of every channel of K and of V without a calibration: the most that `bits` an element allow, K never fewer.

    PlanError when not even one bit each fits.
    """
    pairs = [(k, v) for v in _BITS[1:] for k in (v, v + 1) if k <= MOST_BITS]
    room = 2 * (bits - fixed_bits(head_dim, outliers)) - _K_SCALES
    fitting = [pair for pair in pairs if sum(pair) <= room]
    if not fitting:
        raise PlanError(f"{bits:g} bits are too few for a bit in each channel; a calibration would leave some out")
    return max(fitting, key=sum)
