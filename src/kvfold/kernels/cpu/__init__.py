"""Attention on the CPU, in C++: codes are multiplied as they lie in memory, with as many threads as torch uses.

What reaches the compiled code is checked here: types, devices, shapes and strides that it does not expect raise ValueError.
The instruction set is the best that the machine has; KVFOLD_CPU=avx512, avx2 or portable (`available`
has all) chooses another, KVFOLD_CPU=off none: attention then runs on the reference.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvfold.errors import KvfoldError
from kvfold.kernels.cpu import library, sides
from kvfold.kernels.cpu.library import KINDS, address, check, head_dim_within
from kvfold.store.base import Fields, KVCodec, part

_native: Any = library.native

VARIABLE = "KVFOLD_CPU"
RUN_BLOCK = 64
"""Tokens of a dense run that are taken at once."""


class KernelError(KvfoldError):
    """A kernel was asked for that this machine or build does not have."""


@dataclass(frozen=True)
class Descriptor:
    """A segment as the compiled code sees it: addresses.

    Attributes:
        tensors: what it points to and may have no other owner. Blocks are owned by their pool, which must outlive it.
    """

    native: Any
    tensors: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Sides:
    """K and V of the blocks of a pool, which must outlive this."""

    k: Any
    v: Any
    block: int
    head_dim: int

    def at(self, table: torch.Tensor, slots: torch.Tensor | None = None) -> Descriptor:
        """The blocks that `table [R, C] long` names, which is trusted to name none outside of the pool (-1: none)."""
        rows, columns = table.shape
        sizes = rows, columns, self.block, self.head_dim, columns * self.block
        return Descriptor(_native.segment(self.k, self.v, *sizes, table.data_ptr(), address(slots), False), (table,))


@dataclass(frozen=True)
class Look:
    """Queries at a segment.

    Attributes:
        q: `[R, M, D] float32`, contiguous.
        first_visible: `[R, Q] long` or None.
        starts, lengths: for contiguous rows, R each; empty otherwise.
    """

    segment: Descriptor
    q: torch.Tensor
    first_visible: torch.Tensor | None
    starts: Sequence[int]
    lengths: Sequence[int]


@functools.cache
def available() -> tuple[str, ...]:
    """Instruction sets that this build and machine have, the best first; empty without compiled kernels."""
    return tuple(_native.available()) if _native else ()


def chosen() -> str | None:
    """The instruction set in use, or None for the reference. KernelError when KVFOLD_CPU names one that is not there."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if not wanted:
        return available()[0] if _native else None
    if wanted not in available():
        there = ", ".join([*available(), "off"])
        why = "" if _native else "; kvfold was installed without its compiled kernels"
        raise KernelError(f"{VARIABLE}={wanted} can't be had here, only: {there}{why}")
    return wanted


# -- what the compiled code reads --------------------------------------------------------------------------------------------


def supports(codec: KVCodec) -> bool:
    """Whether the compiled code knows how to read what this codec writes."""
    return codec.block % 64 == 0 and all(sides.known(side) for side in (codec.k, codec.v))


def supports_dense(dtype: torch.dtype) -> bool:
    """Whether dense tokens of this type can be read."""
    return dtype in KINDS


def describe_blocks(
    codec: KVCodec, fields: Fields, table: torch.Tensor, slots: torch.Tensor | None, head_dim: int
) -> Descriptor:
    """Blocks of a pool: `table [R, C] long`, `slots [P, T] int32` or None where rows are contiguous."""
    capacity = next(iter(fields.values())).shape[0]
    check("table", table, tuple(table.shape), torch.int64)
    if slots is not None:
        check("slots", slots, (capacity, codec.block), torch.int32)
    if table.numel() and (int(table.max()) >= capacity or int(table.min()) < -1):
        raise ValueError(f"the table names blocks outside of the pool of {capacity}")
    described = describe_sides(codec, fields, head_dim).at(table, slots)
    return replace(described, tensors=())  # the table is the pool's, as blocks are


