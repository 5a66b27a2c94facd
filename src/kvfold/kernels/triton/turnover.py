"""A token comes and one goes: what a captured step under a keep policy does beside attention and the policy's own arithmetic.

In torch's operations these are some thirty a layer, each a node of the graph that takes longer to start than to run. Here they
are three kernels: `come` before attention, `leave` and `exchange` after it. `kvfold.eviction` says which token goes, in torch.
"""

import torch
import triton
import triton.language as tl

from kvfold.kernels.triton import current
from kvfold.kernels.triton.tiles import kernel

_MOST_PLACES = 4096  # that a program looks at together
_MOST_BYTES = 4096  # of a token's field that a program moves together
_FIELDS = 4  # that one launch exchanges: codes and scales of K and V
NO_PLACE = tl.constexpr(2**31 - 1)
RECENT = tl.constexpr(3.4028234663852886e38)  # as in kvfold.eviction: above every rank, below what is pinned


@kernel
def come_kernel(
    k,
    v,
    first_score,
    run_k,
    run_v,
    run_slots,
    score,
    place,
    slot,
    row_stride,
    run_width,
    width,
    num_places,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORED: tl.constexpr,
):
    """The token of row r, `k, v [R, 1, D]`, goes to a place of the run. Grid: rows."""
    row = tl.program_id(0)
    at = tl.load(place)
    channel = tl.arange(0, BLOCK_D)
    inside = channel < HEAD_DIM
    to = row.to(tl.int64) * row_stride + at * HEAD_DIM + channel
    tl.store(run_k + to, tl.load(k + row * HEAD_DIM + channel, mask=inside), mask=inside)
    tl.store(run_v + to, tl.load(v + row * HEAD_DIM + channel, mask=inside), mask=inside)
    tl.store(run_slots + row.to(tl.int64) * run_width + at, tl.load(slot).to(tl.int32))
    if SCORED:
        tl.store(score + row.to(tl.int64) * num_places + width + at, tl.load(first_score + row))


