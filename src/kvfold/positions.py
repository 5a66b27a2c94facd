"""Where RoPE has turned keys to: the position of a token is its rank in its sequence, padding left out."""

import torch

from kvfold.errors import ModelError


def of(slots: torch.Tensor, padding: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """`[R, N] long` for `slots [R, N] int` (anything where they are -1).

    Args:
        padding: `[B, seen] bool`, False for padding, or None where there is none.
        num_heads: rows of a sequence.
    """
    slots = slots.long().clamp_min(0)
    if padding is None:
        return slots
    return (padding.long().cumsum(1) - 1).repeat_interleave(num_heads, 0).gather(1, slots)


def check(position_ids: torch.Tensor | None, ranks: torch.Tensor | None, real: torch.Tensor | None) -> None:
    """Raises ModelError when queries don't stand where their rank says.

    Args:
        position_ids: `[B or 1, Q] long` as the model was given them, or None where the model does not say.
        ranks: `[B, Q] long`.
        real: `[B, Q] bool`, False for padding, or None.
    """
    if position_ids is None or ranks is None:
        return
    elsewhere = position_ids != ranks
    if bool((elsewhere if real is None else elsewhere & real).any()):
        raise ModelError(
            "this plan turns keys back by their positions, which must count the tokens without padding: "
            "pass the position_ids that generate would give, or no padding"
        )
