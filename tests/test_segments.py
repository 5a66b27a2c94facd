"""Segments attend as plain attention over what they hold does; runs hold what was put in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import allowance
from segment_cases import CODECS, CPU, HEAD_DIM, check_attention, codec_of, query_of, run_of

from kvfold.attention.reference import Query, merge
from kvfold.blocks import Blocks
from kvfold.segment import Run, join

# -- attention ---------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(CODECS),
    st.sampled_from([16, 64, 80, 96, 128, 256]),
    st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 128, 200]), min_size=2, max_size=2),
    st.integers(0, 70),
    st.booleans(),
    st.sampled_from([None, 5.0]),
)
@settings(max_examples=60)
def test_attention_over_segments_is_attention_over_all(
    plan: str, head_dim: int, counts: list[int], num_dense: int, windowed: bool, softcap: float | None
) -> None:
    codec = codec_of(plan, head_dim)
    if codec.unit == "block":
        counts = [n // codec.block * codec.block for n in counts]
    body = Blocks(codec, 2, CPU, contiguous=True, scored=False)
    body.append(run_of(counts, [4, 9], head_dim))
    ends = [4 + counts[0], 9 + counts[1]]
    sink = run_of([4, 1], [0, 0], head_dim, seed=1)
    recent = run_of([num_dense, num_dense // 2], ends, head_dim, seed=2)
    last = max(ends) + num_dense
    query = query_of(2, 3, [last - 1, last], head_dim, softcap)
    if windowed:
        first = torch.tensor([[last - 40, last - 39], [last - 20, last]])
        query = Query(query.q, query.slots, 3, first, softcap)
    check_attention([part for part in (sink, body, recent) if part.width], query)


@pytest.mark.parametrize("num_tokens", [1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("plan", ["dense", "int4"])
def test_long_segments_are_read_tile_by_tile(plan: str, num_tokens: int) -> None:
    codec = codec_of(plan)
    if codec.unit == "block":
        num_tokens = -(-num_tokens // codec.block) * codec.block
    body = Blocks(codec, 2, CPU, contiguous=True, scored=False)
    body.append(run_of([num_tokens] * 2, [0, 0]))
    run = run_of([num_tokens] * 2, [0, 0])
    query = query_of(2, 2, [num_tokens, num_tokens + 1])
    check_attention([body], query)
    check_attention([run], query)
    lse = body.attend(query).lse
    mass = body.mass(query, lse)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 2.0), atol=1e-4, rtol=0)


def test_queries_of_a_chunk_see_nothing_younger() -> None:
    chunk = run_of([6, 4], [10, 10])
    query = query_of(2, 2, list(range(10, 16)))
    check_attention([run_of([10, 10], [0, 0], seed=3), chunk], query)
    check_attention([chunk], query)


def test_what_sees_nothing_is_zero() -> None:
    query = query_of(2, 2, [3])
    partial = run_of([2, 2], [5, 5]).attend(Query(query.q, torch.tensor([3, 4]).repeat(1)[:1], 2, torch.tensor([[9], [9]])))
    assert (partial.out == 0).all()
    assert (partial.lse == -torch.inf).all()
    both = merge([partial, partial])
    assert (both.out == 0).all()
    assert not both.lse.isnan().any()


@pytest.mark.parametrize("plan", CODECS)
def test_mass_is_the_softmax(plan: str) -> None:
    """Over two segments: each token's share of the whole, summed over queries, per query head."""
    codec = codec_of(plan)
    body = Blocks(codec, 2, CPU, contiguous=False, scored=True)
    body.append(run_of([128, 64], [0, 0], scored=True))
    recent = run_of([5, 9], [128, 64], seed=4)
    query = query_of(2, 3, [140, 141])
    lse = merge([body.attend(query), recent.attend(query)]).lse
    got = torch.cat([body.mass(query, lse), recent.mass(query, lse)], -1)
    dense = [body.dense(), recent.dense()]
    k, slots = torch.cat([d[0] for d in dense], 1), torch.cat([d[2] for d in dense], 1)
    scores = (query.q.double() @ k.double().mT).masked_fill((slots < 0)[:, None], -torch.inf)
    expected = scores.softmax(-1).unflatten(1, (3, 2)).sum(2).float()
    of_score = allowance(body, query)[1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4 + math.expm1(2 * of_score))


# -- runs --------------------------------------------------------------------------------------------------------------------


def _rows_of(run: Run) -> list[dict[int, tuple[float, float]]]:
    """For each row: slot to the first numbers of its key and value."""
    return [
        {slot: (run.k[r, i, 0].item(), run.v[r, i, 0].item()) for i, slot in enumerate(row) if slot >= 0}
        for r, row in enumerate(run.slots.tolist())
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data())
def test_a_run_that_is_split_and_joined_is_the_same(counts: list[int], data: st.DataObject) -> None:
    run = run_of(counts, [0] * len(counts), scored=True)
    at = [data.draw(st.integers(0, 10)) for _ in counts]
    first, second = run.split(torch.tensor(at))
    assert first.counts().tolist() == [min(a, n) for a, n in zip(at, counts, strict=True)]
    again = join(first, second)
    assert _rows_of(again) == _rows_of(run)
    assert again.counts().tolist() == counts
    for r, n in enumerate(counts):
        assert again.slots[r, :n].tolist() == list(range(n))
        assert (again.slots[r, n:] == -1).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data())
def test_where_keeps_the_marked_tokens_in_order(counts: list[int], data: st.DataObject) -> None:
    run = run_of(counts, [3] * len(counts), scored=True)
    marks = [[data.draw(st.booleans()) for _ in range(run.width)] for _ in counts]
    kept = run.where(torch.tensor(marks, dtype=torch.bool).view(len(counts), run.width))
    for r, n in enumerate(counts):
        wanted = [3 + i for i in range(n) if marks[r][i]]
        assert [s for s in kept.slots[r].tolist() if s >= 0] == wanted
        assert kept.score[r, : len(wanted)].tolist() == [float(s) for s in wanted]
        for i, slot in enumerate(wanted):
            assert torch.equal(kept.k[r, i], run.k[r, slot - 3])
    assert kept.width == max(sum(m[:n]) for m, n in zip(marks, counts, strict=True))


def test_an_owned_run_holds_no_more_than_itself() -> None:
    large = torch.randn(2, 1000, HEAD_DIM)
    run = Run(large[:, :3], large[:, 3:6], torch.arange(3).int().expand(2, 3)).owned()
    for tensor in run.tensors().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
