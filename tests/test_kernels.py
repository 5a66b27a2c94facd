"""The compiled kernels against the reference: every codec, layout, shape, instruction set and number of threads."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AFFINES, HEAD_DIMS, LENGTHS, OTHERS, Case, blocks_of, fits, paired, query_of
from rounding import allowance

from kvfold.attention import dispatch, reference
from kvfold.attention.reference import Query
from kvfold.kernels import cpu
from kvfold.percent import Percent
from kvfold.plan import Plan
from kvfold.segment import Run, Segment
from kvfold.site import Site
from kvfold.store import levels
from kvfold.store.affine import Affine
from kvfold.store.bands import Bands
from kvfold.store.base import KVCodec, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fitted import Fitted
from kvfold.store.outliers import Outliers
from kvfold.store.residual import Residual
from kvfold.store.rotation import Rotated
from kvfold.store.subspace import Subspace
from kvfold.store.table import Table

pytestmark = pytest.mark.skipif(not cpu.available(), reason="installed without a compiler")

SETS = list(cpu.available())
TABLES = [
    Table(table, axis, group, offset, scales)
    for table, axis, (group, offset, scales) in itertools.product(
        [levels.nf4(), levels.on_a_sphere(3, 64), (-1.0, -0.1, 0.2, 3.0)],
        ["token", "channel"],
        [(16, True, "log8"), (32, False, "half"), (64, False, "log8"), (64, True, "half"), (128, True, "log8")],
    )
]


REPAIRED: list[TensorCodec] = [
    Outliers(Affine(4, "channel"), Percent(0.1), "channel"),
    Outliers(Affine(2), Percent(0.01), "token"),
    Outliers(Fitted(3, "channel", 32), Percent(0.01), "channel"),
    Outliers(Table(levels.nf4()), Percent(0.1), "token"),
    *(Fitted(bits, axis) for bits, axis in ((2, "token"), (3, "token"), (4, "channel"))),
    Residual(Affine(4, "channel"), Subspace(DenseCodec(torch.float16), 4)),
    Residual(Outliers(Affine(2), Percent(0.05), "token"), Subspace(DenseCodec(torch.float16), 9, 128)),
]


def named(codec: TensorCodec) -> str:
    """Without a table's levels, which take lines."""
    if not isinstance(codec, Table):
        return str(codec)
    return f"table{codec.bits}-{codec.axis}-{codec.group}-{codec.offset}-{codec.scales}"


PLANS = [
    *("dense", "int8", "int4", "int2", "fp8", "kivi(int2)", "mixed(k=int8, v=int4)", "int4(rotate=kv)"),
    *("nf4", "fp4", "turboquant(4)", "turboquant(3)", "turboquant(2)", "mixed(k=int4, v=turboquant(3))"),
    *("kvquant(3)", "gear(int4, rank=4, outliers=1%)", "gear(int2, rank=0)", "gear(turboquant(2), buffer=256)", "banded(2.5)"),
]


def check(
    segment: Segment, query: Query, monkeypatch: pytest.MonkeyPatch, sets: list[str] | None = None, threads: int = 1
) -> None:
    """out, lse and mass of every instruction set equal the reference's, to the order of sums and the rounding of vectors."""
    assert cpu.supports(segment.codec)
    wanted = reference.attend(query, segment.codec, segment.tiles())
    assert not wanted.lse.isnan().any(), "the reference's own lse"
    received = reference.mass(query, segment.codec, segment.tiles(), wanted.lse) if segment.width else None
    torch.set_num_threads(threads)
    for name in sets or SETS:
        monkeypatch.setenv(cpu.VARIABLE, name)
        got = dispatch.attend([(segment, query)])
        where = f"{name}, {threads} threads"
        out, lse = allowance(segment, query)
        torch.testing.assert_close(got.lse, wanted.lse, atol=2e-5 + lse, rtol=1e-5, msg=lambda m, w=where: f"{w}: lse {m}")
        torch.testing.assert_close(got.out, wanted.out, atol=1e-4 + out, rtol=1e-4, msg=lambda m, w=where: f"{w}: out {m}")
        if received is not None:
            mass = dispatch.mass(segment, query, wanted.lse)
            off = 2e-4 + math.expm1(lse)
            torch.testing.assert_close(mass, received, atol=1e-5, rtol=off, msg=lambda m, w=where: f"{w}: mass {m}")