def describe_sides(codec: KVCodec, fields: Fields, head_dim: int) -> "Sides":
    """The blocks of a pool, before it is known which of them a row has."""
    capacity = next(iter(fields.values())).shape[0]
    k, v = (sides.describe(getattr(codec, name), part(name, fields), capacity, codec.block, head_dim) for name in ("k", "v"))
    return Sides(k, v, codec.block, head_dim)


def describe_run(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> Descriptor:
    """Dense tokens: `k, v [R, N, D]` with a last axis that lies together, `slots [R, N] int32`; causal."""
    num_rows, num_tokens, head_dim = k.shape
    slots = slots.contiguous()
    check("slots", slots, (num_rows, num_tokens), torch.int32)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    dtype, size = k.dtype, k.element_size()
    if not (k.is_cpu and v.is_cpu and k.shape == v.shape and dtype == v.dtype and dtype in KINDS):
        is_so = f"{k.dtype} {tuple(k.shape)} on {k.device}, {v.dtype} {tuple(v.shape)} on {v.device}"
        raise ValueError(f"k and v must be alike, of float32, bfloat16 or float16, on the CPU; they are {is_so}")
    both = []
    for x in (k, v):
        row, line, _ = x.stride()
        both.append(_native.side(KINDS[dtype], False, 0, x.data_ptr(), 0, row * size, line * size, 0, 0, 0, 1, 0.0, 0))
    columns = -(-num_tokens // RUN_BLOCK)
    segment = _native.segment(
        *both, num_rows, columns, RUN_BLOCK, head_dim_within(head_dim), num_tokens, 0, slots.data_ptr(), True
    )
    return Descriptor(segment, (k, v, slots))


# -- attention ---------------------------------------------------------------------------------------------------------------


def attend(
    looks: Sequence[Look], slots: torch.Tensor, num_groups: int, softcap: float | None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all segments together: `out [R, M, D] float32` and `lse [R, M] float32`.

    Args:
        slots: `[Q] long`, the slot of each query; M = num_groups * Q.
        dtype: the model's own. Under bfloat16 more than 8 vectors may be multiplied in it, with sums in float32.
    """
    q = looks[0].q
    given = [_given(look, q.shape, slots, num_groups) for look in looks]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2])
    _native.choose(chosen())
    sizes, in_bf16 = _sizes(q, num_groups), dtype == torch.bfloat16
    _native.attend(given, *sizes, slots.data_ptr(), softcap or 0.0, in_bf16, out.data_ptr(), lse.data_ptr(), _threads())
    return out, lse


def mass(
    look: Look, slots: torch.Tensor, num_groups: int, softcap: float | None, lse: torch.Tensor, width: int
) -> torch.Tensor:
    """`[R, G, width] float32`: the attention that each place of the segment receives, given `lse [R, M]` of the whole."""
    q = look.q
    given = _given(look, q.shape, slots, num_groups)
    lse = lse.contiguous()
    check("lse", lse, tuple(q.shape[:2]), torch.float32)
    received = q.new_empty(q.shape[0], num_groups, width)
    _native.choose(chosen())
    sizes = _sizes(q, num_groups)
    _native.mass(given, *sizes, slots.data_ptr(), softcap or 0.0, lse.data_ptr(), received.data_ptr(), width, _threads())
    return received


def _given(look: Look, shape: torch.Size, slots: torch.Tensor, num_groups: int) -> tuple[Any, ...]:
    num_rows, num_vectors, _ = shape
    check("q", look.q, tuple(shape), torch.float32)
    check("slots of the queries", slots, (num_vectors // num_groups,), torch.int64)
    if look.first_visible is not None:
        check("first_visible", look.first_visible, (num_rows, len(slots)), torch.int64)
    return look.segment.native, look.q.data_ptr(), address(look.first_visible), look.starts, look.lengths


def _sizes(q: torch.Tensor, num_groups: int) -> tuple[int, int, int, int]:
    """Rows, groups, queries, head dim."""
    return q.shape[0], num_groups, q.shape[1] // num_groups, q.shape[2]


def _threads() -> int:
    return torch.get_num_threads()
