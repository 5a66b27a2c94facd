"""The compiled module, if there is one, and what its arguments are."""

from typing import Any

import torch

native: Any
try:
    from kvfold.kernels.cpu import _native as native
except ImportError:
    native = None

MAX_HEAD_DIM = 1024

KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    "e4m3": 3,
    "e5m2": 4,
    8: 5,
    4: 6,
    2: 7,
}
TABLE_KINDS = {4: 8, 3: 9, 2: 10, 1: 11, 5: 12, 6: 13}
SCALE_KINDS = {None: 0, "half": 1, "log8": 2}


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def head_dim_within(head_dim: int) -> int:
    """ValueError when it is more than the kernels take."""
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the CPU kernels take head dims up to {MAX_HEAD_DIM}, not {head_dim}")
    return head_dim


def check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """ValueError when a tensor is not what the compiled code will read."""
    if not x.is_cpu or x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        is_so = f"{x.dtype} {tuple(x.shape)} strides {x.stride()} on {x.device}"
        raise ValueError(f"{name} must be {dtype} {shape}, contiguous, on the CPU; it is {is_so}")
