"""A decoder layer around its attention for a few tokens on the CPU, and its matrices, in C++.

Weights are read once a step, as they lie in memory (plain numbers, or packed codes of 4 and 8 bits); everything in between is
float32. As in `kvfold.kernels.cpu`, what reaches the compiled code is checked here: types, devices, shapes and
strides that it does not expect raise ValueError. Packed weights are tiles of 16 rows by 32 columns (step.h says how they lie).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvfold.kernels import cpu
from kvfold.kernels.cpu.library import address

TILE_ROWS = 16
GROUP = 32
TILE_BYTES = {"int4": 320, "int8": 544}
MOST_VECTORS = 8
"""Tokens that a step takes; with more, matrix products on plain numbers are faster."""

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKED = {"int4": 3, "int8": 4}
_KNOWN = {*NUMBERS, torch.uint8}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def usable() -> bool:
    """Whether there are compiled kernels, and KVFOLD_CPU does not turn them off."""
    return cpu.chosen() is not None


def supports(dtype: torch.dtype) -> bool:
    return dtype in NUMBERS


@dataclass(frozen=True)
class Weight:
    """A matrix as the compiled code sees it, and the tensors that it points to.

    Attributes:
        data: `[rows, columns]` numbers, or `[tiles, groups, bytes] uint8`.
        bias: `[rows] float32` or None.
    """

    native: Any
    rows: int
    columns: int
    data: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Norm:
    """`weight [size] float32`, or None for no norm."""

    native: Any
    weight: torch.Tensor | None


def dense_weight(data: torch.Tensor, bias: torch.Tensor | None) -> Weight:
    """Plain numbers, `[rows, columns]`."""
    if data.dim() != 2 or data.dtype not in NUMBERS:
        raise ValueError(f"a weight has two axes of float32, bfloat16 or float16, this is {data.dtype} {tuple(data.shape)}")
    rows, columns = data.shape
    return _weight(NUMBERS[data.dtype], data, rows, columns, bias)


def packed_weight(form: str, data: torch.Tensor, rows: int, columns: int, bias: torch.Tensor | None) -> Weight:
    """Tiles, `[ceil(rows / 16), columns / 32, TILE_BYTES[form]] uint8`."""
    if columns % GROUP:
        raise ValueError(f"{columns} columns are no multiple of {GROUP}")
    check("packed weight", data, (-(-rows // TILE_ROWS), columns // GROUP, TILE_BYTES[form]), torch.uint8)
    return _weight(_PACKED[form], data, rows, columns, bias)


def _weight(form: int, data: torch.Tensor, rows: int, columns: int, bias: torch.Tensor | None) -> Weight:
    check("weight", data, tuple(data.shape), data.dtype)
    if bias is not None:
        bias = bias.detach().float().contiguous()
        check("bias", bias, (rows,), torch.float32)
    native = cpu._native.weight(form, data.data_ptr(), rows, columns, 0 if bias is None else bias.data_ptr())
    return Weight(native, rows, columns, data, bias)


def norm(weight: torch.Tensor | None, eps: float) -> Norm:
    """y = x / sqrt(mean(x²) + eps) · weight."""
    if weight is not None:
        check("norm", weight, (weight.numel(),), torch.float32)
    return Norm(cpu._native.norm(0 if weight is None else weight.data_ptr(), eps), weight)


def linear(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """`x [..., columns]` to `[..., rows]` in x's type; up to MOST_VECTORS vectors."""
    x = x.contiguous()
    count = _count(x, weight.columns)
    check("x", x, tuple(x.shape), x.dtype)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    if count:
        choose()
        cpu._native.linear(weight.native, NUMBERS[x.dtype], x.data_ptr(), count, out.data_ptr(), torch.get_num_threads())
    return out