@kernel
def leave_kernel(
    rank,
    score,
    held_score,
    table,
    pool_slots,
    run_slots,
    goes,
    first_recent,
    address,
    num_columns,
    run_width,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKED: tl.constexpr,
    SCORED: tl.constexpr,
    LEAVES: tl.constexpr,
    MOVES: tl.constexpr,
):
    """Finds the token of row r that goes, if one goes: its slot becomes -1, or that of the newest token.

    Places are those of the blocks, T a column, and those of the run behind them. Grid: rows.

    Args:
        rank: `[R, N] float32`; the lowest goes, of equals the oldest. Without RANKED the oldest.
        score, held_score: `[R, N] float32`: copied, with SCORED.
        goes, first_recent: `[1] long`; tokens in slots from `first_recent` on go only before pinned ones.
        address: `[R] long`, with MOVES: where in the pool the newest token belongs, or -1 where it is gone itself.
        LEAVES: whether a token may have to go.
        MOVES: whether the newest token, alone in its run, goes on into the blocks: where one left, or to the first free place.
    """
    row = tl.program_id(0).to(tl.int64)
    width = num_columns * TOKENS
    num_places = width + run_width
    best = tl.full((), float("inf"), tl.float32)
    best_slot = tl.full((), NO_PLACE, tl.int32)
    best_place = tl.full((), 0, tl.int32)
    free = tl.full((), NO_PLACE, tl.int32)
    for start in range(0, num_places, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside, in_body = place < num_places, place < width
        block = tl.load(table + row * num_columns + place // TOKENS, mask=in_body, other=-1)
        of_pool = tl.load(pool_slots + block * TOKENS + place % TOKENS, mask=block >= 0, other=-1)
        of_run = tl.load(run_slots + row * run_width + place - width, mask=inside & (place >= width), other=-1)
        slot = tl.where(in_body, of_pool, of_run)
        if SCORED:
            at = row * num_places + place
            tl.store(held_score + at, tl.load(score + at, mask=inside), mask=inside)
        if MOVES:
            free = tl.minimum(free, tl.min(tl.where(in_body & (slot < 0), place, NO_PLACE)))
        if LEAVES:
            compared = tl.zeros([BLOCK], tl.float32)
            if RANKED:
                compared = tl.load(rank + row * num_places + place, mask=inside, other=float("inf"))
                compared = tl.where(slot >= tl.load(first_recent), tl.maximum(compared, RECENT), compared)
            compared = tl.where(slot < 0, float("inf"), compared)
            least = tl.min(compared)
            oldest = tl.min(tl.where(compared == least, slot, NO_PLACE))
            found = tl.min(tl.where((compared == least) & (slot == oldest), place, NO_PLACE))
            better = (least < best) | ((least == best) & (oldest < best_slot))
            best_slot = tl.where(better, oldest, best_slot)
            best_place = tl.where(better, found, best_place)
            best = tl.minimum(best, least)
    target = free
    if LEAVES:
        target = tl.where(tl.load(goes) != 0, best_place, free)
    in_body = target < width
    block = tl.load(table + row * num_columns + target // TOKENS, mask=in_body, other=-1)
    at = block * TOKENS + target % TOKENS
    if MOVES:
        tl.store(pool_slots + at, tl.load(run_slots + row), mask=block >= 0)
        tl.store(run_slots + row, -1)
        tl.store(address + row, tl.where(block >= 0, at, -1))
        if SCORED:
            tl.debug_barrier()  # what other threads have copied
            newest = tl.load(score + row * num_places + width)
            tl.store(held_score + row * num_places + target, newest, mask=block >= 0)
    else:
        tl.store(pool_slots + at, -1, mask=block >= 0)
        tl.store(run_slots + row * run_width + target - width, -1, mask=(target >= width) & (target < num_places))


@kernel
def exchange_kernel(
    held_0,
    new_0,
    bytes_0,
    held_1,
    new_1,
    bytes_1,
    held_2,
    new_2,
    bytes_2,
    held_3,
    new_3,
    bytes_3,
    address,
    BLOCK: tl.constexpr,
):
    """Line `address[r]` of each field changes places with line r of what is new. Grid: rows, fields."""
    row = tl.program_id(0).to(tl.int64)
    field = tl.program_id(1)
    at = tl.load(address + row)
    if field == 0:
        _exchange(held_0, new_0, bytes_0, row, at, BLOCK)
    elif field == 1:
        _exchange(held_1, new_1, bytes_1, row, at, BLOCK)
    elif field == 2:
        _exchange(held_2, new_2, bytes_2, row, at, BLOCK)
    else:
        _exchange(held_3, new_3, bytes_3, row, at, BLOCK)


@triton.jit
def _exchange(held, new, num_bytes, row, at, BLOCK: tl.constexpr):
    byte = tl.arange(0, BLOCK)
    inside = byte < tl.where(at >= 0, num_bytes, 0)
    old = tl.load(held + at * num_bytes + byte, mask=inside)
    fresh = tl.load(new + row * num_bytes + byte, mask=inside)
    tl.store(held + at * num_bytes + byte, fresh, mask=inside)
    tl.store(new + row * num_bytes + byte, old, mask=inside)


def come(
    k: torch.Tensor,
    v: torch.Tensor,
    place: torch.Tensor,
    slot: torch.Tensor,
    run: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    score: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Puts a token of each row, `k, v [R, 1, D]`, to `place [1] long` of a run, with that `slot [1] long`.

    Args:
        run: keys and values `[R, W, D]`, slots `[R, W] int32`.
        score: `[R, N] float32`, the run's places the last W, and what the token begins with, `[R, 1] float32`.
    """
    run_k, run_v, run_slots = run
    rows, run_width, head_dim = run_k.shape
    held, first = score or (None, None)
    num_places = 0 if held is None else held.shape[1]
    with current(k.device):
        come_kernel[(rows,)](
            k.contiguous(),
            v.contiguous(),
            first,
            run_k,
            run_v,
            run_slots,
            held,
            place,
            slot,
            run_k.stride(0),
            run_width,
            num_places - run_width,
            num_places,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            SCORED=held is not None,
        )


def leave(
    table: torch.Tensor,
    pool_slots: torch.Tensor,
    run_slots: torch.Tensor,
    goes: torch.Tensor | None = None,
    rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    score: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    moves: bool = False,
) -> torch.Tensor | None:
    """Lets a token of each row go, and the newest one into the place that it leaves.

    Args:
        table: `[R, C] long`, the blocks whose places come first.
        pool_slots: `[P, T] int32`.
        run_slots: `[R, W] int32`, of the places behind them; -1 where there is no token, here as there.
        goes: `[1] long`, 0 where none has to; None where none ever has to.
        rank: `[R, N] float32`, of which the lowest goes, of equals the oldest; and `[1] long`, the slot from which on tokens go
            only before what ranks as infinite. None: the oldest.
        score: `[R, N] float32` twice: becomes the second one, the newest token's at its new place.
        moves: whether the newest token, alone in its run, goes into the blocks: where one left, or to the first free place.

    Returns:
        With `moves`, `[R] long`: where in the pool the newest token belongs (block * T + place), or -1 where it is gone itself.
    """
    rows, num_columns = table.shape
    run_width, tokens = run_slots.shape[1], pool_slots.shape[1] if num_columns else 1
    num_places = num_columns * tokens + run_width
    ranks, first_recent = rank or (None, None)
    held, fresh = score or (None, None)
    address = torch.empty(rows, dtype=torch.long, device=table.device) if moves else None
    block = min(_MOST_PLACES, triton.next_power_of_2(num_places))
    with current(table.device):
        leave_kernel[(rows,)](
            ranks,
            fresh,
            held,
            table.contiguous(),
            pool_slots,
            run_slots,
            goes,
            first_recent,
            address,
            num_columns,
            run_width,
            TOKENS=tokens,
            BLOCK=block,
            RANKED=ranks is not None,
            SCORED=held is not None,
            LEAVES=goes is not None,
            MOVES=moves,
            num_warps=4 if block <= 1024 else 8,
        )
    return address


def exchange(fields: list[tuple[torch.Tensor, torch.Tensor]], address: torch.Tensor) -> None:
    """Line `address[r]` of each field `[n, *]` changes places with line r of what is new, `[R, *]`; -1: nothing happens."""
    for first in range(0, len(fields), _FIELDS):
        given: list[torch.Tensor | int] = []
        some = fields[first : first + _FIELDS]
        for held, new in some:
            num_bytes = new[0].numel() * new.element_size()
            if num_bytes > _MOST_BYTES:
                raise ValueError(f"a token's field of {num_bytes} bytes, {_MOST_BYTES} at most")
            given += [held.view(torch.uint8), new.view(torch.uint8), num_bytes]
        given += given[:3] * (_FIELDS - len(some))  # which nobody looks at
        widest = max(x for x in given if isinstance(x, int))
        with current(address.device):
            exchange_kernel[(len(address), len(some))](*given, address, BLOCK=triton.next_power_of_2(widest))
