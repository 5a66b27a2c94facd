"""Compiled quantizing and packing against the reference: the same fields, bit for bit."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvfold.attention import dispatch
from kvfold.kernels import cpu
from kvfold.kernels.cpu.encode import encode, encodes
from kvfold.plan import Plan
from kvfold.site import Site
from kvfold.store import levels
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fp8 import Float8
from kvfold.store.rotation import Rotated
from kvfold.store.scales import scale_bounds, scale_grid
from kvfold.store.table import Table

pytestmark = pytest.mark.skipif(not cpu.available(), reason="installed without a compiler")

AFFINES = [
    Affine(bits, axis, group, symmetric, scales)
    for bits, axis, group, symmetric, scales in itertools.product(
        [8, 4, 2], ["token", "channel"], [16, 32, 64, 128], [False, True], ["half", "log8"]
    )
]
TABLES = [
    Table(table, axis, group, offset, scales, fit, refits)
    for table, axis, (group, offset, scales, fit, refits) in itertools.product(
        [levels.nf4(), levels.e2m1(), levels.on_a_sphere(3, 64), (-1.0, -0.1, 0.2, 3.0)],
        ["token", "channel"],
        [
            (16, True, "log8", "largest", 0),
            (32, False, "half", "norm", 1),
            (64, False, "log8", "norm", 0),
            (64, True, "half", "norm", 0),
            (128, True, "log8", "largest", 0),
        ],
    )
]
FLOATS = [Float8(format, scaled) for format, scaled in itertools.product(["e4m3", "e5m2"], [True, False])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(shape: tuple[int, ...], size: float = 1.0, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    x[..., 3] += 5 * size  # a channel that is large in every token
    return x


def check(codec: TensorCodec, x: torch.Tensor) -> None:
    wanted = codec.encode(x)
    with pytest.MonkeyPatch.context() as patch:
        for name in cpu.available():
            patch.setenv(cpu.VARIABLE, name)
            equal(encode(codec, x), wanted, name)


def equal(got: Fields, wanted: Fields, where: str) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype
        assert torch.equal(got[name], x), f"{where}: {name} differs in {int((got[name] != x).sum())} of {x.numel()}"


@pytest.mark.parametrize("codec", [*AFFINES, *TABLES, *FLOATS], ids=str)
def test_fields_are_the_references(codec: Affine | Table | Float8) -> None:
    check(codec, tokens((2, 2, 128, 64)))
    check(codec, tokens((1, 256, 80)).bfloat16())
    check(Rotated(codec, 64), tokens((2, 128, 64)).half())


@settings(max_examples=60)
@given(
    st.sampled_from([*AFFINES, *TABLES]),
    st.sampled_from([16, 20, 64, 96, 256]),
    st.integers(0, 3),
    st.sampled_from([1, 63, 64, 65, 200]),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 1e-7, 1e-3, 1e4, 1e9]),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_shape_and_size(
    codec: Affine | Table,
    head_dim: int,
    rows: int,
    num_tokens: int,
    dtype: torch.dtype,
    size: float,
    threads: int,
    strided: bool,
) -> None:
    """Tiny numbers, and numbers beyond the range of halves; memory that other heads lie in between."""
    if head_dim % (8 if codec.bits == 3 else 8 // codec.bits):
        return
    if codec.axis == "channel":
        num_tokens = -(-num_tokens // 128) * 128
    torch.set_num_threads(threads)
    x = tokens((rows, num_tokens, 2, head_dim), size).to(dtype)
    assume(bool(x.isfinite().all()))  # NaN and infinities have no codes
    x = x[:, :, 1] if strided else x[:, :, 1].contiguous()
    if rows:
        check(codec, x)
    else:
        assert {name: y.shape for name, y in encode(codec, x).items()}.keys() >= {"codes", "scale"}


@pytest.mark.parametrize("codec", FLOATS, ids=str)
def test_every_number_has_its_nearest_float8(codec: Float8) -> None:
    """All halves and bfloat16s: ties, subnormal codes, zeros of both signs, numbers beyond the range."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
        check(codec, torch.where(x.isfinite(), x, 0))
    check(codec, tokens((3, 70, 33)) * torch.logspace(-12, 6, 70)[:, None])
    check(codec, torch.zeros(2, 5, 64))


