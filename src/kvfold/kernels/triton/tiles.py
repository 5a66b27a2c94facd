"""What the kernels do with a tile of queries and a block of tokens: products, and which of them a query sees."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from kvfold.kernels.triton.layout import INTERPRETED, code_of_column, numbers

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_tile(K: tl.constexpr, q, row, vector, num_vectors, HEAD_DIM: tl.constexpr):
    """`[M, D']` queries in float32, channels in the order of K's tiles."""
    if K.by_channel:
        channel = tl.arange(0, K.block_lines)
    else:
        channel = code_of_column(K, tl.arange(0, K.block_width * K.per_word))
    at = (row * num_vectors + vector[:, None]).to(tl.int64) * HEAD_DIM + channel[None, :]
    return tl.load(q + at, mask=(vector[:, None] < num_vectors) & (channel[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def token_order(K: tl.constexpr, V: tl.constexpr, TOKENS: tl.constexpr):
    """`[T]`: which token of a block a row of the scores stands for."""
    token = tl.arange(0, TOKENS)
    if K.by_channel:
        token = code_of_column(K, token)
    elif V.by_channel:
        token = code_of_column(V, token)
    return token


@triton.jit
def product(a, b, total, FLIPPED: tl.constexpr):
    """total + a b, or with FLIPPED the same transposed: total + bᵀ aᵀ; all in float32 but for what a and b were rounded to."""
    if FLIPPED:
        left, right = tl.trans(b), tl.trans(a)
    else:
        left, right = a, b
    if INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if left.dtype == tl.float32:
        total = tl.dot(left, right, total, input_precision="tf32x3")
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def score_tile(
    K: tl.constexpr,
    q,
    line,
    raw,
    factor,
    offset,
    levels,
    softcap,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """Scores times log2 e, `[M, T]` (FLIPPED: `[T, M]`), from what `fetch` returned of K."""
    k = numbers(K, line, raw, factor, offset, levels)
    if not K.by_channel:
        k = tl.trans(k)
    scores = tl.zeros([TOKENS, BLOCK_M] if FLIPPED else [BLOCK_M, TOKENS], tl.float32)
    if k.dtype == tl.bfloat16:  # a query is two numbers where K's type would round it too much
        high = q.to(tl.bfloat16)
        scores = product(high, k, scores, FLIPPED)
        scores = product((q - high.to(tl.float32)).to(tl.bfloat16), k, scores, FLIPPED)
    elif k.dtype == tl.float32:
        scores = product(q, k, scores, FLIPPED)
    else:
        scores = product(q.to(tl.float16), k, scores, FLIPPED)
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2_E / softcap))))
    return scores * LOG2_E


@triton.jit
def line_of(SIDE: tl.constexpr, token):
    """The lines of a block that a tile is made of."""
    if SIDE.by_channel:
        line = tl.arange(0, SIDE.block_lines)
    else:
        line = token
    return line


@triton.jit
def place_of(SIDE: tl.constexpr, block, first_line, row_stride, line_stride, PAGED: tl.constexpr):
    """Where a tile starts, and the way from line to line: of a block of a pool, or of row `block` of a run."""
    if PAGED:
        start = block * (SIDE.lines * SIDE.width)
        stride = SIDE.width
    else:
        start = block * row_stride + (first_line + block * 0) * line_stride  # 64 bits wide
        stride = line_stride
    return start, stride


@triton.jit
def visible(
    row,
    block,
    column,
    token,
    query,
    slots,
    starts,
    lengths,
    uniform_start,
    uniform_length,
    query_slots,
    first_visible,
    num_queries,
    TOKENS: tl.constexpr,
    PAGED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIFORM: tl.constexpr,
    WINDOWED: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """Which tokens of a block the queries see. Only a run has tokens as young as the queries.

    `[M, T]`, or FLIPPED `[T, M]`; one column or row where it is the same for all queries.
    """
    ACROSS: tl.constexpr = 1 if FLIPPED else 0
    place = column * TOKENS + token
    if CONTIGUOUS:
        if UNIFORM:
            length = uniform_length
            slot = uniform_start + place
        else:
            length = tl.load(lengths + row)
            slot = tl.load(starts + row) + place
        there = place < length
    elif PAGED:
        slot = tl.load(slots + block * TOKENS + token)
        there = slot >= 0
    else:
        slot = tl.load(slots + row * uniform_length + place, mask=place < uniform_length, other=-1)
        there = slot >= 0
    slot = tl.expand_dims(slot, ACROSS)
    seen = tl.expand_dims(there, ACROSS)
    if not PAGED:
        seen = seen & (slot <= tl.expand_dims(tl.load(query_slots + query), 1 - ACROSS))
    if WINDOWED:
        seen = seen & (slot >= tl.expand_dims(tl.load(first_visible + row * num_queries + query), 1 - ACROSS))
    return seen


# Numbers that change from step to step: a kernel is not compiled again for those that 16 divides, or that are 1.
CHANGING = [
    *("uniform_start", "uniform_length", "num_blocks", "num_vectors", "num_queries", "num_rows", "first_split"),
    *("blocks_per_split", "num_splits", "num_all_splits", "num_groups", "width", "softcap"),
    *("kept_row_stride", "kept_vector_stride", "kept_width", "num_columns", "num_places", "run_width", "row_stride"),
]


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is started from Python."""
    known = [name for name in CHANGING if name in inspect.signature(function).parameters]
    return triton.jit(function, do_not_specialize=known)