def unpack(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight as numbers, `[rows, columns]`."""
    if weight.data.dtype != torch.uint8:
        raise ValueError(f"the weight is not packed, it is {weight.data.dtype}")
    out = torch.empty(weight.rows, weight.columns, dtype=dtype)
    choose()
    cpu._native.unpack(weight.native, NUMBERS[dtype], out.data_ptr(), torch.get_num_threads())
    return out


class Token(NamedTuple):
    """A decode step as a layer is asked for it.

    Attributes:
        layer: the compiled decoder layer.
        hidden: `[B, 1, H]`.
        positions: cosines and sines of RoPE, `[1 or B, 1, rotary dim]`.
        scaling, softcap: of the scores.
        slot: the token's.
    """

    layer: "DecoderLayer"
    hidden: torch.Tensor
    positions: tuple[torch.Tensor, torch.Tensor]
    scaling: float
    softcap: float | None
    slot: int


class DecoderLayer:
    """Two halves of a layer, before and after its attention.

    Args:
        weights: of queries, keys, values, the attention's output, gate, up and down.
        norms: before attention, of queries, of keys, after attention, before the MLP, after it.
        activation: of ACTIVATIONS.
        dtype: of the hidden states, keys and values.
    """

    def __init__(
        self,
        weights: tuple[Weight, ...],
        norms: tuple[Norm, ...],
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        activation: str,
        dtype: torch.dtype,
    ):
        o, gate = weights[3], weights[4]
        self.hidden, self.dtype, self.head_dim = o.rows, dtype, head_dim
        self.num_query_heads, self.num_kv_heads = num_query_heads, num_kv_heads
        self.q_size, self.kv_size = num_query_heads * head_dim, num_kv_heads * head_dim
        shapes = [(w.rows, w.columns) for w in weights]
        inner = gate.rows
        if shapes != [
            (self.q_size, self.hidden),
            (self.kv_size, self.hidden),
            (self.kv_size, self.hidden),
            (self.hidden, self.q_size),
            (inner, self.hidden),
            (inner, self.hidden),
            (self.hidden, inner),
        ]:
            raise ValueError(f"weights of these shapes make no layer: {shapes}")
        sizes = (self.hidden, head_dim, head_dim, self.hidden, self.hidden, self.hidden)
        for one, size in zip(norms, sizes, strict=True):
            if one.weight is not None:
                check("norm", one.weight, (size,), torch.float32)
        self.weights, self.norms, self.activation = weights, norms, activation
        native = [[w.native for w in weights], [n.native for n in norms]]
        self._native = cpu._native.decoder_layer(
            NUMBERS[dtype], ACTIVATIONS[activation], num_query_heads, num_kv_heads, head_dim, *native
        )

    def before_attention(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of `hidden [B, Q, H]`, positions applied.

        Args:
            cos, sin: `[1 or B, Q, rotary dim]`, of one type.

        Returns:
            `[B, Q, Hq, D] float32`, and twice `[B, Q, Hkv, D]` in the layer's type.
        """
        cos, sin, same = self._positions(hidden, cos, sin)
        batch, length, _ = hidden.shape
        q = torch.empty(batch, length, self.num_query_heads, self.head_dim)
        k = torch.empty(batch, length, self.num_kv_heads, self.head_dim, dtype=self.dtype)
        v = torch.empty_like(k)
        choose()
        cpu._native.before_attention(
            self._native,
            *_asked(hidden, cos, sin, same),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            torch.get_num_threads(),
        )
        return q, k, v

    def step(
        self, tail: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """The whole layer for the next token of every sequence, `hidden [B, 1, H]` to `[B, 1, H]`.

        Args:
            tail: a native one, with room; the keys and values go there.
            cos, sin: `[1 or B, 1, rotary dim]`.
        """
        cos, sin, same = self._positions(hidden, cos, sin)
        out = torch.empty_like(hidden)
        choose()
        cpu._native.step(
            self._native,
            tail,
            *_asked(hidden, cos, sin, same),
            scaling,
            softcap or 0.0,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def come(
        self,
        turnover: Any,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        scaling: float,
        softcap: float | None,
        *,
        place: int,
        slot: int,
        shift: tuple[torch.Tensor, int] | None,
        largest: bool,
        score: torch.Tensor | None,
        mass: torch.Tensor | None,
        queries: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer for the next token of every sequence, up to its attention: `hidden [B, 1, H]` to `[B, 1, Hq, D] float32`.

        Args:
            turnover: a native one; the token goes to a `place` of its run, with that `slot`.
            cos, sin: `[1 or B, 1, rotary dim]`.
            shift: by which positions queries are moved where they look at sinks, by these frequencies `[half] float32`.
            largest: whether a KV head's tokens receive the largest of their query heads, or else the mean.
            score: `[R, N] float32`, in which the new token gets 0.
            mass: `[R, N] float32`, which becomes what tokens received.
            queries: `[R, G, 1, D] float32`, which become what was asked, scaled.
        """
        cos, sin, same = self._positions(hidden, cos, sin)
        attended = torch.empty(hidden.shape[0], 1, self.num_query_heads, self.head_dim)
        inv_freq, by = shift if shift else (None, 0)
        if inv_freq is not None:
            check("inv_freq", inv_freq, (cos.shape[-1] // 2,), torch.float32)
        choose()
        cpu._native.come(
            self._native,
            turnover,
            *_asked(hidden, cos, sin, same),
            address(inv_freq),
            cos.shape[-1] // 2,
            by,
            scaling,
            softcap or 0.0,
            place,
            slot,
            largest,
            address(score),
            address(mass),
            address(queries),
            attended.data_ptr(),
            torch.get_num_threads(),
        )
        return attended

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output `[B, Q, H]`, given its input and `attended [B, Q, Hq, D] float32`."""
        batch, length, _ = hidden.shape
        check("hidden", hidden, (batch, length, self.hidden), self.dtype)
        check("attended", attended, (batch, length, self.num_query_heads, self.head_dim), torch.float32)
        out = torch.empty_like(hidden)
        choose()
        cpu._native.after_attention(
            self._native, hidden.data_ptr(), attended.data_ptr(), batch * length, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def _positions(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Cosines and sines as the compiled code takes them, and whether all tokens have the same; everything is checked."""
        batch, length, _ = hidden.shape
        check("hidden", hidden, (batch, length, self.hidden), self.dtype)
        rotary = cos.shape[-1]
        same = cos.shape[0] == length == 1
        if not same and cos.shape[0] != batch:
            cos, sin = (x.expand(batch, -1, -1).contiguous() for x in (cos, sin))
        check("cos", cos, (1 if same else batch, length, rotary), cos.dtype)
        check("sin", sin, tuple(cos.shape), cos.dtype)
        if rotary > self.head_dim or rotary % 2:
            raise ValueError(f"positions of {rotary} channels for heads of {self.head_dim}")
        return cos, sin, same


def _asked(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, same: bool) -> tuple[int, ...]:
    """Vectors and their positions as the compiled code takes them; whoever calls holds the tensors until it is done."""
    count = hidden.shape[0] * hidden.shape[1]
    return hidden.data_ptr(), count, NUMBERS[cos.dtype], cos.data_ptr(), sin.data_ptr(), cos.shape[-1], same


def choose() -> None:
    name = cpu.chosen()
    if name is None:
        raise ValueError(f"the compiled kernels are not there, or turned off by {cpu.VARIABLE}")
    cpu._native.choose(name)


def _count(x: torch.Tensor, columns: int) -> int:
    if x.dtype not in NUMBERS or x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"vectors must be [..., {columns}] of float32, bfloat16 or float16, not {x.dtype} {tuple(x.shape)}")
    count = x.numel() // columns
    if count > MOST_VECTORS:
        raise ValueError(f"{count} vectors at once, {MOST_VECTORS} at most")
    return count


def check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu or dtype not in _KNOWN:
        is_so = f"{x.dtype} {tuple(x.shape)} strides {x.stride()} on {x.device}"
        raise ValueError(f"{name} must be {dtype} {shape}, contiguous, on the CPU; it is {is_so}")
