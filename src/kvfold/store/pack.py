"""Codes of 1 to 8 bits, packed into bytes."""

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integer codes along the last axis.

    The last axis is cut into `8 // bits` equal runs and run i lands in bits `i * bits …` of every byte, so that
    unpacking is a shift, a mask and a concatenation, with no interleaving.

    Args:
        codes: `[..., D] uint8`, values below `2**bits`; D a multiple of `8 // bits`.
        bits: 2, 4 or 8.

    Returns:
        `[..., D * bits // 8] uint8`. ValueError when D does not divide.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    if codes.shape[-1] % per_byte:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    runs = codes.chunk(per_byte, dim=-1)
    packed = runs[0].clone()
    for i, run in enumerate(runs[1:], start=1):
        packed |= run << (i * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: `[..., D * bits // 8] uint8` to `[..., D] uint8`."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)
