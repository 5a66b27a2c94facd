"""What tests of the kernels attend to: blocks of two ragged rows, and queries at them."""

from dataclasses import dataclass, replace

import torch

from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.segment import Run
from kvfold.store.base import KVCodec, TensorCodec
from kvfold.store.rotation import Rotated


@dataclass(frozen=True)
class Case:
    """Two ragged rows, whose second is shorter, seen by `num_groups` heads of `num_queries` queries."""

    head_dim: int = 64
    length: int = 130
    num_groups: int = 3
    num_queries: int = 1
    holes: bool = False
    softcap: float | None = None
    windowed: bool = False


def blocks_of(codec: KVCodec, case: Case) -> Blocks:
    generator = torch.Generator().manual_seed(case.length + case.head_dim)
    lengths = [case.length, case.length // 2]
    if codec.unit == "block":
        lengths = [-(-n // codec.block) * codec.block for n in lengths]
    blocks = Blocks(codec, 2, torch.device("cpu"), contiguous=not case.holes, scored=False)
    k, v = torch.randn(2, 2, max(lengths), case.head_dim, generator=generator)
    k[..., 3] += 5  # a channel that is large in every token
    place = torch.arange(max(lengths))
    slots = torch.where(place < torch.tensor(lengths)[:, None], place + 4, -1).int()
    blocks.append(Run(k, v, slots))
    if case.holes and blocks.width:
        blocks.drop(torch.rand(2, blocks.width, generator=generator) < 0.4)
    return blocks


def query_of(case: Case) -> Query:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(2, case.num_groups * case.num_queries, case.head_dim, generator=generator)
    slots = torch.arange(case.num_queries) + case.length + 4
    first = (slots - case.length // 2).expand(2, -1).contiguous() if case.windowed else None
    return Query(q * case.head_dim**-0.5, slots, case.num_groups, first, case.softcap)


def paired(k: TensorCodec, v: TensorCodec, case: Case, rotate: str) -> tuple[KVCodec, Case]:
    """A codec of two that differ, rotated where `rotate` names the side, with whole blocks of tokens where one needs them."""
    if k.unit != v.unit:
        case = replace(case, length=-(-case.length // 128) * 128)
    k, v = (Rotated(c, case.head_dim) if side in rotate else c for side, c in (("k", k), ("v", v)))
    return KVCodec(k, v), case
