"""The end of a layer's cache under a keep policy on a GPU: one token comes and one goes, always by the same operations.

What `kvfold.static_tail` is without a policy, and `kvfold.turnover` on a CPU. How many tokens may stay, and so whether one
goes, is known beforehand: the numbers of the next steps are written to the device together, and a step takes its own by a
counter. Which token goes is found on the device and never asked for. What `kvfold.layer_cache` does for such a token is the
reference.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kvfold.attention import dispatch
from kvfold.blocks import Blocks
from kvfold.candidates import Candidates, empty_chunk
from kvfold.eviction import Eviction
from kvfold.keep.base import Keep, KeepContext, aligned
from kvfold.kernels import triton
from kvfold.segment import Run
from kvfold.static_context import Now, OnDevice
from kvfold.static_tail import next_serial, room_of, suits, why_unread

STEPS = 256
"""Steps whose numbers are written to the device at once, at the most."""
_NUMBERS = 6


class StaticTurnover(Candidates):
    """Blocks, and a run in which tokens come: the places of both, in this order, are what the policy chooses among.

    Where the codec takes tokens one by one (`in_body`) the run has one place, and a token goes on into the blocks once it has
    been attended to. Elsewhere it stays in the run, behind the recent ones, until the layer encodes a block.

    Attributes:
        left: steps that are prepared.
        taken: tokens that have come since it was opened.
        mark: changes when a captured step no longer serves.
    """

    def __init__(self, recent: Run, window: int, body: Blocks):
        super().__init__(body, recent, empty_chunk(recent))
        rows, _, head_dim = recent.k.shape
        self.in_body = body.unit == "token"
        self.capacity = room_of(window, body)
        k, v = (x.new_zeros(rows, self.capacity, head_dim) for x in (recent.k, recent.v))
        self.run = Run(k, v, recent.slots.new_full((rows, self.capacity), -1))
        self._numbers = torch.zeros(STEPS, _NUMBERS, dtype=torch.long, device=k.device)  # see `static_context.Now`
        self._step = torch.zeros(1, dtype=torch.long, device=k.device)
        self._held_score = torch.empty(rows, 0, device=k.device)
        self._written: Callable[[], None] | None = None
        self._serial = next_serial()
        self.mark: tuple[Any, ...] = ()
        self.left = self.taken = 0

    @staticmethod
    def why_not(sink: Run, body: Blocks, recent: Run, window: int, eviction: Eviction) -> str | None:
        """Why tokens can't come to such segments in steps that are all alike, or None where they can."""
        keep, pool = eviction.keep, body.pool
        if why := why_unread(recent, body):
            return why
        if keep.waits:
            return f"{keep.name} reads numbers back from the device"
        if keep.heads != "uniform":
            return "heads share a budget"
        if eviction.cost is not None:
            return "a budget of bytes has no place for what a captured step holds"
        counts = {a + b for a, b in zip(body.num_tokens(), recent.num_tokens(), strict=True)}
        if len(counts) > 1 or not sink.whole:
            return "its rows hold different numbers of tokens"
        if pool.shared or not pool.in_one_place:
            return "its sequences share blocks, or blocks lie elsewhere"
        if body.unit == "block":
            return None if recent.width < window + pool.block else "a block is to be encoded"
        if window:
            return "each token pushes another one out of its dense window"
        return None if body.width and pool.full and not recent.width else "nothing is encoded yet"

    def suits(self, recent: Run, window: int, body: Blocks) -> bool:
        """Whether its memory serves such segments."""
        return suits(self.run.k, recent, window, body)

    def open(self, sink: Run, body: Blocks, recent: Run, eviction: Eviction, num_seen: int) -> bool:
        """Makes ready for the tokens after these, of which `why_not` says nothing; False where the next one can't come so.

        It is then the only one that holds what is recent, and the scores.
        """
        count = body.num_tokens()[0] + recent.num_tokens()[0]
        if self.in_body and body.width == count < eviction.allowed_after(num_seen + 1) - sink.width:
            body.pool.extend([n + 1 for n in body.pool.num_blocks()])
        steps = self._plan(body, recent.width, eviction, sink.width, count, num_seen)
        if not steps:
            return False
        self.left, self.taken = len(steps), 0
        self._numbers[: len(steps)].copy_(torch.tensor(steps))
        self._step.zero_()
        width = recent.width
        self.run.k[:, :width], self.run.v[:, :width] = recent.k, recent.v
        self.run.slots.fill_(-1)[:, :width] = recent.slots
        super().__init__(body, self.run, empty_chunk(self.run))
        self.eviction, self.sink, self.state = eviction, sink, eviction.state
        keep = eviction.keep
        if keep.scored:
            self._hold_scores(recent)
        self._aligned = keep.alike and aligned(self.places(), eviction.num_heads)
        self._describe()
        return True

    def _plan(
        self, body: Blocks, place: int, eviction: Eviction, num_sinks: int, count: int, num_seen: int
    ) -> list[tuple[int, ...]]:
        """The numbers of as many steps as are alike (see `static_context.Now`)."""
        keep = eviction.keep
        steps: list[tuple[int, ...]] = []
        for slot in range(num_seen, num_seen + STEPS):
            allowed = eviction.allowed_after(slot + 1) - num_sinks
            if count > allowed or (not self.in_body and place == self.capacity):
                break
            goes = count == allowed
            if self.in_body and not goes and count == body.width:
                break
            first_recent = slot + 1 - min(keep.recent.tokens(allowed), allowed)
            gone = max(0, slot + 1 - (allowed + num_sinks))
            seen = num_sinks + count + (0 if goes and keep.strict else 1)
            steps.append((place, slot, goes, first_recent, gone, seen))
            count += not goes
            place += not self.in_body
        return steps

    def take(self) -> None:
        """Says that one more token has come."""
        self.left -= 1
        self.taken += 1

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What it holds beside the segments."""
        run = {"k": self.run.k, "v": self.run.v, "slots": self.run.slots}
        yield from (run | {"numbers": self._numbers, "step": self._step, "score": self._held_score}).items()

    def close(self) -> Run:
        """Writes back what has changed, and returns what is recent."""
        body, run, width = self.body, self.run, self.body.width
        scored = self.eviction.keep.scored
        if scored:
            body.pool.give_scores()
        if width:
            body.lengths = (body.slots() >= 0).sum(1).tolist()
            if scored:
                body.set_score(self._held_score[:, :width])
        score = self._held_score[:, width:].clone() if scored else None
        return Run(run.k.clone(), run.v.clone(), run.slots.clone(), score).where(run.slots >= 0)

    # -- the step --------------------------------------------------------------------------------------------------------

    def attend(self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, softcap: float | None) -> torch.Tensor:
        """Takes a token, attends to all, and lets one go: nothing waits for the device, and nothing comes from the host.

        Args:
            k, v: `[R, 1, D]`, in the model's type.
            q: `[R, G, D] float32`, scaled.

        Returns:
            `[R, G, D] float32`.
        """
        from kvfold.kernels.triton import turnover

        now = Now(*self._numbers.index_select(0, self._step)[0].split(1))
        keep, rows = self.eviction.keep, len(q)
        if keep.strict:  # the query is not to see what goes
            turnover.leave(*self._slots_of_places(), now.goes)
        score = (self._held_score, keep.first_score(k)) if keep.scored else None
        turnover.come(k, v, now.place, now.slot, (self.run.k, self.run.v, self.run.slots), score)
        self._step_score = self._held_score
        out, mass = self._attend(q.contiguous(), now, softcap)
        state = dict(self.state)
        ctx = OnDevice(self, now, state, self.eviction, self._aligned)
        if type(keep).learn is not Keep.learn:
            keep.learn(q[:, :, None], now.slot.expand(rows, 1), ctx)
        if mass is not None:
            if keep.measure == "hits":
                mass = (mass * now.seen >= 1).float()
            self.set_score(keep.update(self._step_score, mass, ctx))
        self._leave(k, v, now, None if keep.strict else self._rank(now, state, ctx))
        for name, x in self.state.items():
            if state[name] is not x:
                x.copy_(state[name])
        self._step.add_(1)
        del self._step_score  # nothing of a step stays but what is counted
        return out

    def _attend(self, q: torch.Tensor, now: Now, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, `[R, G, D]`, and what each place received, `[R, N]`, where the policy wants to know it."""
        keep, rope = self.eviction.keep, self.eviction.rope
        rows, groups, _ = q.shape
        widths = [part.width for part in self.parts]
        scores = q.new_empty(rows, groups, sum(widths)) if keep.observed(1) else None
        rooms = [None] * len(widths) if scores is None else scores.split(widths, -1)
        looks = [triton.Look(found, q, None, (), (), None, room) for found, room in zip(self._found, rooms, strict=True)]
        if self._found_sink is not None:
            turned = q
            if keep.reindex:
                assert rope is not None
                turned = rope.rotate(q, -now.gone).contiguous()
            looks.append(triton.Look(self._found_sink, turned, None, (), ()))
        out, lse = triton.attend(looks, now.slot, groups, softcap)
        return out, None if scores is None else triton.received(scores, lse, keep.group == "max")

    def _rank(self, now: Now, state: dict[str, torch.Tensor], ctx: KeepContext) -> torch.Tensor:
        """`[R, N]`: of each row the lowest goes, if one goes; the policy is told which, if it wants to know."""
        eviction, score, before = self.eviction, self._step_score, dict(state)
        rank = eviction.rank_beside_recent(self, ctx)
        if type(eviction.keep).settle is not Keep.settle:
            victim = eviction.victim(self, eviction.with_recent(rank, ctx.positions, now.first_recent), ctx)
            rank = torch.full_like(rank, torch.inf).scatter_(1, victim[:, None], -torch.inf)
        goes = now.goes.bool()
        if self._step_score is not score:
            self._step_score = torch.where(goes, self._step_score, score)
        for name, x in before.items():
            if state[name] is not x:
                state[name] = torch.where(goes, state[name], x)
        return rank

    def _leave(self, k: torch.Tensor, v: torch.Tensor, now: Now, rank: torch.Tensor | None) -> None:
        """One token goes, the newest one into the blocks where that is its place, and scores to where they are held."""
        from kvfold.kernels.triton import turnover

        scores = (self._held_score, self._step_score.contiguous()) if self.eviction.keep.scored else None
        if rank is None and not self.in_body:
            if scores and scores[1] is not scores[0]:
                self._held_score.copy_(self._step_score)
            return
        ranked = None if rank is None else (rank.contiguous(), now.first_recent)
        goes = None if rank is None else now.goes
        address = turnover.leave(*self._slots_of_places(), goes, ranked, scores, moves=self.in_body)
        if address is None:
            return
        pool = self.body.pool
        encoded = dispatch.encode(self.body.codec, k, v)
        fields = [(pool.fields[name].flatten(0, 1), x[:, 0].contiguous()) for name, x in encoded.items()]
        turnover.exchange(fields, address)
        self._written = partial(turnover.exchange, fields, address)  # what was there is now in what was new

    def _slots_of_places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = self.body.pool
        return pool.table, pool.slots, self.run.slots

    def remember(self) -> Callable[[], None]:
        """What puts everything back as it is now, after one step."""
        changing = [self.body.pool.slots, self.run.slots, self._held_score, self._step, *self.state.values()]
        before = [x.clone() for x in changing]
        self._written = None

        def put_back() -> None:
            if self._written:
                self._written()
            self._written = None
            for x, old in zip(changing, before, strict=True):
                x.copy_(old)

        return put_back

    # -- what the policy sees --------------------------------------------------------------------------------------------

    def places(self) -> torch.Tensor:
        """`[R, N] int32`: the slot at each place, as it is now."""
        of_run = self.run.slots
        return torch.cat([self.body.slots(), of_run], 1) if self.body.width else of_run

    @property
    def slots(self) -> torch.Tensor:
        return self.places()

    def score(self) -> torch.Tensor:
        return self._step_score

    def set_score(self, score: torch.Tensor) -> None:
        self._step_score = score

    # -- memory ----------------------------------------------------------------------------------------------------------

    def _hold_scores(self, recent: Run) -> None:
        body, width = self.body, self.body.width
        num_places = width + self.capacity
        if self._held_score.shape[1] != num_places:
            self._held_score = torch.empty(len(recent.slots), num_places, device=recent.slots.device)
        if width:
            self._held_score[:, :width] = body.score()
        assert recent.score is not None
        self._held_score[:, width : width + recent.width] = recent.score
        self._held_score[:, width + recent.width :] = 0
        body.pool.take_scores()

    def _describe(self) -> None:
        """What the kernels are told, and the mark of it."""
        head_dim, pool = self.run.k.shape[-1], self.body.pool
        found = [segment.locate(head_dim) for segment in (*self.parts, self.sink) if segment.width]
        assert all(found), "why_not has asked for that"
        descriptors = [place.descriptor for place in found if place]
        self._found, self._found_sink = descriptors[: len(self.parts)], (descriptors[len(self.parts) :] or [None])[0]
        held = [self._held_score, self.sink.k, *self.state.values()]
        self.mark = self._serial, self._aligned, self.sink.width, pool.mark(), *(x.data_ptr() for x in held)
