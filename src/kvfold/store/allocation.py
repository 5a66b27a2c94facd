"""How many bits each channel gets: reverse water-filling in whole bits."""

import torch

from kvfold.errors import PlanError
from kvfold.store.bands import MOST_BITS, distortion

_BITS = range(MOST_BITS + 1)
_SCALES = 16 / 64
"""Bits that the scale and the offset of a coded channel cost each of 64 tokens."""
_EXACT_SCALES = 24 / 64
"""The same with an offset in half precision."""


def outlier_bits(head_dim: int, outliers: int) -> float:
    """Bits an element, K and V together, of so many mended entries of K in a block."""
    return 32 * outliers / (64 * head_dim) / 2


def allocate(
    k_loss: torch.Tensor, v_loss: torch.Tensor, bits: float, outliers: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Bits of K's and V's channels in every layer, with the least loss at a mean of `bits` an element, scales counted.

    Minimises Σ_c loss_c · d(b_c), d the distortion of a channel of variance 1 in b bits, by one multiplier for all layers: each
    channel takes the b with the least loss_c · d(b) + μ · cost(b), and μ is the smallest that fits.

    Args:
        k_loss, v_loss: `[L, D]`: what is lost in each layer where a channel is left out; in descending order.
        bits: an element, K and V together.

    Returns:
        For each layer the bits of K's channels and of V's, in descending order.

    Raises:
        PlanError: `bits` is below what the outliers alone need.
    """
    num_layers, head_dim = k_loss.shape
    loss = torch.stack([k_loss, v_loss]).double()
    cost = torch.tensor([b + _SCALES * (b > 0) for b in _BITS], dtype=torch.float64)
    left = torch.tensor([distortion(b) for b in _BITS], dtype=torch.float64)
    room = (bits - outlier_bits(head_dim, outliers)) * loss.numel()
    if room < 0:
        raise PlanError(f"{bits:g} bits are too few: outliers alone take {outlier_bits(head_dim, outliers):.2f}")
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = (loss[..., None] * left + 2**middle * cost).argmin(-1)
        low, high = (middle, high) if float(cost[chosen].sum()) > room else (low, middle)
    k, v = (loss[..., None] * left + 2**high * cost).argmin(-1).sort(-1, descending=True).values.tolist()
    return [(tuple(k[i]), tuple(v[i])) for i in range(num_layers)]


def even(head_dim: int, bits: float, outliers: int) -> tuple[int, int]:
    """The bits of every channel of K and of V where nothing is known of them: the most that fit, K never fewer.

    PlanError when not even one bit each fits.
    """
    room = 2 * (bits - outlier_bits(head_dim, outliers)) - _EXACT_SCALES - _SCALES
    pairs = [(k, v) for v in _BITS[1:] for k in (v, v + 1) if k <= MOST_BITS and k + v <= room]
    if not pairs:
        raise PlanError(f"{bits:g} bits are too few for a bit in each channel; a calibration would leave some out")
    return max(pairs, key=sum)
