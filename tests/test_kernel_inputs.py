"""What the compiled kernels must refuse: fields, runs and queries of other types, shapes, strides or devices."""

import pytest
import torch
from kernel_cases import Case, blocks_of

from kvfold.kernels import cpu
from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.store.base import KVCodec

pytestmark = pytest.mark.skipif(not cpu.available(), reason="installed without a compiler")


def describe(codec: KVCodec, change: str, value: object) -> None:
    blocks = blocks_of(codec, Case(length=128))
    fields, table = dict(blocks.pool.fields), blocks.pool.table
    if change == "table":
        table = value(table)
    else:
        fields[change] = value(fields[change])
    cpu.describe_blocks(codec, fields, table, None, 64)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("k.codes", lambda x: x.float()),
        ("k.codes", lambda x: x[:, :, :-1]),
        ("k.codes", lambda x: x.mT),
        ("k.scale", lambda x: x[:-1]),
        ("k.scale", lambda x: x[..., None]),
        ("k.base", lambda x: x.float()),
        ("k.zero", lambda x: x.to("meta")),
        ("v.codes", lambda x: x[::2]),
        ("v.scale", lambda x: x.half()),
        ("table", lambda x: x.int()),
        ("table", lambda x: x + 1000),
        ("table", lambda x: x - 5),
    ],
)
def test_wrong_blocks_are_refused(change: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"must be|names blocks|scales"):
        describe(Plan.parse("int8").store.codec(Site(64, torch.float32)), change, value)


@pytest.mark.parametrize(
    ("name", "change", "value"),
    [
        ("turboquant(3)", "k.codes", lambda x: x[..., :-1].contiguous()),
        ("nf4", "k.zero", lambda x: x.float()),
        ("kvquant(3)", "k.rest.levels", lambda x: x[:, :4].contiguous()),
        ("kvquant(3)", "k.value", lambda x: x.float()),
        ("kvquant(3)", "v.place", lambda x: x[:-1]),
        ("kvquant(3)", "v.place", lambda x: x.int()),
        ("gear(int4)", "k.second.basis", lambda x: x.mT),
        ("gear(int4)", "v.second.z.x", lambda x: x[..., :-1].contiguous()),
        ("banded(2.5)", "k.codes", lambda x: x[:, :-1].contiguous()),
        ("banded(2.5)", "k.zero", lambda x: x.to(torch.int8)),
        ("banded(2.5)", "k.place", lambda x: x.int()),
        ("banded(2.5)", "v.scale", lambda x: x.half()),
    ],
)
def test_wrong_fields_of_other_codecs_are_refused(name: str, change: str, value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        describe(Plan.parse(name).store.codec(Site(64, torch.float32)), change, value)


def test_wrong_runs_and_queries_are_refused() -> None:
    k = torch.randn(2, 8, 64)
    slots = torch.arange(8).int().expand(2, -1)
    for bad in (k.double(), k[:, :4], k.bfloat16(), k.to("meta"), k[0]):
        with pytest.raises(ValueError):  # noqa: PT011  (any: the point is that nothing crashes)
            cpu.describe_run(k, bad, slots)
    for bad_slots in (slots.long(), slots[:, :4], slots[:1]):
        with pytest.raises(ValueError, match="slots"):
            cpu.describe_run(k, k, bad_slots)
    with pytest.raises(ValueError, match="head dims"):
        cpu.describe_run(torch.randn(1, 1, 4096), torch.randn(1, 1, 4096), slots[:1, :1])
    segment = cpu.describe_run(k, k, slots)
    q, at = torch.randn(2, 3, 64), torch.tensor([9])
    for look, when in (
        (cpu.Look(segment, q.double(), None, (), ()), at),
        (cpu.Look(segment, q.mT.contiguous().mT, None, (), ()), at),
        (cpu.Look(segment, q[:1], None, (), ()), at),
        (cpu.Look(segment, q[..., :32].contiguous(), None, (), ()), at),
        (cpu.Look(segment, q, torch.zeros(2, 2, dtype=torch.long), (), ()), at),
        (cpu.Look(segment, q, None, (0, 0), (8, 8)), at),
        (cpu.Look(segment, q, None, (), ()), at.int()),
        (cpu.Look(segment, q, None, (), ()), torch.tensor([9, 10])),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            cpu.attend([look], when, 3, None)
    with pytest.raises(ValueError, match="lse"):
        cpu.mass(cpu.Look(segment, q, None, (), ()), at, 3, None, torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="width"):
        cpu.mass(cpu.Look(segment, q, None, (), ()), at, 3, None, torch.zeros(2, 3), 9)
