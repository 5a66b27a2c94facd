"""Blocks hold what was put in, whatever happens to them: against plain dictionaries."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from segment_cases import CPU, codec_of, run_of

from kvfold.blocks import Blocks
from kvfold.segment import Run


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