def test_constant_and_empty_tokens() -> None:
    for codec in (Affine(4, "channel", 64, False, "log8"), Affine(4, "token", 64, True, "log8"), Affine(2, "token", 32)):
        check(codec, torch.zeros(1, 64, 64))
        check(codec, torch.full((1, 64, 64), -7.25))


def test_the_log_grid() -> None:
    """Every step of the grid finds its own code again, and 24 an octave are 24 an octave."""
    grid = scale_grid("channel").double()
    torch.testing.assert_close(grid[:-24] / grid[24:], torch.full((232,), 2.0, dtype=torch.float64), rtol=1e-7, atol=0)
    for axis in ("token", "channel"):
        bounds = scale_bounds(axis, nearest=True)
        codes = torch.bucketize(1 / scale_grid(axis), bounds, right=True)
        assert codes.tolist() == list(range(256))


def test_plans_are_encoded_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Plan.parse("int4").store.codec(Site(64, torch.bfloat16))
    k, v = tokens((3, 2, 64, 64)).bfloat16(), tokens((3, 2, 64, 64), seed=1).bfloat16()
    assert dispatch.encoder_name(codec) == f"cpu-{cpu.chosen()}"
    got = dispatch.encode(codec, k, v)
    equal(got, codec.encode(k, v), "int4")
    monkeypatch.setenv(cpu.VARIABLE, "off")
    assert dispatch.encoder_name(codec) == "torch-reference"
    assert dispatch.encoder_name(codec, "cuda") == "torch-reference"


def test_what_is_not_known_is_left_to_the_reference() -> None:
    class Other(Affine):
        """A codec that the kernels have not heard of."""

    assert not encodes(Other(4))
    assert not encodes(DenseCodec(torch.float32))
    assert not encodes(Rotated(Other(4), 64))


@pytest.mark.parametrize(
    ("codec", "x"),
    [
        (Affine(4), torch.zeros(1, 64, 64, dtype=torch.float64)),
        (Affine(4), torch.zeros(1, 64, 64, dtype=torch.int32)),
        (Affine(4), torch.zeros(1, 64, 64, device="meta")),
        (Affine(4), torch.zeros(64)),
        (Affine(4), torch.zeros(1, 64, 21)),
        (Affine(4, "channel", 64), torch.zeros(1, 63, 64)),
        (Affine(4, "channel", 128), torch.zeros(1, 64, 64)),
        (Affine(8), torch.zeros(1, 1, 4096)),
        (Table(levels.nf4()), torch.zeros(1, 64, 64, dtype=torch.float64)),
        (Table(levels.nf4(), "channel", 128), torch.zeros(1, 64, 64)),
        (Table(levels.on_a_sphere(3, 64), group=16), torch.zeros(1, 64, 20)),
    ],
)
def test_wrong_input_is_refused(codec: Affine | Table, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must be|can't be held"):
        encode(codec, x)


@pytest.mark.skipif(sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""), reason="limits its memory by /proc")
def test_threads_without_memory_raise() -> None:
    """What a worker's allocation throws reaches the caller, and the next call works."""
    code = """
import resource, torch
from pathlib import Path
from kvfold.kernels.cpu.encode import encode
from kvfold.store.affine import Affine
torch.set_num_threads(2)
codec = Affine(4, "channel", 64)
small, large = torch.zeros(4, 64, 64), torch.zeros(4, 2**16, 64)
encode(codec, small)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20,) * 2)
try:
    encode(codec, large)
except MemoryError:
    encode(codec, small)
    raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, env=dict(os.environ), check=False)
    assert done.returncode == 7
