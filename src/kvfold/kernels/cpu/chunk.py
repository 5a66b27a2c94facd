"""What is between the matrix products of a decoder layer, for many tokens on the CPU, in C++.

The products of a prompt are torch's, which are at the processor's limit; its small operations between them, some twenty a
layer, each read and write all tokens. Each of four here does what lies between two products, on torch's threads, and reads
every number once; inside, numbers are float32.
"""

import torch

from kvfold.kernels import cpu
from kvfold.kernels.cpu.library import address
from kvfold.kernels.cpu.step import ACTIVATIONS, NUMBERS, Norm, check, choose
from kvfold.kernels.cpu.step import norm as make_norm


def normalize(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` of `x [B, Q, H]`, in its type."""
    _check_tokens("x", x, x, norm)
    y = torch.empty_like(x)
    choose()
    size = x.shape[-1]
    cpu._native.normalize_tokens(
        norm.native, NUMBERS[x.dtype], x.data_ptr(), x.numel() // size, size, y.data_ptr(), torch.get_num_threads()
    )
    return y


def place(
    norm: Norm | None, x: torch.Tensor, head_dim: int, positions: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Heads `x [B, Q, heads * D]`, each normed and at its position, as `[B, heads, Q, D]`.

    Args:
        norm: of a head's D channels; without one, or without a weight, they stay as they are.
        positions: cosines and sines, `[1 or B, Q, rotary dim]` of one type, or None, which turns nothing.
    """
    batch, length, size = x.shape
    norm = norm or make_norm(None, 0.0)
    check("x", x, (batch, length, size), x.dtype)
    if size % head_dim or (norm.weight is not None and norm.weight.numel() != head_dim):
        raise ValueError(f"{size} channels make no heads of {head_dim}, or their norm is of another size")
    cos = sin = None
    rotary = 0
    if positions is not None:
        rotary = positions[0].shape[-1]
        cos, sin = (p.expand(batch, length, rotary).contiguous() for p in positions)
        check("cos", cos, (batch, length, rotary), cos.dtype)
        check("sin", sin, (batch, length, rotary), cos.dtype)
        if rotary > head_dim or rotary % 2:
            raise ValueError(f"positions of {rotary} channels for heads of {head_dim}")
    y = x.new_empty(batch, size // head_dim, length, head_dim)
    choose()
    cpu._native.place_heads(
        norm.native,
        size // head_dim,
        head_dim,
        NUMBERS[x.dtype],
        x.data_ptr(),
        batch,
        length,
        NUMBERS[x.dtype if cos is None else cos.dtype],
        address(cos),
        address(sin),
        rotary,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def add(of_x: Norm, hidden: torch.Tensor, x: torch.Tensor, of_sum: Norm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`s = hidden + of_x(x)` and `of_sum(s)`, all `[B, Q, H]`; s itself twice where there is no second norm."""
    for name, norm in (("x", of_x), ("hidden", of_sum)):
        _check_tokens(name, x if name == "x" else hidden, hidden, norm)
    total = torch.empty_like(hidden)
    normed = total if of_sum is None else torch.empty_like(hidden)
    choose()
    size = hidden.shape[-1]
    cpu._native.add_tokens(
        of_x.native,
        (of_sum or of_x).native,
        NUMBERS[hidden.dtype],
        hidden.data_ptr(),
        x.data_ptr(),
        hidden.numel() // size,
        size,
        total.data_ptr(),
        0 if of_sum is None else normed.data_ptr(),
        torch.get_num_threads(),
    )
    return total, normed


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`act(gate) * up`, both `[B, Q, I]`; written over `gate`."""
    _check_tokens("up", up, gate, None)
    _check_tokens("gate", gate, gate, None)
    choose()
    size = gate.shape[-1]
    cpu._native.gate_tokens(
        ACTIVATIONS[activation],
        NUMBERS[gate.dtype],
        gate.data_ptr(),
        up.data_ptr(),
        gate.numel() // size,
        size,
        torch.get_num_threads(),
    )
    return gate


def _check_tokens(name: str, x: torch.Tensor, like: torch.Tensor, norm: Norm | None) -> None:
    check(name, x, tuple(like.shape), like.dtype)
    if norm is not None and norm.weight is not None and norm.weight.numel() != x.shape[-1]:
        raise ValueError(f"a norm of {norm.weight.numel()} channels for {x.shape[-1]}")
