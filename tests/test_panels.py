"""Many queries on the CPU (a chunk of a prompt): products in bfloat16 for models of that type, in float32 for all others."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AFFINES, HEAD_DIMS, LENGTHS, OTHERS, Case, blocks_of, fits, paired, query_of
from tiny import tiny_model

import kvfold
from kvfold.attention import dispatch, reference
from kvfold.attention.reference import Query
from kvfold.kernels import cpu
from kvfold.segment import Run, Segment
from kvfold.store.base import KVCodec, TensorCodec, part
from kvfold.store.rotation import Rotated

ROUNDING = 2**-8
"""The most that a number changes when it becomes bfloat16, as a share of itself."""

pytestmark = pytest.mark.skipif("avx512_bf16" not in cpu.available(), reason="no kernels here that multiply bfloat16")


def allowance(segment: Segment, query: Query) -> tuple[float, float]:
    """What `out` and `lse` may differ by: six standard deviations of the rounding of a score's two factors; for the output what
    that implies, and at most the rounding of p and of v."""
    k, v = held(segment)
    q = query.q @ segment.codec.k._matrix(query.q) if isinstance(segment.codec.k, Rotated) else query.q
    largest = (q.flatten(0, 1).square() @ k.square().T).sqrt().max().item()
    score = 6 * math.sqrt(2 / 3) * ROUNDING * largest + 2e-4
    turned = math.sqrt(v.shape[-1]) if isinstance(segment.codec.v, Rotated) else 1.0
    return (math.expm1(2 * score) + 2.1 * ROUNDING) * v.abs().max().item() * turned, score


def held(segment: Segment) -> tuple[torch.Tensor, ...]:
    """K and V of all tokens, `[N, D]` twice, as they meet vectors: before a rotation is undone."""
    sides = []
    for name, codec in (("k", segment.codec.k), ("v", segment.codec.v)):
        inner = codec.inner if isinstance(codec, Rotated) else codec
        tiles = [(inner.decode(part(name, tile.fields)), tile.slots >= 0) for tile in segment.tiles()]
        sides.append(torch.cat([x.reshape(*real.shape, -1)[real] for x, real in tiles]))
    return tuple(sides)


def check(segment: Segment, query: Query) -> None:
    wanted = reference.attend(query, segment.codec, segment.tiles())
    got = dispatch.attend([(segment, replace(query, dtype=torch.bfloat16))])
    out, lse = allowance(segment, query) if bool(got.lse.isfinite().any()) else (0.0, 0.0)
    torch.testing.assert_close(got.lse, wanted.lse, atol=lse, rtol=1e-5)
    torch.testing.assert_close(got.out, wanted.out, atol=out, rtol=0)


@settings(max_examples=60)
@given(
    st.sampled_from([*AFFINES, *OTHERS]),
    st.sampled_from([*AFFINES, *OTHERS]),
    st.builds(
        Case,
        head_dim=st.sampled_from([16, 20, *HEAD_DIMS]),
        length=st.sampled_from([*LENGTHS, 128, 257]),
        num_groups=st.sampled_from([1, 3, 4]),
        num_queries=st.sampled_from([9, 23, 70]),
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
    torch.set_num_threads(threads)
    check(blocks_of(codec, case), query_of(case))


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([20, *HEAD_DIMS]),
    st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 300]), min_size=2, max_size=2),
    st.integers(0, 300),
    st.sampled_from([4, 40, 200]),
    st.booleans(),
)
def test_runs_are_causal(
    dtype: torch.dtype, head_dim: int, counts: list[int], first: int, num_queries: int, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(first)
    width = max(counts)
    x = torch.randn(2, width, 4, head_dim, generator=generator).to(dtype)
    k, v = (x[:, :, 1], x[:, :, 3]) if strided else (x[:, :, 1].contiguous(), x[:, :, 3].contiguous())
    place = torch.arange(width)
    run = Run(k, v, torch.where(place < torch.tensor(counts)[:, None], place, -1).int())
    q = torch.randn(2, 3 * num_queries, head_dim, generator=generator) * head_dim**-0.5
    check(run, Query(q, torch.arange(num_queries) + first, 3))


def test_no_further_off_than_torch() -> None:
    """Against attention in double precision, the error is at most that of torch's own attention in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3 * 200, 64, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, 200, 64, generator=generator).bfloat16()
    run = Run(k, v, torch.arange(200).int().expand(2, -1))
    got = dispatch.attend([(run, Query(q.float() / 8, torch.arange(200), 3, dtype=torch.bfloat16))]).out.bfloat16()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q.view(2, 3, 200, 64), k[:, None], v[:, None], is_causal=True, enable_gqa=True)

    exact = attention(q.double(), k.double(), v.double()).view_as(got)
    theirs, ours = ((x.view_as(exact) - exact).square().mean().sqrt().item() for x in (attention(q, k, v), got))
    assert ours <= 1.02 * theirs


def test_what_sees_nothing_is_zero() -> None:
    query = query_of(Case(length=64, num_queries=20))
    query = replace(query, first_visible=torch.full((2, 20), 999), dtype=torch.bfloat16)
    blocks = blocks_of(KVCodec(AFFINES[0], AFFINES[0]), Case(length=64, num_queries=20))
    got = dispatch.attend([(blocks, query)])
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_models_in_bfloat16_are_rounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of a prompt in either type, with and without instructions for bfloat16."""
    model = tiny_model().to(dtype)
    ids = torch.randint(3, 100, (1, 300), generator=torch.Generator().manual_seed(0))
    logits = []
    for name in ("avx512", "avx512_bf16"):
        monkeypatch.setenv(cpu.VARIABLE, name)
        with torch.no_grad():
            logits.append(model(ids, past_key_values=kvfold.cache(model, "int8")).logits.float())
    assert torch.equal(*logits) == (dtype == torch.float32)
    torch.testing.assert_close(*logits, atol=0.03 * logits[0].abs().max().item(), rtol=0)
