"""Dense tokens to codes in one pass: rotate, find scales and zero points, round, pack.

The arithmetic is that of kvfold.store.affine and scales, operation by operation; where a GPU's exp2 and log2 differ from the
CPU's in the last place, a scale of `log8` may be the next one of its grid, and codes follow the scale that is stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvfold.kernels.triton.layout import Side
from kvfold.kernels.triton.tiles import kernel
from kvfold.store.affine import Affine
from kvfold.store.base import Fields
from kvfold.store.fp8 import Float8

ROUND = tl.constexpr(1.001 * 2.0**-11)  # as in kvfold.store.affine
TINY = tl.constexpr(2.0**-24)
LARGEST_HALF = tl.constexpr(65504.0)
_TOKENS_OF_FLOATS = 16  # a program's, of float8
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding it rounds to the nearest integer, ties to even


@triton.jit
def _half(x):
    return tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)


@triton.jit
def _half_above(step):
    return _half(tl.maximum(step * (1 + ROUND) + TINY / 2, TINY))


@triton.jit
def _log_codes(step, largest, PER_OCTAVE: tl.constexpr, CLIPS: tl.constexpr):
    """Codes of scales on the logarithmic grid below `largest`."""
    code = tl.log2(tl.div_rn(largest + tl.zeros_like(step), tl.maximum(step, TINY / 256))) * PER_OCTAVE
    if CLIPS:
        code = tl.floor(code - 1e-3)
    else:
        code = (code + TO_INTEGER) - TO_INTEGER
    return tl.minimum(tl.maximum(code, 0.0), 255.0)


@kernel
def encode_kernel(
    x,
    codes,
    scale,
    zero,
    base,
    rotation,
    SIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROTATED: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Block n of `x [N, T, D]` to its codes, scales, zero points and base: one block a program. Grid: blocks."""
    block = tl.program_id(0).to(tl.int64)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, HEAD_DIM)
    tile = tl.load(x + block * (TOKENS * HEAD_DIM) + token[:, None] * HEAD_DIM + channel[None, :]).to(tl.float32)
    if ROTATED:
        turn = tl.load(rotation + channel[:, None] * HEAD_DIM + channel[None, :])
        tile = tl.dot(tile, turn, input_precision="tf32x3")
    if SIDE.by_channel:
        tile = tl.trans(tile)
    grouped = tile.reshape(SIDE.lines, SIDE.num_groups, SIDE.group)
    low, high = tl.min(grouped, 2), tl.max(grouped, 2)
    if SIDE.symmetric:
        step = tl.maximum(high, -low) * (1.0 / SIDE.middle)
    else:
        low = _half(low - tl.abs(low) * ROUND - TINY)
        step = tl.div_rn(high - low.to(tl.float32), tl.zeros_like(high) + 2 * SIDE.middle)
    line, group = tl.arange(0, SIDE.lines), tl.arange(0, SIDE.num_groups)
    if SIDE.by_channel:
        at = block * (SIDE.num_groups * SIDE.lines) + group[None, :] * SIDE.lines + line[:, None]
    else:
        at = block * (SIDE.num_groups * SIDE.lines) + line[:, None] * SIDE.num_groups + group[None, :]
    if SIDE.scales == "half":
        stored = _half_above(step)
        tl.store(scale + at, stored)
        used = stored.to(tl.float32)
    elif SIDE.by_channel:
        largest = _half_above(tl.max(step))
        tl.store(base + block, largest)
        stored = _log_codes(step, largest.to(tl.float32), 24.0, CLIPS)
        tl.store(scale + at, stored.to(tl.uint8))
        used = tl.exp2(stored * (-1.0 / 24.0)) * largest.to(tl.float32)
    else:
        stored = _log_codes(step, 4096.0, 8.0, CLIPS)
        tl.store(scale + at, stored.to(tl.uint8))
        used = tl.exp2(stored * (-1.0 / 8.0)) * 4096.0
    if SIDE.symmetric:
        start = -SIDE.middle * used
    else:
        tl.store(zero + at, low)
        start = low.to(tl.float32)
    scaled = tl.div_rn(grouped - start[:, :, None], tl.zeros_like(grouped) + used[:, :, None])
    code = (scaled + TO_INTEGER) - TO_INTEGER
    code = tl.minimum(tl.maximum(code, 0.0), 2 * SIDE.middle).to(tl.int32)
    tl.static_assert(SIDE.columns % SIDE.runs == 0)
    # A run of a line is one of the consecutive stretches whose codes share bytes.
    run = tl.arange(0, SIDE.runs)
    packed = tl.sum(code.reshape(SIDE.lines, SIDE.runs, SIDE.columns // SIDE.runs) << (run * SIDE.bits)[None, :, None], 1)
    byte = tl.arange(0, SIDE.columns // SIDE.runs)
    first = block * (SIDE.lines * (SIDE.columns // SIDE.runs))
    where = first + line[:, None] * (SIDE.columns // SIDE.runs) + byte[None, :]
    tl.store(codes + where, packed.to(tl.uint8))


@kernel
def encode_float8_kernel(
    x,
    codes,
    scale,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Tokens `x [N, D]` to 8-bit floats and scales. Grid: spans of TOKENS.

    Floats are made of the bits of float32: devices before compute capability 8.9 have no instruction for e4m3.
    """
    token, channel = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    inside = (token < num_tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    at = token[:, None] * HEAD_DIM + channel[None, :]
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    LARGEST: tl.constexpr = 448.0 if EXPONENT_BITS == 4 else 57344.0
    if SCALED:
        step = tl.max(tl.abs(tile), 1)
        step = tl.div_rn(step, tl.zeros_like(step) + LARGEST) * (1 + 2.0**-10) + 2.0**-25
        stored = tl.minimum(tl.maximum(step, TINY), LARGEST_HALF).to(tl.float16)
        tl.store(scale + token, stored, mask=token < num_tokens)
        tile = tl.div_rn(tile, tl.zeros_like(tile) + stored.to(tl.float32)[:, None])
    tile = tl.minimum(tl.maximum(tile, -LARGEST), LARGEST)
    DROPPED: tl.constexpr = 16 + EXPONENT_BITS  # bits of float32's mantissa that go, ties to even
    BIAS: tl.constexpr = 7 if EXPONENT_BITS == 4 else 15
    bits = tile.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + ((BIAS - 127) * 8388608 + (1 << (DROPPED - 1)) - 1) + ((size >> DROPPED) & 1)) >> DROPPED
    # Below the least normal number, floats lie evenly: adding a number whose last place is as wide rounds to them.
    WIDE: tl.constexpr = 2.0 ** (DROPPED - BIAS + 1)
    WIDE_BITS: tl.constexpr = (127 + DROPPED - BIAS + 1) * 8388608
    even = (tl.abs(tile) + WIDE).to(tl.int32, bitcast=True) - WIDE_BITS
    code = tl.where(size < (128 - BIAS) * 8388608, even, normal) | ((bits >> 24) & 0x80)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)


def encode_float8(codec: Float8, exponent_bits: int, x: torch.Tensor) -> Fields:
    """`[..., T, D]` to the fields that `codec.encode` returns."""
    *lead, head_dim = x.shape
    num_tokens = x.numel() // head_dim
    fields = {"codes": torch.empty(x.shape, dtype=torch.uint8, device=x.device)}
    if codec.scaled:
        fields["scale"] = torch.empty((*lead, 1), dtype=torch.float16, device=x.device)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "TOKENS": _TOKENS_OF_FLOATS,
        "EXPONENT_BITS": exponent_bits,
        "SCALED": codec.scaled,
    }
    if num_tokens:
        grid = (-(-num_tokens // _TOKENS_OF_FLOATS),)
        encode_float8_kernel[grid](x.contiguous(), fields["codes"], fields.get("scale"), num_tokens, **constants)
    return fields


def encode(codec: Affine, side: Side, rotation: torch.Tensor | None, x: torch.Tensor) -> Fields:
    """`[..., T, D]` to the fields that `codec.encode` returns, for head dims and groups that are powers of two."""
    *lead, tokens, head_dim = x.shape
    x = x.reshape(-1, tokens, head_dim)
    num = len(x)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((num, *shape), dtype=dtype, device=x.device)

    of_scale = (side.num_groups, side.lines) if side.by_channel else (side.lines, side.num_groups)
    fields = {
        "codes": empty((side.lines, side.columns // side.runs), torch.uint8),
        "scale": empty(of_scale, torch.uint8 if side.scales == "log8" else torch.float16),
    }
    if not side.symmetric:
        fields["zero"] = empty(of_scale, torch.float16)
    if side.scales == "log8" and side.by_channel:
        fields["base"] = empty((1,), torch.float16)
    constants: dict[str, Any] = {
        "SIDE": side,
        "HEAD_DIM": head_dim,
        "TOKENS": tokens,
        "ROTATED": rotation is not None,
        "CLIPS": not codec.nearest,
    }
    if num:
        encode_kernel[(num,)](
            *(x.contiguous(), fields["codes"], fields["scale"], fields.get("zero"), fields.get("base"), rotation),
            **constants,
            num_warps=8,  # with 4 the product of a rotation does not fit into their registers
        )
    return {name: y.view(*lead, *y.shape[1:]) for name, y in fields.items()}
