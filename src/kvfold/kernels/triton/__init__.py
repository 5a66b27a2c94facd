"""Attention on a GPU, in Triton: codes are multiplied as they lie in memory, by one family of kernels for every codec.

The signatures are those of kvfold.kernels.cpu. Nothing here imports Triton before it is asked for: `available` says whether it
can be had. KVFOLD_TRITON=off puts attention on the reference; KVFOLD_TRITON=interpret runs the kernels on CPU tensors in
Triton's interpreter (which needs TRITON_INTERPRET=1 as well, set before Triton is imported): slow, and the same arithmetic.

Numbers: codes and half precision numbers meet queries in half precision with sums in float32, bfloat16 ones meet queries in two
bfloat16 halves. Scales below 2^-14 lose bits as half precision does there.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kvfold.errors import KvfoldError
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, KVCodec, TensorCodec, part
from kvfold.store.dense import DenseCodec
from kvfold.store.fp8 import Float8
from kvfold.store.rotation import Rotated
from kvfold.store.scales import channel_group
from kvfold.store.table import Table

if TYPE_CHECKING:
    from kvfold.kernels.triton.layout import Side

VARIABLE = "KVFOLD_TRITON"
RUN_BLOCK = 64
"""Tokens of a dense run that are taken at once."""

_DENSE = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_MIN_HEAD_DIM = 16  # of a tensor core's product
_MAX_ROTATED = 128  # of encoding: a larger rotation and a block don't fit into a multiprocessor's shared memory
_EXPONENT_BITS = {"e4m3": 4, "e5m2": 5}


class TritonError(KvfoldError):
    """Something was asked of the Triton kernels that this installation can't do."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen(device: str) -> str | None:
    """The name of this family where it serves `device` (`cuda`, or `cpu` when asked for the interpreter), or None.

    TritonError when KVFOLD_TRITON asks for what can't be had.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "off", "interpret"):
        raise TritonError(f"{VARIABLE}={wanted}: it may be 'off' or 'interpret'")
    if wanted == "interpret":
        if not available() or not interpreted():
            why = "set TRITON_INTERPRET=1 as well" if available() else "install it with pip install 'kvfold[gpu]'"
            raise TritonError(f"{VARIABLE}=interpret needs Triton's interpreter: {why}")
        return "triton-interpreted" if device == "cpu" else None
    if wanted == "off" or device != "cuda" or not available() or interpreted():
        return None
    return "triton"


# -- what the kernels read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descriptor:
    """A segment as the kernels see it.

    Attributes:
        codec: of K and V: what is folded into queries and outputs is asked of it.
        k_side, v_side: how they lie in memory.
        tokens: T, of a block.
        fields: K's and V's tensors. Blocks are owned by their pool, which must outlive this.
        table: `[R, C] long`, or None for a run.
        slots: `[P, T] int32` of a pool, `[R, N] int32` of a run, or None where rows are contiguous.
        levels: half precision tables of K and V, where codes name levels.
    """

    codec: KVCodec
    k_side: "Side"
    v_side: "Side"
    tokens: int
    fields: Fields
    table: torch.Tensor | None
    slots: torch.Tensor | None
    levels: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    _spans: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """C: blocks of the longest row."""
        if self.table is not None:
            return self.table.shape[1]
        assert self.slots is not None
        return -(-self.slots.shape[1] // self.tokens)

    def spans(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts and lengths on the device, as int32; the last ones are kept."""
        key = (tuple(starts), tuple(lengths))
        if key not in self._spans:
            self._spans.clear()
            both = torch.tensor([starts, lengths], dtype=torch.int32, device=device)
            self._spans[key] = both[0], both[1]
        return self._spans[key]


@dataclass(frozen=True)
class Look:
    """Queries at a segment.

    Attributes:
        q: `[R, M, D] float32`, contiguous, scaled.
        first_visible: `[R, Q] long` or None.
        starts, lengths: for contiguous rows, R each; empty otherwise.
        spans: starts `[R] int32` and lengths `[R]` that only the device knows, in place of those.
        scores: `[R, M, N] float32` with a last axis that lies together, or None: where the scores of the segment's N places are
            left, times log2 e, -inf where a query sees nothing.
    """

    segment: Descriptor
    q: torch.Tensor
    first_visible: torch.Tensor | None
    starts: Sequence[int]
    lengths: Sequence[int]
    spans: tuple[torch.Tensor, torch.Tensor] | None = None
    scores: torch.Tensor | None = None


