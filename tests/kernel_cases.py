"""What tests of the kernels attend to: codecs, blocks of two ragged rows, and queries at them."""

import itertools
from dataclasses import dataclass, replace

import torch

from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.segment import Run
from kvfold.store.affine import Affine
from kvfold.store.base import KVCodec, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fitted import Fitted
from kvfold.store.fp8 import Float8
from kvfold.store.outliers import Outliers
from kvfold.store.residual import Residual
from kvfold.store.rotation import Rotated
from kvfold.store.table import Table

AFFINES = [
    Affine(bits, axis, group, symmetric, scales)
    for bits, axis, group, symmetric, scales in itertools.product(
        [8, 4, 2], ["token", "channel"], [16, 32, 64, 128], [False, True], ["half", "log8"]
    )
]
OTHERS: list[TensorCodec] = [
    *(DenseCodec(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(Float8(form, scaled) for form in ("e4m3", "e5m2") for scaled in (True, False)),
]
HEAD_DIMS = [64, 80, 96, 128, 256]
LENGTHS = [0, 1, 63, 64, 65, 1000]


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
    ragged: bool = True
    device: str = "cpu"


def blocks_of(codec: KVCodec, case: Case) -> Blocks:
    generator = torch.Generator().manual_seed(case.length + case.head_dim)
    lengths = [case.length, case.length // 2 if case.ragged else case.length]
    if codec.unit == "block":
        lengths = [-(-n // codec.block) * codec.block for n in lengths]
    device = torch.device(case.device)
    blocks = Blocks(codec, 2, device, contiguous=not case.holes, scored=False)
    k, v = torch.randn(2, 2, max(lengths), case.head_dim, generator=generator)
    k[..., 3] += 5  # a channel that is large in every token
    place = torch.arange(max(lengths))
    slots = torch.where(place < torch.tensor(lengths)[:, None], place + 4, -1).int()
    blocks.append(Run(k.to(device), v.to(device), slots.to(device)))
    if case.holes and blocks.width:
        blocks.drop((torch.rand(2, blocks.width, generator=generator) < 0.4).to(device))
    return blocks


def query_of(case: Case) -> Query:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(2, case.num_groups * case.num_queries, case.head_dim, generator=generator)
    slots = torch.arange(case.num_queries, device=case.device) + case.length + 4
    first = (slots - case.length // 2).expand(2, -1).contiguous() if case.windowed else None
    return Query((q * case.head_dim**-0.5).to(case.device), slots, case.num_groups, first, case.softcap)


def paired(k: TensorCodec, v: TensorCodec, case: Case, rotate: str) -> tuple[KVCodec, Case]:
    """A codec of two that differ, rotated where `rotate` names the side, with whole blocks of tokens where one needs them."""
    if k.unit != v.unit:
        case = replace(case, length=-(-case.length // 128) * 128)
    k, v = (Rotated(c, case.head_dim) if side in rotate else c for side, c in (("k", k), ("v", v)))
    return KVCodec(k, v), case


def fits(codec: TensorCodec, head_dim: int) -> bool:
    """Whether lines of the head dim fill whole bytes."""
    while isinstance(codec, (Outliers, Residual)):
        codec = codec.inner if isinstance(codec, Outliers) else codec.first
    return not isinstance(codec, (Affine, Table, Fitted)) or head_dim % (8 if codec.bits == 3 else 8 // codec.bits) == 0
