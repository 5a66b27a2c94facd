"""Quantizing and packing on the CPU, in C++: the same fields as `kvfold.store.affine` makes, bit for bit.

A rotation before the codec stays torch's product, whose sums no other code would add up in the same order.
"""

import torch

from kvfold.kernels import cpu
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.rotation import Rotated
from kvfold.store.scales import channel_group, scale_bounds, scale_grid


def encodes(codec: TensorCodec) -> bool:
    """Whether the compiled code writes what this codec does: by exact type, as a subclass may write in another way."""
    inner = codec.inner if type(codec) is Rotated else codec
    return type(inner) is Affine and inner.bits in (8, 4, 2)


def encode(codec: TensorCodec, x: torch.Tensor) -> Fields:
    """What `codec.encode(x)` returns, for `x [..., T, D]` on the CPU. ValueError where that has no meaning."""
    if isinstance(codec, Rotated):
        return encode(codec.inner, codec.turn(x))
    assert isinstance(codec, Affine)
    if not x.is_cpu or x.dtype not in cpu._KINDS or x.dim() < 2:
        raise ValueError(f"x must be [..., T, D] of float32, bfloat16 or float16, on the CPU; it is {x.dtype} {tuple(x.shape)}")
    x = x.contiguous()
    *lead, num_tokens, head_dim = x.shape
    by_channel = codec.axis == "channel"
    group = codec.group if by_channel else channel_group(head_dim, codec.group)
    across, along = (head_dim, num_tokens) if by_channel else (num_tokens, head_dim)
    if along % group or along % (8 // codec.bits) or not 0 < head_dim <= cpu.MAX_HEAD_DIM:
        raise ValueError(f"{along} numbers along the {codec.axis} can't be held by {codec}")
    of_scale = (*lead, along // group, head_dim) if by_channel else (*lead, num_tokens, along // group)
    log8 = codec.scales == "log8"
    fields = {
        "codes": x.new_empty(*lead, across, along * codec.bits // 8, dtype=torch.uint8),
        "scale": x.new_empty(of_scale, dtype=torch.uint8 if log8 else torch.float16),
    }
    if log8 and by_channel:
        fields["base"] = x.new_empty(*lead, 1, dtype=torch.float16)
    if not codec.symmetric:
        fields["zero"] = x.new_empty(of_scale, dtype=torch.float16)
    grid, bounds = (scale_grid(codec.axis), scale_bounds(codec.axis, codec.nearest)) if log8 else (None, None)
    cpu._native.choose(cpu.chosen())
    cpu._native.encode(
        cpu._KINDS[codec.bits],
        cpu._KINDS[x.dtype],
        by_channel,
        codec.symmetric,
        cpu._SCALE_KINDS[codec.scales],
        group,
        cpu._address(grid),
        cpu._address(bounds),
        x.data_ptr(),
        x[..., 0, 0].numel(),
        num_tokens,
        head_dim,
        *(cpu._address(fields.get(name)) for name in ("codes", "scale", "zero", "base")),
        cpu._threads(),
    )
    return fields