def supports(codec: KVCodec) -> bool:
    """Whether the kernels know how to read what this codec writes."""
    sides = [_inner(codec.k), _inner(codec.v)]
    if codec.block % 64 or codec.block & (codec.block - 1) or not all(map(_known, sides)):
        return False
    orders = [_side(side, codec.block, codec.block) for side in sides]
    return len({side.bits for side in orders if side.by_channel}) < 2  # two orders of tokens would meet in one product


def supports_dense(dtype: torch.dtype) -> bool:
    """Whether dense tokens of this type can be read."""
    return dtype in _DENSE


def supports_head_dim(head_dim: int) -> bool:
    """Whether the kernels take vectors of this size."""
    return _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM


def describe_blocks(
    codec: KVCodec, fields: Fields, table: torch.Tensor, slots: torch.Tensor | None, head_dim: int
) -> Descriptor | None:
    """Blocks of a pool: `table [R, C] long`, `slots [P, T] int32`, or None where rows are contiguous.

    None for a head dim that the kernels don't take. ValueError for fields that are not what the codec writes.
    """
    if not supports_head_dim(head_dim):
        return None
    capacity = next(iter(fields.values())).shape[0]
    _check("table", table, tuple(table.shape), torch.int64)
    if slots is not None:
        _check("slots", slots, (capacity, codec.block), torch.int32)
    k_side, v_side = (_side_on(table.device, _inner(side), codec.block, head_dim) for side in (codec.k, codec.v))
    _check_fields("k", _inner(codec.k), k_side, part("k", fields), capacity)
    _check_fields("v", _inner(codec.v), v_side, part("v", fields), capacity)
    levels = (_levels(codec.k, table.device), _levels(codec.v, table.device))
    return Descriptor(codec, k_side, v_side, codec.block, fields, table, slots, levels)


