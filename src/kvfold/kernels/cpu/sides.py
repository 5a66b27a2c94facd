"""K or V of a pool's blocks as the compiled code sees it: where the codes lie, and what is folded around them.

A codec is taken apart from the outside: a rotation, then low rank and outliers, then codes.
"""

import functools
from typing import Any

import torch

from kvfold.kernels.cpu.library import KINDS, SCALE_KINDS, TABLE_KINDS, address, check, head_dim_within, native
from kvfold.store.affine import Affine
from kvfold.store.bands import Bands, normal_levels
from kvfold.store.base import Fields, TensorCodec, part
from kvfold.store.dense import DenseCodec
from kvfold.store.fitted import Fitted
from kvfold.store.fp8 import Float8
from kvfold.store.outliers import Outliers
from kvfold.store.residual import Residual
from kvfold.store.rotation import Rotated
from kvfold.store.subspace import Subspace
from kvfold.store.table import Table

Coded = Affine | Table | Fitted


def known(codec: TensorCodec) -> bool:
    """Whether the compiled code reads what a codec writes: by exact type, as a subclass may write its fields in another way."""
    if type(codec) is Rotated:
        codec = codec.inner
    if type(codec) is Bands:
        return True
    if type(codec) is Residual:
        if type(codec.second) is not Subspace or codec.second.inner != DenseCodec(torch.float16):
            return False
        codec = codec.first
    if type(codec) is Outliers:
        codec = codec.inner
    if isinstance(codec, Coded):
        bits = {Affine: (8, 4, 2), Table: (4, 3, 2), Fitted: (4, 3, 2)}.get(type(codec), ())
        return codec.bits in bits and (codec.axis == "token" or codec.block % codec.group == 0)
    return type(codec) is Float8 or (type(codec) is DenseCodec and codec.dtype in KINDS)


def describe(codec: TensorCodec, fields: Fields, capacity: int, block: int, head_dim: int) -> Any:
    """K or V of `capacity` blocks. ValueError when fields are not what the codec writes."""
    head_dim_within(head_dim)
    rotation = 0
    if isinstance(codec, Rotated):
        matrix = codec.matrix()  # made once, never freed
        check("rotation", matrix, (head_dim, head_dim), torch.float32)
        rotation, codec = matrix.data_ptr(), codec.inner
    if isinstance(codec, Bands):
        return _bands(codec, fields, capacity, block, head_dim, rotation)
    if isinstance(codec, Residual):
        side = _repaired(codec.first, part("first", fields), capacity, block, head_dim, rotation)
        assert isinstance(codec.second, Subspace)
        _set_low_rank(side, codec.second, part("second", fields), capacity, block, head_dim)
        return side
    return _repaired(codec, fields, capacity, block, head_dim, rotation)


