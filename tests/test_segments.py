"""Segments hold what was put in, whatever happens to them, and attend as plain attention over it does."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rounding import allowance

from kvfold.attention.reference import Query, merge
from kvfold.blocks import Blocks
from kvfold.plan import Plan
from kvfold.segment import Run, join
from kvfold.site import Site
from kvfold.store.base import KVCodec

HEAD_DIM = 16
CPU = torch.device("cpu")
CODECS = ["dense", "int8(k_axis=token, rotate=none)", "int4", "int2", "fp8", "kivi(int4, group=16)", "mixed(k=int8, v=fp8)"]


def codec_of(plan: str, head_dim: int = HEAD_DIM) -> KVCodec:
    return Plan.parse(plan).store.codec(Site(head_dim, torch.float32))


def run_of(counts: list[int], firsts: list[int], head_dim: int = HEAD_DIM, seed: int = 0, scored: bool = False) -> Run:
    """A ragged run; the vectors of a token follow from its row's seed and slot."""
    width = max(counts, default=0)
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(len(counts), width, head_dim, generator=generator)
    v = torch.randn(len(counts), width, head_dim, generator=generator)
    place = torch.arange(width)[None]
    slots = torch.where(place < torch.tensor(counts)[:, None], torch.tensor(firsts)[:, None] + place, -1).int()
    return Run(k, v, slots, slots.float() if scored else None)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, query: Query
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of attention over dense vectors in double precision; the oracle of every segment."""
    scores = q.double() @ k.double().mT
    if query.softcap:
        scores = (scores / query.softcap).tanh() * query.softcap
    num_queries = len(query.slots)
    hidden = (slots[:, None] < 0) | (slots[:, None] > query.slots[:, None])
    if query.first_visible is not None:
        hidden = hidden | (slots[:, None] < query.first_visible[..., None])
    scores = scores.unflatten(1, (query.num_groups, num_queries)).masked_fill(hidden[:, None], -torch.inf).flatten(1, 2)
    lse = scores.logsumexp(-1)
    p = (scores - lse.clamp_min(-1e300)[..., None]).exp()
    return p @ v.double(), lse


def query_of(rows: int, num_groups: int, slots: list[int], head_dim: int = HEAD_DIM, softcap: float | None = None) -> Query:
    q = torch.randn(rows, num_groups * len(slots), head_dim, generator=torch.Generator().manual_seed(5))
    # Scores of the same size for every head dim, and large enough to prefer some tokens.
    return Query(q * 4 * head_dim**-0.5, torch.tensor(slots), num_groups, softcap=softcap)


def check_attention(parts: list[Run | Blocks], query: Query) -> None:
    """Merged attention over segments equals attention over the concatenation of what they hold."""
    dense = [part.dense() for part in parts]
    k, v, slots = (torch.cat([d[i] for d in dense], 1) for i in range(3))
    out, lse = plain_attention(query.q, k, v, slots, query)
    got = merge([part.attend(query) for part in parts])
    seen = lse > -torch.inf
    of_out, of_lse = (max(each) for each in zip(*(allowance(part, query) for part in parts), strict=True))
    torch.testing.assert_close(got.out[seen], out[seen].float(), atol=5e-5 + of_out, rtol=1e-4)
    assert (got.out[~seen] == 0).all()
    torch.testing.assert_close(got.lse, lse.float(), atol=2e-5 + of_lse, rtol=1e-5)


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


# -- blocks, against plain dictionaries --------------------------------------------------------------------------------------


@dataclass
class Token:
    k: torch.Tensor
    v: torch.Tensor
    score: float


class BlocksMachine(RuleBasedStateMachine):
    """Does to Blocks what caches do, and to a list of dictionaries the same."""

    plan = "dense"
    contiguous = True
    exact = True

    @initialize(rows=st.integers(1, 3))
    def start(self, rows: int) -> None:
        self.codec = codec_of(self.plan)
        self.scored = not self.contiguous
        self.blocks = Blocks(self.codec, rows, CPU, contiguous=self.contiguous, scored=self.scored)
        self.model: list[dict[int, Token]] = [{} for _ in range(rows)]
        self.ends = [0] * rows
        self.seed = 0

    @property
    def rows(self) -> int:
        return len(self.model)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        sizes = st.sampled_from([0, 1, 2, 63, 64, 65, 130]) if self.codec.unit == "token" else st.sampled_from([0, 64, 128])
        same = data.draw(st.booleans())
        counts = [data.draw(sizes)] * self.rows if same else [data.draw(sizes) for _ in range(self.rows)]
        self._append(counts)

    def _append(self, counts: list[int]) -> None:
        self.seed += 1
        run = run_of(counts, self.ends, seed=self.seed, scored=self.scored)
        self.blocks.append(run)
        for r, n in enumerate(counts):
            for i in range(n):
                slot = self.ends[r] + i
                self.model[r][slot] = Token(run.k[r, i], run.v[r, i], float(slot))
            self.ends[r] += n

    @precondition(lambda self: not self.contiguous and any(self.model))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        share, salt = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])), data.draw(st.integers(0, 99))
        slots = self.blocks.slots()
        gone = torch.rand(slots.shape, generator=torch.Generator().manual_seed(salt)) < share
        self.blocks.drop(gone)
        for r in range(self.rows):
            for slot in slots[r][gone[r]].tolist():
                self.model[r].pop(slot, None)

    @precondition(lambda self: not self.contiguous)
    @rule()
    def tidy(self) -> None:
        self.blocks.tidy()
        needed = [-(-len(tokens) // self.codec.block) for tokens in self.model]
        assert self.blocks.pool.num_blocks() == needed, "a row has more blocks than its tokens need"

    @precondition(lambda self: not self.contiguous and any(self.model))
    @rule()
    def rescore(self) -> None:
        self.blocks.set_score(self.blocks.score() * 2 + 1)
        for row in self.model:
            for token in row.values():
                token.score = token.score * 2 + 1

    @precondition(lambda self: any(self.ends))
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, max(self.ends)))
        rest = self.blocks.crop(end)
        returned = [{} for _ in self.model] if rest is None else _tokens(rest)
        for r, row in enumerate(self.model):
            for slot in [s for s in row if s >= end or s in returned[r]]:
                if slot in returned[r]:
                    self._same(returned[r][slot].k, row[slot].k)
                    assert slot < end
                del row[slot]
            # What came back goes to the dense tokens: the blocks go on behind their last whole block.
            self.ends[r] = (
                min(self.ends[r], end) if self.codec.unit == "token" or not self.contiguous else max(row, default=-1) + 1
            )

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=4))
        self.blocks.select_rows(torch.tensor(rows))
        self.model = [{slot: Token(t.k, t.v, t.score) for slot, t in self.model[r].items()} for r in rows]
        self.ends = [self.ends[r] for r in rows]

    @invariant()
    def holds_what_was_put_in(self) -> None:
        if not hasattr(self, "blocks"):
            return
        k, v, slots = self.blocks.dense() if self.blocks.pool.fields else (None, None, self.blocks.slots())
        assert self.blocks.counts().tolist() == [len(row) for row in self.model]
        score = self.blocks.score() if self.scored else None
        for r, row in enumerate(self.model):
            held = {slot: i for i, slot in enumerate(slots[r].tolist()) if slot >= 0}
            assert set(held) == set(row)
            if not row or k is None or v is None:
                continue
            order = sorted(row)
            at = torch.tensor([held[slot] for slot in order])
            self._same(k[r, at], torch.stack([row[slot].k for slot in order]))
            self._same(v[r, at], torch.stack([row[slot].v for slot in order]))
            if score is not None:
                assert score[r, at].tolist() == [row[slot].score for slot in order]

    @invariant()
    def owns_no_more_memory_than_it_needs(self) -> None:
        if not hasattr(self, "blocks"):
            return
        pool = self.blocks.pool
        used = len(pool.table[pool.table >= 0].unique())
        for x in pool.fields.values():
            assert x.shape[0] * x[0:1].numel() == x.numel()
            assert x.shape[0] == used + len(pool._free)
        owners: dict[int, int] = {}
        for row in pool.table.tolist():
            for i in row:
                owners[i] = owners.get(i, 0) + (i >= 0)
        assert not set(owners) & set(pool._free) - {-1}
        if not pool.shared:
            assert all(n <= 1 for n in owners.values()), "two rows own a block that neither would copy before writing"

    def _same(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        if self.exact:
            torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
        else:  # 8 bits, read and written again a few times
            torch.testing.assert_close(mine, theirs, atol=0.15, rtol=0)


def _tokens(run: Run) -> list[dict[int, Token]]:
    return [
        {slot: Token(run.k[r, i], run.v[r, i], 0.0) for i, slot in enumerate(row) if slot >= 0}
        for r, row in enumerate(run.slots.tolist())
    ]


def _machine(name: str, **changes: object) -> type:
    case = type(name, (BlocksMachine,), changes).TestCase
    case.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
    return case


TestContiguousTokens = _machine("ContiguousTokens")
TestThinnedTokens = _machine("ThinnedTokens", contiguous=False)
TestContiguousBlocks = _machine("ContiguousBlocks", plan="int8(rotate=none)", exact=False)
TestThinnedBlocks = _machine("ThinnedBlocks", plan="int8(rotate=none)", contiguous=False, exact=False)
TestThinnedCodes = _machine("ThinnedCodes", plan="fp8(scale=true)", contiguous=False, exact=False)
TestContiguousCodes = _machine("ContiguousCodes", plan="int8(k_axis=token)", exact=False)


@pytest.mark.parametrize("plan", ["int2", "int4(rotate=none)", "mixed(k=int4, v=turboquant(3))", "kivi(int2, group=64)"])
def test_filling_holes_leaves_the_codes_of_other_tokens(plan: str) -> None:
    """The first two tokens of each block bound every channel, and stay: so do K's scales, but for a step of rounding."""
    blocks = Blocks(codec_of(plan), 2, CPU, contiguous=False, scored=True)
    run = run_of([256, 256], [0, 0], scored=True)
    k = run.k.clamp(-1, 1)
    k[:, 0::64], k[:, 1::64] = 1, -1
    blocks.append(Run(k, run.v, run.slots, run.score))
    gone = torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) < 0.4
    gone[:, 0::64] = gone[:, 1::64] = False
    blocks.drop(gone)
    old_k, old_v, _ = blocks.dense()
    new = run_of([64, 64], [256, 256], seed=2, scored=True)
    blocks.append(Run(new.k.clamp(-0.9, 0.9), new.v, new.slots, new.score))
    assert blocks.pool.num_blocks() == [4, 4], "holes were enough"
    k, v, slots = blocks.dense()
    for row in range(2):
        stayed = (slots[row] >= 0) & (slots[row] < 256)
        assert int(stayed.sum()) == int((~gone[row]).sum())
        assert torch.equal(stayed, ~gone[row]), "no token has moved"
        torch.testing.assert_close(k[row, stayed], old_k[row, stayed], atol=2**-9, rtol=0)
        assert torch.equal(v[row, stayed], old_v[row, stayed])
        fresh = slots[row] >= 256
        assert sorted(slots[row, fresh].tolist()) == list(range(256, 320))