def describe_run(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> Descriptor | None:
    """Dense tokens: `k, v [R, N, D]` with a last axis that lies together, `slots [R, N] int32`; causal."""
    num_rows, num_tokens, head_dim = k.shape
    if not supports_head_dim(head_dim):
        return None
    slots = slots.contiguous()
    _check("slots", slots, (num_rows, num_tokens), torch.int32)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    if k.shape != v.shape or k.dtype != v.dtype or k.dtype not in _DENSE:
        raise ValueError(f"k and v must be alike, of float32, bfloat16 or float16: {k.dtype} {tuple(k.shape)}, {v.dtype}")
    codec = KVCodec(DenseCodec(k.dtype), DenseCodec(v.dtype))
    side = _side(codec.k, RUN_BLOCK, head_dim)
    return Descriptor(codec, side, side, RUN_BLOCK, {"k.x": k, "v.x": v}, None, slots)


def _inner(codec: TensorCodec) -> TensorCodec:
    return codec.inner if type(codec) is Rotated else codec


def _known(codec: TensorCodec) -> bool:
    """By exact type: a subclass may write its fields in another way."""
    if type(codec) is Table:
        return len(codec.levels) in (4, 16) and (codec.axis == "token" or codec.block % codec.group == 0)
    if type(codec) is Affine:
        return codec.bits in (8, 4, 2) and (codec.axis == "token" or codec.block % codec.group == 0)
    return type(codec) is Float8 or (type(codec) is DenseCodec and codec.dtype in _DENSE)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, (9, 0) for Hopper, say; Triton's interpreter counts as one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _side_on(device: torch.device, codec: TensorCodec, block: int, head_dim: int) -> "Side":
    side = _side(codec, block, head_dim)
    is_e4m3 = side.kind == "float8" and side.bits == _EXPONENT_BITS["e4m3"]
    return replace(side, by_bits=True) if is_e4m3 and capability(device) < (8, 9) else side


@functools.cache
def _side(codec: TensorCodec, block: int, head_dim: int) -> "Side":
    from kvfold.kernels.triton.layout import Side

    if isinstance(codec, Affine):
        by_channel = codec.axis == "channel"
        lines, columns = (head_dim, block) if by_channel else (block, head_dim)
        group = codec.group if by_channel else channel_group(head_dim, codec.group)
        return Side("affine", codec.bits, by_channel, lines, columns, group, codec.scales, codec.symmetric)
    if isinstance(codec, Table):
        by_channel = codec.axis == "channel"
        lines, columns = (head_dim, block) if by_channel else (block, head_dim)
        group = codec.group if by_channel else channel_group(head_dim, codec.group)
        return Side("table", codec.bits, by_channel, lines, columns, group, codec.scales, not codec.offset)
    if isinstance(codec, Float8):
        scales = "half" if codec.scaled else "none"
        return Side("float8", _EXPONENT_BITS[codec.format], False, block, head_dim, head_dim, scales)
    assert isinstance(codec, DenseCodec)
    return Side("dense", 8 * codec.dtype.itemsize, False, block, head_dim, head_dim)


def _levels(codec: TensorCodec, device: torch.device) -> torch.Tensor | None:
    inner = _inner(codec)
    return torch.tensor(inner.levels, dtype=torch.float16, device=device) if isinstance(inner, Table) else None


def _check_fields(name: str, codec: TensorCodec, side: "Side", fields: Fields, capacity: int) -> None:
    if isinstance(codec, DenseCodec):
        _check(f"{name}.x", fields["x"], (capacity, side.lines, side.columns), codec.dtype)
        return
    num_bytes = side.width * (2 if side.neighbours else 1)
    _check(f"{name}.codes", fields["codes"], (capacity, side.lines, num_bytes), torch.uint8)
    if side.scales == "none":
        return
    lead = (side.num_groups, side.lines) if side.by_channel else (side.lines, side.num_groups)
    _check(f"{name}.scale", fields["scale"], (capacity, *lead), torch.uint8 if side.scales == "log8" else torch.float16)
    if not side.symmetric:
        _check(f"{name}.zero", fields["zero"], (capacity, *lead), torch.float16)
    if side.scales == "log8" and side.by_channel:
        _check(f"{name}.base", fields["base"], (capacity, 1), torch.float16)


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        is_so = f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"
        raise ValueError(f"{name} must be {dtype} {shape}, contiguous; it is {is_so}")


# -- encoding ----------------------------------------------------------------------------------------------------------------


def encodes(codec: TensorCodec, block: int, num_tokens: int, head_dim: int) -> bool:
    """Whether `encode` can take the place of the codec's own encoding of so many tokens."""
    inner = _inner(codec)
    if not supports_head_dim(head_dim) or not _known(inner):
        return False
    if isinstance(inner, Float8):
        return codec is inner
    side = _side(inner, block, head_dim)
    whole = isinstance(inner, Affine) and num_tokens == block and not side.padded and side.group & (side.group - 1) == 0
    return whole and (codec is inner or head_dim <= _MAX_ROTATED)


def encode(codec: TensorCodec, x: torch.Tensor) -> Fields:
    """What `codec.encode` returns for `x [..., T, D]`."""
    from kvfold.kernels.triton import encoding

    inner = _inner(codec)
    with current(x.device):
        if isinstance(inner, Float8):
            return encoding.encode_float8(inner, _EXPONENT_BITS[inner.format], x)
        assert isinstance(inner, Affine)
        rotation = codec.matrix_on(x.device) if isinstance(codec, Rotated) else None
        return encoding.encode(inner, _side(inner, x.shape[-2], x.shape[-1]), rotation, x)


# -- attention ---------------------------------------------------------------------------------------------------------------


def attend(
    looks: Sequence[Look], slots: torch.Tensor, num_groups: int, softcap: float | None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all segments together: `out [R, M, D] float32` and `lse [R, M] float32`.

    Args:
        slots: `[Q] long`, the slot of each query; M = num_groups * Q.
        dtype: the model's own; products here depend on the segments' types alone.
    """
    from kvfold.kernels.triton.launch import attend

    with current(slots.device):
        return attend(looks, slots, num_groups, softcap)


def mass(
    look: Look, slots: torch.Tensor, num_groups: int, softcap: float | None, lse: torch.Tensor, width: int
) -> torch.Tensor:
    """`[R, G, width] float32`: the attention that each place of the segment receives, given `lse [R, M]` of the whole."""
    from kvfold.kernels.triton.launch import mass

    with current(slots.device):
        return mass(look, slots, num_groups, softcap, lse, width)


def received(scores: torch.Tensor, lse: torch.Tensor, largest: bool) -> torch.Tensor:
    """`[R, N] float32`: the mean, or the largest, over queries of the attention that each place receives.

    Args:
        scores: `[R, M, N]`, contiguous, as `attend` has left them (`Look.scores`).
        lse: `[R, M]` of the whole.
    """
    from kvfold.kernels.triton.launch import received

    with current(scores.device):
        return received(scores, lse, largest)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