def bands(head_dim: int) -> list[Bands]:
    """All numbers of bits, none among them; bands that are no whole vectors; entries that are mended."""
    many = sorted((i * 5 % 7 for i in range(head_dim)), reverse=True)
    return [
        Bands(tuple(many), 4),
        Bands((6,) * 3 + (5,) * 2 + (1,) * (head_dim - 6) + (0,), 1, exact_zeros=True),
        Bands((4,) * head_dim),
        Bands((0,) * head_dim, 3),
    ]


# -- every codec -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*AFFINES, *TABLES, *OTHERS, *REPAIRED], ids=named)
def test_every_codec_on_both_sides(codec: TensorCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    for head_dim, num_queries in ((64, 1), (128, 1), (80, 1), (64, 5)):
        case = Case(head_dim, num_queries=num_queries)
        check(blocks_of(KVCodec(codec, codec), case), query_of(case), monkeypatch)


@pytest.mark.parametrize("head_dim", [20, *HEAD_DIMS])
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("rotated", [False, True])
def test_bands_of_different_bits(head_dim: int, num_queries: int, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for codec, other in itertools.permutations(bands(head_dim), 2):
        v = Rotated(other, head_dim) if rotated else other
        case = Case(head_dim, 130, num_queries=num_queries, softcap=20.0 if rotated else None)
        check(blocks_of(KVCodec(codec, v), case), query_of(case), monkeypatch)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_outliers_of_long_lines(num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places beyond 256 take two bytes."""
    codec = Outliers(Affine(4), Percent(0.05), "token")
    case = Case(320, 130, num_queries=num_queries)
    segment = blocks_of(KVCodec(codec, codec), case)
    assert segment.pool.fields["k.place"].dtype == torch.int16
    check(segment, query_of(case), monkeypatch)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_groups", [1, 3, 7, 16])
def test_plans_over_shapes(name: str, head_dim: int, num_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Plan.parse(name).store.codec(Site(head_dim, torch.bfloat16))
    for length in LENGTHS if (head_dim, num_groups) in ((64, 3), (96, 7)) else (65,):
        case = Case(head_dim, length, num_groups)
        segment, query = blocks_of(codec, case), query_of(case)
        check(segment, query, monkeypatch)
        check(segment, query, monkeypatch, SETS[:1], threads=2)


@settings(max_examples=80)
@given(
    st.sampled_from([*AFFINES, *TABLES, *OTHERS, *REPAIRED]),
    st.sampled_from([*AFFINES, *TABLES, *OTHERS, *REPAIRED]),
    st.builds(
        Case,
        head_dim=st.sampled_from([16, 20, *HEAD_DIMS]),
        length=st.sampled_from([*LENGTHS, 128, 257]),
        num_groups=st.sampled_from([1, 3, 4, 7]),
        num_queries=st.sampled_from([1, 2, 9, 70]),
        holes=st.booleans(),
        softcap=st.sampled_from([None, 20.0]),
        windowed=st.booleans(),
    ),
    st.sampled_from(["none", "k", "v", "kv"]),
    st.integers(1, 3),
)
def test_any_combination(k: TensorCodec, v: TensorCodec, case: Case, rotate: str, threads: int) -> None:
    if not fits(k, case.head_dim) or not fits(v, case.head_dim):
        return
    codec, case = paired(k, v, case, rotate)
    with pytest.MonkeyPatch.context() as patch:
        check(blocks_of(codec, case), query_of(case), patch, threads=threads)


# -- dense runs --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([20, *HEAD_DIMS]),
    st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 300]), min_size=2, max_size=2),
    st.integers(0, 300),
    st.sampled_from([1, 4, 40, 200]),
    st.booleans(),
)
def test_runs_are_causal(
    dtype: torch.dtype, head_dim: int, counts: list[int], first: int, num_queries: int, strided: bool
) -> None:
    """Queries in the middle of a run's slots, over memory that other heads lie in between."""
    width = max(counts)
    generator = torch.Generator().manual_seed(first)  # of the case alone, so that a failure can be repeated
    x = torch.randn(2, width, 4, head_dim, generator=generator).to(dtype)
    k, v = (x[:, :, 1], x[:, :, 3]) if strided else (x[:, :, 1].contiguous(), x[:, :, 3].contiguous())
    place = torch.arange(width)
    run = Run(k, v, torch.where(place < torch.tensor(counts)[:, None], place, -1).int())
    q = torch.randn(2, 3 * num_queries, head_dim, generator=generator) * head_dim**-0.5
    query = Query(q, torch.arange(num_queries) + first, 3)
    with pytest.MonkeyPatch.context() as patch:
        check(run, query, patch, threads=2)


def test_several_segments_in_one_call() -> None:
    """Codes that are rotated, codes that are not and a dense run; one of them with queries of its own."""
    case = Case(length=192)
    query = query_of(case)
    turned = replace(query, q=query.q.flip(1))
    parts = [
        (blocks_of(Plan.parse(name).store.codec(Site(64, torch.float32)), case), asked)
        for name, asked in (("int4", query), ("int8(rotate=kv)", query), ("fp8", turned))
    ]
    k, v = torch.randn(2, 2, 70, 64)
    run = Run(k, v, torch.arange(150, 220).int().expand(2, -1))
    looks = [*parts, (run, query)]
    wanted = reference.merge([reference.attend(asked, part.codec, part.tiles()) for part, asked in looks])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got = dispatch.attend(looks)
        out, lse = (max(each) for each in zip(*(allowance(part, asked) for part, asked in looks), strict=True))
        torch.testing.assert_close(got.out, wanted.out, atol=1e-4 + out, rtol=1e-4)
        torch.testing.assert_close(got.lse, wanted.lse, atol=2e-5 + lse, rtol=1e-5)


def test_what_sees_nothing_is_zero() -> None:
    case = Case(length=64)
    query = replace(query_of(case), first_visible=torch.full((2, 1), 999))
    got = dispatch.attend([(blocks_of(Plan.parse("int8").store.codec(Site(64, torch.float32)), case), query)])
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()


def test_large_scores_do_not_overflow() -> None:
    case = Case(length=128)
    query = query_of(case)
    check(blocks_of(KVCodec(DenseCodec(torch.float32), DenseCodec(torch.float32)), case), query, pytest.MonkeyPatch())
    huge = replace(query, q=query.q * 1e4)
    got = dispatch.attend([(blocks_of(Plan.parse("int8").store.codec(Site(64, torch.float32)), case), huge)])
    assert got.out.isfinite().all()
    assert got.lse.isfinite().all()


# -- which kernel ------------------------------------------------------------------------------------------------------------


def test_the_kernel_is_chosen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    assert dispatch.kernel_name() == f"cpu-{SETS[0]}"
    for name in SETS:
        monkeypatch.setenv(cpu.VARIABLE, name)
        assert dispatch.kernel_name() == f"cpu-{name}"
    monkeypatch.setenv(cpu.VARIABLE, "off")
    assert dispatch.kernel_name() == "torch-reference"
    assert dispatch.kernel_name(device="cuda") == "torch-reference"
    monkeypatch.setenv(cpu.VARIABLE, "sse9")
    with pytest.raises(cpu.KernelError, match="sse9"):
        dispatch.kernel_name()


def test_an_unknown_codec_runs_on_the_reference() -> None:
    @dataclass(frozen=True)
    class Other(DenseCodec):
        """A codec that the kernels have not heard of."""

    for codec in (DenseCodec(torch.float64), Other(torch.float32)):
        pair = KVCodec(codec, codec)
        assert not cpu.supports(pair)
        assert dispatch.kernel_name(pair) == "torch-reference"
        case = Case(length=64)
        assert dispatch.attend([(blocks_of(pair, case), query_of(case))]).out.isfinite().all()


@pytest.mark.parametrize("name", ["lowrank(50%)", "gear(int4, factors=int8)"])
def test_plans_that_the_kernels_do_not_read(name: str) -> None:
    codec = Plan.parse(name).store.codec(Site(64, torch.bfloat16))
    assert not cpu.supports(codec)
    assert dispatch.kernel_name(codec) == "torch-reference"


def test_a_forked_process_attends_too() -> None:
    code = """
import os, torch
torch.set_num_threads(2)
from kvfold.attention.dispatch import attend
from kvfold.attention.reference import Query
from kvfold.segment import Run
run = Run(*torch.randn(2, 8, 4096, 64), torch.arange(4096).int().expand(8, -1))
few, many = (Query(torch.randn(8, 3 * n, 64), 4096 + torch.arange(n), 3) for n in (1, 8))  # kvfold's threads, and torch's
before = [attend([(run, query)]).out for query in (few, many)]
child = os.fork()
if not child:
    os._exit(int(not all(torch.equal(out, attend([(run, query)]).out) for out, query in zip(before, (few, many)))))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))
