"""Starting the kernels: grids, splits, and the arguments that a segment stands for."""

from collections.abc import Sequence
from typing import Any

import torch

from kvfold.kernels.triton import Descriptor, Look, tuning
from kvfold.kernels.triton.attention import attend_kernel, mass_kernel, merge_kernel, received_kernel
from kvfold.kernels.triton.tuning import Config, choose, num_processors
from kvfold.store.base import TensorCodec, part
from kvfold.store.rotation import Rotated

_FEW_QUERIES = 16
_BLOCK_M = 64
_BLOCK_S = 16  # splits that the merge takes at once
_BLOCK_N = 512  # tokens a program that adds up what they received


def attend(
    looks: Sequence[Look],
    slots: torch.Tensor,
    num_groups: int,
    softcap: float | None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvfold.kernels.triton.attend`; `config` takes the place of what was tuned, for all segments."""
    q = looks[0].q
    num_rows, num_vectors, head_dim = q.shape
    block_m = _block_m(num_vectors, head_dim, q.device)
    tiles = -(-num_vectors // block_m)
    # Segments whose outputs must be turned back (a rotation of V) come last, so that their splits lie together.
    ordered = sorted(looks, key=lambda look: _turned(look.segment.codec.v))
    plans = []
    for look in ordered:
        used = config or choose(look.segment, head_dim, block_m, q.device)
        plans.append((look, used, _num_splits(look.segment.num_blocks, num_rows * tiles, used, q.device)))
    num_splits = sum(splits for _, _, splits in plans)
    partial_out = torch.empty(num_splits, num_rows, num_vectors, head_dim, device=q.device)
    partial_lse = torch.empty(num_splits, num_rows, num_vectors, device=q.device)
    first = 0
    num_plain = 0
    for look, used, splits in plans:
        arguments, constants = _arguments(look, slots, num_groups, softcap, block_m)
        arguments |= {
            "partial_out": partial_out,
            "partial_lse": partial_lse,
            "num_vectors": num_vectors,
            "num_rows": num_rows,
            "first_split": first,
            "blocks_per_split": -(-look.segment.num_blocks // splits),
            **_side_arguments("v", look.segment),
            **_kept(look),
            **constants,
        }
        grid = tiles, num_rows, splits

        def run(config: Config, grid: tuple[int, ...] = grid, arguments: dict[str, Any] = arguments) -> None:
            attend_kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages)

        tuning.launch(look.segment, head_dim, block_m, used, run)
        first += splits
        if not _turned(look.segment.codec.v):
            num_plain = first
    return _merge(partial_out, partial_lse, num_plain, ordered[-1].segment.codec.v)


def _merge(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, num_plain: int, last: TensorCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """All splits joined; those from `num_plain` on are turned back as `last` says."""
    num_splits, num_rows, num_vectors, head_dim = partial_out.shape
    out, lse = torch.empty_like(partial_out[0]), torch.empty_like(partial_lse[0])
    turned = torch.empty_like(out) if num_plain < num_splits else None
    for target, first, count in ((out, 0, num_plain), (turned, num_plain, num_splits - num_plain)):
        if target is not None:
            merge_kernel[(num_rows * num_vectors,)](
                partial_out,
                partial_lse,
                target,
                lse,
                first,
                count,
                num_splits,
                num_rows * num_vectors,
                HEAD_DIM=head_dim,
                BLOCK_D=1 << (head_dim - 1).bit_length(),
                BLOCK_S=_BLOCK_S,
            )
    if turned is None:
        return out, lse
    return out.add_(last.unfold_output(turned)), lse


def mass(
    look: Look, slots: torch.Tensor, num_groups: int, softcap: float | None, lse: torch.Tensor, width: int
) -> torch.Tensor:
    """See `kvfold.kernels.triton.mass`."""
    num_rows, num_vectors, head_dim = look.q.shape
    block_m = _block_m(num_vectors // num_groups, head_dim, look.q.device)
    used = choose(look.segment, head_dim, block_m, look.q.device)
    received = torch.zeros(num_rows, num_groups, width, device=look.q.device)
    arguments, constants = _arguments(look, slots, num_groups, softcap, block_m)
    mass_kernel[(look.segment.num_blocks, num_rows)](
        lse=lse.contiguous(),
        received=received,
        num_groups=num_groups,
        width=width,
        **arguments,
        **constants,
        num_warps=used.num_warps,
    )
    return received


def received(scores: torch.Tensor, lse: torch.Tensor, largest: bool) -> torch.Tensor:
    """See `kvfold.kernels.triton.received`."""
    num_rows, num_vectors, width = scores.shape
    gained = torch.empty(num_rows, width, device=scores.device)
    grid = -(-width // _BLOCK_N), num_rows
    received_kernel[grid](scores, lse.contiguous(), gained, num_vectors, width, LARGEST=largest, BLOCK_N=_BLOCK_N)
    return gained


def _turned(codec: TensorCodec) -> bool:
    return isinstance(codec, Rotated)


def _block_m(num_vectors: int, head_dim: int, device: torch.device) -> int:
    """Query rows a program: 8 or 16 when they are few, and half of many where wide heads meet little shared memory."""
    if num_vectors <= _FEW_QUERIES:
        return max(8, 1 << (num_vectors - 1).bit_length())
    return _BLOCK_M // 2 if head_dim > 128 and tuning.shared_memory(device) < 128 * 1024 else _BLOCK_M


def _num_splits(num_blocks: int, num_programs: int, config: Config, device: torch.device) -> int:
    """As many as keep every multiprocessor busy, but none of fewer blocks than the configuration says."""
    wanted = -(-num_processors(device) * config.programs_per_processor // num_programs)
    most = max(1, num_blocks // config.least_blocks)
    splits = max(1, min(wanted, most))
    return -(-num_blocks // -(-num_blocks // splits))  # without empty ones


def _arguments(
    look: Look, slots: torch.Tensor, num_groups: int, softcap: float | None, block_m: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all kernels are told of queries and K: values, and compile-time constants."""
    segment = look.segment
    contiguous = look.spans is not None or len(look.lengths) > 0
    uniform = look.spans is None and len(set(look.lengths)) == 1 and len(set(look.starts)) == 1
    starts, lengths = look.spans or (None, None)
    if look.spans is None and contiguous and not uniform:
        starts, lengths = segment.spans(look.starts, look.lengths, look.q.device)
    if uniform:
        start, length = look.starts[0], look.lengths[0]
    else:
        start, length = 0, segment.slots.shape[1] if segment.slots is not None and segment.table is None else 0
    arguments = {
        "q": segment.codec.k.fold_query(look.q),
        "table": segment.table,
        "slots": segment.slots,
        "starts": starts,
        "lengths": lengths,
        "query_slots": slots,
        "first_visible": look.first_visible,
        "uniform_start": start,
        "uniform_length": length,
        "num_blocks": segment.num_blocks,
        "num_queries": len(slots),
        "softcap": softcap or 0.0,
        **_side_arguments("k", segment),
    }
    constants = {
        "K": segment.k_side,
        "V": segment.v_side,
        "HEAD_DIM": look.q.shape[-1],
        "TOKENS": segment.tokens,
        "BLOCK_M": block_m,
        "PAGED": segment.table is not None,
        "CONTIGUOUS": contiguous,
        "UNIFORM": uniform,
        "WINDOWED": look.first_visible is not None,
        "SOFTCAP": softcap is not None,
        "FLIPPED": block_m <= _FEW_QUERIES,
    }
    return arguments, constants


def _kept(look: Look) -> dict[str, Any]:
    """Where scores are left, if they are."""
    kept = look.scores
    if kept is None:
        return {"kept": None, "kept_row_stride": 0, "kept_vector_stride": 0, "kept_width": 0, "KEEPS": False}
    before_last = (look.segment.num_blocks - 1) * look.segment.tokens
    if look.spans is not None or any(length <= before_last for length in look.lengths):  # not all blocks are read
        kept.fill_(-torch.inf)
    row, vector, _ = kept.stride()
    return {"kept": kept, "kept_row_stride": row, "kept_vector_stride": vector, "kept_width": kept.shape[2], "KEEPS": True}


def _side_arguments(name: str, segment: Descriptor) -> dict[str, Any]:
    fields = part(name, segment.fields)
    codes = fields.get("codes", fields.get("x"))
    assert codes is not None
    row_stride, line_stride = codes.stride()[:2]  # of a run; blocks are found by their place
    return {
        f"{name}_codes": codes,
        f"{name}_scale": fields.get("scale"),
        f"{name}_zero": fields.get("zero"),
        f"{name}_base": fields.get("base"),
        f"{name}_levels": segment.levels[name == "v"],
        f"{name}_row_stride": row_stride,
        f"{name}_line_stride": line_stride,
    }