def _bands(codec: Bands, fields: Fields, capacity: int, block: int, head_dim: int, rotation: int) -> Any:
    if len(codec.bits) != head_dim or block != codec.block:
        raise ValueError(f"{codec} holds {codec.block} tokens of {len(codec.bits)} channels, not {block} of {head_dim}")
    bands = [(bits, lines.stop - lines.start, block * bits // 8) for bits, lines in codec.bands()]
    block_bytes = sum(lines * line for _, lines, line in bands)
    check("codes", fields["codes"], (capacity, block_bytes), torch.uint8)
    check("scale", fields["scale"], (capacity, codec.num_coded), torch.uint8)
    check("zero", fields["zero"], (capacity, codec.num_coded), torch.float16 if codec.exact_zeros else torch.int8)
    if codec.outliers:
        check("place", fields["place"], (capacity, codec.outliers), torch.int16)
        check("value", fields["value"], (capacity, codec.outliers), torch.float16)
    return native.banded_side(
        [(TABLE_KINDS[bits], lines, line, _normal_levels(bits).data_ptr()) for bits, lines, line in bands],
        fields["codes"].data_ptr(),
        block_bytes,
        fields["scale"].data_ptr(),
        fields["zero"].data_ptr(),
        codec.exact_zeros,
        codec.outliers,
        address(fields.get("value")),
        address(fields.get("place")),
        rotation,
    )


@functools.cache
def _normal_levels(bits: int) -> torch.Tensor:
    """Made once, never freed; small tables are repeated to fill a vector."""
    return torch.tensor(normal_levels(bits) * max(1, 16 >> bits), dtype=torch.float32)


def _repaired(codec: TensorCodec, fields: Fields, capacity: int, block: int, head_dim: int, rotation: int) -> Any:
    if not isinstance(codec, Outliers):
        return _codes(codec, fields, capacity, block, head_dim, rotation)
    side = _codes(codec.inner, part("rest", fields), capacity, block, head_dim, rotation)
    value, place = fields["value"], fields["place"]
    by_channel = codec.axis == "channel"
    shape = (capacity, head_dim if by_channel else block, value.shape[-1])
    check("value", value, shape, torch.float16)
    check("place", place, shape, torch.int16 if place.dtype == torch.int16 else torch.uint8)
    side.set_outliers(value.shape[-1], by_channel, value.data_ptr(), place.data_ptr(), place.element_size())
    return side


def _set_low_rank(side: Any, codec: Subspace, fields: Fields, capacity: int, block: int, head_dim: int) -> None:
    basis, z = fields["basis"], fields["z.x"]
    check("basis", basis, (capacity, head_dim, codec.rank), torch.float16)
    check("z.x", z, (capacity, block, codec.rank), torch.float16)
    side.set_low_rank(codec.rank, basis.data_ptr(), z.data_ptr())


def _codes(codec: TensorCodec, fields: Fields, capacity: int, block: int, head_dim: int, rotation: int) -> Any:
    if isinstance(codec, DenseCodec):
        check("x", fields["x"], (capacity, block, head_dim), codec.dtype)
        line = head_dim * codec.dtype.itemsize
        at = fields["x"].data_ptr()
        return native.side(KINDS[codec.dtype], False, 0, at, block * line, 0, line, 0, 0, 0, 1, 0.0, rotation)
    codes = fields["codes"]
    if isinstance(codec, Float8):
        check("codes", codes, (capacity, block, head_dim), torch.uint8)
        if codec.scaled:
            check("scale", fields["scale"], (capacity, block, 1), torch.float16)
        kind, scales = KINDS[codec.format], SCALE_KINDS["half" if codec.scaled else None]
        scale = address(fields.get("scale"))
        line = head_dim
        return native.side(kind, False, scales, codes.data_ptr(), block * line, 0, line, scale, 0, 0, 1, 0.0, rotation)
    if not isinstance(codec, Coded):
        raise ValueError(f"the CPU kernels don't know {type(codec).__name__}")
    return _scaled_codes(codec, fields, capacity, block, head_dim, rotation)


def _scaled_codes(codec: Coded, fields: Fields, capacity: int, block: int, head_dim: int, rotation: int) -> Any:
    by_channel = codec.axis == "channel"
    lines, columns = (head_dim, block) if by_channel else (block, head_dim)
    scale = fields["scale"]
    if scale.dim() != 3:
        raise ValueError(f"scales have 3 axes, these {scale.dim()}")
    groups = scale.shape[1] if by_channel else scale.shape[2]
    line = columns * codec.bits // 8
    of_scale = (capacity, groups, head_dim) if by_channel else (capacity, block, groups)
    if groups < 1 or columns % groups:
        raise ValueError(f"{groups} scales for {columns} codes")
    check("codes", fields["codes"], (capacity, lines, line), torch.uint8)
    check("scale", scale, of_scale, torch.uint8 if codec.scales == "log8" else torch.float16)
    if codec.scales == "log8" and by_channel:
        check("base", fields["base"], (capacity, 1), torch.float16)
    if _has_zero(codec):
        check("zero", fields["zero"], of_scale, torch.float16)
    side = native.side(
        KINDS[codec.bits] if isinstance(codec, Affine) else TABLE_KINDS[codec.bits],
        by_channel,
        SCALE_KINDS[codec.scales],
        fields["codes"].data_ptr(),
        lines * line,
        0,
        line,
        scale.data_ptr(),
        fields["zero"].data_ptr() if _has_zero(codec) else 0,
        address(fields.get("base")),
        groups,
        (2**codec.bits - 1) / 2 if isinstance(codec, Affine) and codec.symmetric else 0.0,
        rotation,
        codec.levels if isinstance(codec, Table) else (),
    )
    if isinstance(codec, Fitted):
        check("levels", fields["levels"], (capacity, 2**codec.bits), torch.float16)
        side.set_block_levels(fields["levels"].data_ptr())
    return side


def _has_zero(codec: Coded) -> bool:
    return not codec.symmetric if isinstance(codec, Affine) else isinstance(codec, Fitted) or codec.offset