def test_beams_share_blocks_until_one_writes() -> None:
    blocks = Blocks(codec_of("dense"), 1, CPU, contiguous=True, scored=False)
    blocks.append(run_of([100], [0]))
    before = blocks.pool.fields["k.x"].shape[0]
    blocks.select_rows(torch.tensor([0, 0, 0]))
    assert blocks.pool.fields["k.x"].shape[0] == before, "copies cost nothing"
    blocks.append(run_of([1, 1, 1], [100] * 3, seed=7))
    assert blocks.pool.fields["k.x"].shape[0] <= before + 3, "only the block that is written to is copied"
    k, _, _ = blocks.dense()
    assert torch.equal(k[0, :100], k[1, :100])
    assert not torch.equal(k[0, 100], k[1, 100])


def test_a_gap_in_the_slots_is_remembered() -> None:
    """Rows that lose no token are a start and a length; one that skips a slot is not."""
    blocks = Blocks(codec_of("dense"), 2, CPU, contiguous=True, scored=False)
    blocks.append(run_of([5, 3], [0, 2]))
    assert blocks.contiguous
    blocks.append(run_of([2, 2], [5, 9], seed=1))
    assert not blocks.contiguous
    assert [sorted(s for s in row if s >= 0) for row in blocks.slots().tolist()] == [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 9, 10]]
