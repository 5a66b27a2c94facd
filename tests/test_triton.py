"""The Triton kernels against the reference, in Triton's interpreter (or on a GPU, where there is one)."""

import functools
import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import kernel_cases
import pytest
import torch
from kernel_cases import OTHERS, blocks_of, query_of

from kvfold.attention import dispatch, reference
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.kernels import triton
from kvfold.plan import Plan
from kvfold.segment import Run, Segment
from kvfold.site import Site
from kvfold.store.affine import Affine
from kvfold.store.base import KVCodec, TensorCodec
from kvfold.store.fp8 import Float8
from kvfold.store.rotation import Rotated
from kvfold.store.table import Table

pytestmark = pytest.mark.skipif(not triton.available(), reason="Triton is not installed: pip install 'kvfold[gpu]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv(triton.VARIABLE, "interpret")


AFFINES = [
    Affine(bits, axis, group, symmetric, scales)
    for bits, axis, (group, symmetric, scales) in itertools.product(
        [8, 4, 2], ["token", "channel"], [(16, False, "half"), (32, True, "log8"), (64, False, "log8"), (128, True, "half")]
    )
]

Case = functools.partial(kernel_cases.Case, device=DEVICE)


def check(segment: Segment, query: Query, *, with_mass: bool = True) -> None:
    """out, lse and mass equal the reference's, to what half precision with sums in float32 may differ."""
    assert triton.supports(segment.codec)
    assert segment.locate(query.q.shape[-1]) is not None or segment.width == 0
    wanted = reference.attend(query, segment.codec, segment.tiles())
    got = dispatch.attend([(segment, query)])
    bfloat = any(getattr(codec, "dtype", None) == torch.bfloat16 for codec in (segment.codec.k, segment.codec.v))
    tolerance = 1.2e-2 if bfloat else 2e-3  # probabilities meet V in its own type
    torch.testing.assert_close(got.lse, wanted.lse, atol=4e-3, rtol=1e-3)
    torch.testing.assert_close(got.out, wanted.out, atol=tolerance, rtol=tolerance)
    if with_mass and segment.width:
        received = reference.mass(query, segment.codec, segment.tiles(), wanted.lse)
        mass = dispatch.mass(segment, query, wanted.lse)
        torch.testing.assert_close(mass, received, atol=1e-3, rtol=5e-3)


@pytest.mark.parametrize("codec", [*AFFINES, *OTHERS], ids=str)
def test_every_codec_on_both_sides(codec: TensorCodec) -> None:
    case = Case(length=70)
    check(blocks_of(KVCodec(codec, codec), case), query_of(case))


@pytest.mark.parametrize("codec", [*AFFINES[::3], *OTHERS[1::2]], ids=str)
def test_head_dims_that_are_no_power_of_two(codec: TensorCodec) -> None:
    case = Case(80, length=70)
    check(blocks_of(KVCodec(codec, codec), case), query_of(case), with_mass=False)


@pytest.mark.parametrize(
    "name", ["dense", "int8", "int4", "int2", "fp8", "kivi(int2)", "mixed(k=int8, v=int4)", "int4(rotate=kv)"]
)
@pytest.mark.parametrize("head_dim", [96, 128])
def test_plans_over_head_dims(name: str, head_dim: int) -> None:
    codec = Plan.parse(name).store.codec(Site(head_dim, torch.bfloat16))
    case = Case(head_dim, 65, num_groups=2)
    check(blocks_of(codec, case), query_of(case), with_mass=False)


@pytest.mark.parametrize("length", [0, 1, 64, 65, 260])
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_lengths(name: str, length: int) -> None:
    codec = Plan.parse(name).store.codec(Site(64, torch.float16))
    case = Case(length=length, ragged=length != 260)
    check(blocks_of(codec, case), query_of(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(holes=True),
        Case(softcap=20.0),
        Case(windowed=True, num_queries=3),
        Case(num_groups=1),
        Case(num_groups=9),
        Case(num_groups=3, num_queries=22, windowed=True, holes=True, softcap=5.0, length=80),
    ],
    ids=str,
)
def test_what_queries_see(case: kernel_cases.Case) -> None:
    name = "int8(k_axis=token)" if case.holes or case.num_groups == 1 else "int4"
    check(blocks_of(Plan.parse(name).store.codec(Site(64, torch.float32)), case), query_of(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("counts", "first", "num_queries"), [([5, 1], 4, 1), ([130, 65], 60, 7), ([64, 0], 0, 5)])
def test_runs_are_causal(dtype: torch.dtype, counts: list[int], first: int, num_queries: int) -> None:
    """Queries in the middle of a run's slots, over memory that other heads lie in between."""
    width = max(counts)
    x = torch.randn(2, width, 4, 80).to(DEVICE, dtype)
    place = torch.arange(width)
    slots = torch.where(place < torch.tensor(counts)[:, None], place, -1).int().to(DEVICE)
    run = Run(x[:, :, 1], x[:, :, 3], slots)
    q = (torch.randn(2, 3 * num_queries, 80) * 80**-0.5).to(DEVICE)
    check(run, Query(q, (torch.arange(num_queries) + first).to(DEVICE), 3))


def test_several_segments_in_one_call() -> None:
    """Codes that are rotated, codes that are not and a dense run; one of them with queries of its own."""
    case = Case(length=192)
    query = query_of(case)
    turned = replace(query, q=query.q.flip(1))
    parts: list[tuple[Segment, Query]] = [
        (blocks_of(Plan.parse(name).store.codec(Site(64, torch.float32)), case), asked)
        for name, asked in (("int4", query), ("int8(rotate=kv)", query), ("fp8", turned))
    ]
    k, v = torch.randn(2, 2, 70, 64).to(DEVICE)
    parts.append((Run(k, v, torch.arange(100, 170).int().expand(2, -1).to(DEVICE)), query))
    wanted = reference.merge([reference.attend(asked, part.codec, part.tiles()) for part, asked in parts])
    got = dispatch.attend(parts)
    torch.testing.assert_close(got.out, wanted.out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got.lse, wanted.lse, atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("dense", Case(length=100)),
        ("int4", Case(length=128, softcap=5.0)),
        ("fp8", Case(length=130, holes=True)),
        ("int8(k_axis=token)", Case(80, length=70, holes=True, num_groups=9)),
        ("nf4", Case(length=200, windowed=True, num_groups=1)),
    ],
    ids=str,
)
def test_masses_from_the_scores_that_attention_leaves(name: str, case: kernel_cases.Case, largest: bool) -> None:
    """Of blocks and a run beside each other, in one pass over keys."""
    blocks = blocks_of(Plan.parse(name).store.codec(Site(case.head_dim, torch.float32)), case)
    x = torch.randn(2, 2, 37, case.head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    slots = torch.arange(37).expand(2, -1).clone()
    slots[1, 20:] = -1
    run = Run(*x, slots.int().to(DEVICE))
    query = query_of(case)
    parts: list[Blocks | Run] = [blocks, run]
    scores = dispatch.room_for_scores(parts, query)
    assert scores is not None
    scores.fill_(torch.nan)
    rooms = scores.split([part.width for part in parts], -1)
    looks = [(part, replace(query, scores=room)) for part, room in zip(parts, rooms, strict=True)]
    result = dispatch.attend(looks)
    got = dispatch.received(scores, result.lse, largest=largest)
    each = torch.cat([reference.mass(query, part.codec, part.tiles(), result.lse) for part in parts], -1)
    wanted = each.amax(1) if largest else each.mean(1)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=5e-3)
    absent = torch.cat([blocks.slots(), run.slots], 1) < 0
    assert (got[absent] == 0).all()


def test_what_sees_nothing_is_zero() -> None:
    case = Case(length=64)
    query = replace(query_of(case), first_visible=torch.full((2, 1), 999, device=DEVICE))
    segment = blocks_of(Plan.parse("int8").store.codec(Site(64, torch.float32)), case)
    got = dispatch.attend([(segment, query)])
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()
    assert (dispatch.mass(segment, query, got.lse) == 0).all()


def test_large_scores_do_not_overflow() -> None:
    case = Case(length=128)
    query = query_of(case)
    segment = blocks_of(Plan.parse("int8").store.codec(Site(64, torch.float32)), case)
    got = dispatch.attend([(segment, replace(query, q=query.q * 1e3))])
    assert got.out.isfinite().all()
    assert got.lse.isfinite().all()


# -- codes that name levels ---------------------------------------------------------------------------------------------------


def test_floats_by_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices that have no instruction for e4m3: all codes, subnormal ones as well."""
    monkeypatch.setattr(triton, "capability", lambda device: (8, 0))
    case = Case(length=130)
    codec = Float8("e4m3", True)
    segment = blocks_of(KVCodec(codec, codec), case)
    for name in ("k.codes", "v.codes"):
        x = segment.pool.fields[name]
        codes = torch.arange(x.numel(), device=x.device).to(torch.uint8).view_as(x)
        x.copy_(torch.where((codes & 0x7F) == 0x7F, 0, codes))  # all but NaN
        segment.pool.fields[name.replace("codes", "scale")].fill_(2.0**-6)
    place = segment.locate(case.head_dim)
    assert place is not None
    assert place.descriptor.k_side.by_bits
    check(segment, query_of(case))


@pytest.mark.parametrize("num_levels", [16, 4])
def test_table_coded_segments(num_levels: int) -> None:
    levels = torch.linspace(-1, 1, num_levels).mul(1.3).sinh().tolist()
    token = Table(tuple(levels))
    channel = Table(tuple(levels), "channel", offset=True, scales="log8")
    case = Case(length=128, ragged=False)
    check(blocks_of(KVCodec(channel, token), case), query_of(case))


# -- which kernel ------------------------------------------------------------------------------------------------------------


def test_the_kernel_is_chosen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "triton" if DEVICE == "cuda" else "triton-interpreted"
    assert dispatch.kernel_name(device=DEVICE) == name
    rotated = Rotated(Affine(4), 64)
    assert dispatch.kernel_name(KVCodec(rotated, rotated), DEVICE) == name
    monkeypatch.setenv(triton.VARIABLE, "off")
    assert dispatch.kernel_name(device="cuda") == "torch-reference"
    monkeypatch.setenv(triton.VARIABLE, "fast")
    with pytest.raises(triton.TritonError, match="fast"):
        dispatch.kernel_name(device="cuda")


def test_what_it_does_not_know_runs_on_the_reference() -> None:
    both = KVCodec(Affine(8, "channel"), Affine(4, "channel"))  # two orders of tokens
    assert not triton.supports(both)
    assert dispatch.kernel_name(both, DEVICE) == "torch-reference"
    case = Case(length=64)
    assert dispatch.attend([(blocks_of(both, case), query_of(case))]).out.isfinite().all()
    rotated = KVCodec(Rotated(Affine(4), 256), Rotated(Affine(4), 256))
    assert not triton.encodes(rotated.k, 64, 64, 256)  # the rotation and a block exceed the shared memory of a multiprocessor
    small = Case(head_dim=8, length=64)
    assert blocks_of(KVCodec(Float8("e4m3", True), Float8("e4m3", True)), small).locate(8) is None


def test_nothing_of_triton_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, kvfold.kernels.triton, kvfold.layer_cache; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("name", ["k.codes", "k.scale", "k.base", "k.zero", "v.codes", "v.scale", "table"])
def test_wrong_blocks_are_refused(name: str) -> None:
    blocks = blocks_of(Plan.parse("int8").store.codec(Site(64, torch.float32)), Case(length=128))
    fields, table = dict(blocks.pool.fields), blocks.pool.table
    if name == "table":
        table = table.int()
    else:
        fields[name] = fields[name].float()
    with pytest.raises(ValueError, match="must be"):
        triton.describe_blocks(blocks.codec, fields, table, None, 64)


# -- encoding ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", AFFINES, ids=str)
def test_encoding_is_the_codecs_own(codec: Affine) -> None:
    """Equal bytes but for log8 scales at the edge between two of the grid; those are one step apart, and decode as well."""
    x = torch.randn(3, codec.block, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x[..., 5] *= 30
    x[0, :, 7] = 0.25
    rotated = codec.group != 32
    side: TensorCodec = Rotated(codec, 64) if rotated else codec
    assert triton.encodes(side, codec.block, codec.block, 64)
    wanted = side.encode(x)
    got = triton.encode(side, x)
    assert got.keys() == wanted.keys()
    for name, y in wanted.items():
        assert got[name].shape == y.shape, name
        assert got[name].dtype == y.dtype, name
        same = (got[name] == y).float().mean()
        assert same > (0.99 if rotated or codec.scales == "log8" else 0.9999), f"{name}: {same:.4f} equal"
    error = (side.decode(got) - x).abs().mean()
    assert error <= 1.01 * (side.decode(wanted) - x).abs().mean()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_of_8_bits_are_the_codecs_own(format: Literal["e4m3", "e5m2"], scaled: bool, dtype: torch.dtype) -> None:
    """Numbers of all sizes, ties between two floats among them."""
    codec = Float8(format, scaled)
    x = torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(3))
    x = (x * torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(4)).mul(8).exp2()).to(dtype)
    x[0] = torch.arange(7 * 80).view(7, 80) * 2.0**-10
    x[1, 0], x[1, 1] = 0.0, x[1, 1].abs().amax()
    x = x.to(DEVICE)
    assert triton.encodes(codec, 64, 7, 80)
    got, wanted = triton.encode(codec, x), codec.encode(x)
    assert got.keys() == wanted.keys()
    for name, y in wanted.items():
        assert torch.equal(got[name], y), name


def test_blocks_are_encoded_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affine, "encode", None)
    assert blocks_of(Plan.parse("int4").store.codec(Site(64, torch.float32)), Case(length=128)).width == 128
