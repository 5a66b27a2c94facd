"""Quantizing and packing on the CPU, in C++: the fields of `kvfold.store.affine`, `fp8` and `table`, bit for bit.

What no other code would add up in the same order stays torch's: a rotation before the codec, and the scales of tables, which
may be root mean squares. Tables' levels are chosen and packed here.
"""

import torch

from kvfold.kernels import cpu
from kvfold.kernels.cpu.library import KINDS, MAX_HEAD_DIM, SCALE_KINDS, TABLE_KINDS, address, head_dim_within, native
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.fp8 import Float8
from kvfold.store.rotation import Rotated
from kvfold.store.scales import channel_group, scale_bounds, scale_grid
from kvfold.store.table import Table


def encodes(codec: TensorCodec) -> bool:
    """Whether the compiled code writes what this codec does: by exact type, as a subclass may write in another way."""
    inner = codec.inner if type(codec) is Rotated else codec
    return (type(inner) is Affine and inner.bits in (8, 4, 2)) or type(inner) in (Table, Float8)


def encode(codec: TensorCodec, x: torch.Tensor) -> Fields:
    """What `codec.encode(x)` returns, for `x [..., T, D]` on the CPU. ValueError where that has no meaning."""
    if isinstance(codec, Rotated):
        return encode(codec.inner, codec.turn(x))
    _check_input(x)
    if isinstance(codec, Table):
        return _encode_in_table(codec, x.float().contiguous())
    x = x.contiguous()
    if isinstance(codec, Float8):
        return _encode_in_float8(codec, x)
    assert isinstance(codec, Affine)
    *lead, num_tokens, head_dim = x.shape
    by_channel = codec.axis == "channel"
    group = codec.group if by_channel else channel_group(head_dim, codec.group)
    across, along = (head_dim, num_tokens) if by_channel else (num_tokens, head_dim)
    _check_lines(codec, along, group, head_dim)
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
    kinds = KINDS[codec.bits], KINDS[x.dtype], by_channel, codec.symmetric, SCALE_KINDS[codec.scales], group
    _run(kinds, x, fields, grid, bounds)
    return fields


def _encode_in_float8(codec: Float8, x: torch.Tensor) -> Fields:
    *lead, num_tokens, head_dim = x.shape
    head_dim_within(head_dim)
    fields = {"codes": x.new_empty(x.shape, dtype=torch.uint8)}
    if codec.scaled:
        fields["scale"] = x.new_empty(*lead, num_tokens, 1, dtype=torch.float16)
    scales = SCALE_KINDS["half" if codec.scaled else None]
    _run((KINDS[codec.format], KINDS[x.dtype], False, True, scales, head_dim), x, fields)
    return fields


def _run(
    kinds: tuple[int | bool, ...],
    x: torch.Tensor,
    fields: Fields,
    grid: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Fills the fields of `x [..., T, D]`; `kinds`: of codes and input, by channel, symmetric, of scales, the group."""
    num_tokens, head_dim = x.shape[-2:]
    native.choose(cpu.chosen())
    native.encode(
        *kinds,
        address(grid),
        address(bounds),
        x.data_ptr(),
        x[..., 0, 0].numel(),
        num_tokens,
        head_dim,
        *(address(fields.get(name)) for name in ("codes", "scale", "zero", "base")),
        cpu._threads(),
    )


def _encode_in_table(codec: Table, x: torch.Tensor) -> Fields:
    *lead, num_tokens, head_dim = x.shape
    by_channel = codec.axis == "channel"
    group = codec.group if by_channel else channel_group(head_dim, codec.group)
    across, along = (head_dim, num_tokens) if by_channel else (num_tokens, head_dim)
    _check_lines(codec, along, group, head_dim)
    fields = codec.fit_scales(x)
    scale, zero = codec.load_scales(fields)
    codes = x.new_empty(*lead, across, along * codec.bits // 8, dtype=torch.uint8)
    native.choose(cpu.chosen())
    native.name_levels(
        TABLE_KINDS[codec.bits],
        by_channel,
        group,
        codec.middles(x).tolist(),
        x.data_ptr(),
        x[..., 0, 0].numel(),
        num_tokens,
        head_dim,
        scale.data_ptr(),
        address(zero),
        codes.data_ptr(),
        cpu._threads(),
    )
    return {"codes": codes} | fields


def _check_input(x: torch.Tensor) -> None:
    if not x.is_cpu or x.dtype not in KINDS or x.dim() < 2:
        raise ValueError(f"x must be [..., T, D] of float32, bfloat16 or float16, on the CPU; it is {x.dtype} {tuple(x.shape)}")


def _check_lines(codec: Affine | Table, along: int, group: int, head_dim: int) -> None:
    whole = 8 if codec.bits == 3 else 8 // codec.bits
    if along % group or along % whole or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{along} numbers along the {codec.axis} can't be held by {codec}")
