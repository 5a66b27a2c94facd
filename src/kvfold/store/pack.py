"""Codes of 1 to 8 bits, packed into bytes."""

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integer codes along the last axis.

    The last axis is cut into `8 // bits` equal runs and run i lands in bits `i * bits …` of every byte, so that
    unpacking is a shift, a mask and a concatenation, with no interleaving.

    Codes of 1 bit: bit j of byte i is code 8 i + j, so that a mask register takes them as they are. Codes of 3 bits are two
    planes, one behind the other: their low 2 bits packed as above, then their high bits as codes of 1 bit.

    Args:
        codes: `[..., D] uint8`, values below `2**bits`; D a multiple of `8 // bits`, and of 8 for 1 and 3 bits.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        `[..., D * bits // 8] uint8`. ValueError when D does not divide.
    """
    if bits == 8:
        return codes
    per_byte = 8 if bits in (1, 3) else 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    if bits == 1:
        return _pack_mask(codes)
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), _pack_mask(codes >> 2)], dim=-1)
    runs = codes.chunk(per_byte, dim=-1)
    packed = runs[0].clone()
    for i, run in enumerate(runs[1:], start=1):
        packed |= run << (i * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: `[..., D * bits // 8] uint8` to `[..., D] uint8`."""
    if bits == 8:
        return packed
    if bits == 1:
        return _unpack_mask(packed)
    if bits == 3:
        num_low = packed.shape[-1] // 3 * 2
        return unpack(packed[..., :num_low], 2) | _unpack_mask(packed[..., num_low:]) << 2
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _pack_mask(bits: torch.Tensor) -> torch.Tensor:
    """`[..., D] uint8` of zeros and ones to `[..., D / 8]`."""
    eights = bits.unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _unpack_mask(packed: torch.Tensor) -> torch.Tensor:
    return (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten(-2)
