"""The end of a layer's cache under a keep policy while tokens come one by one: one comes, and one goes.

As a `kvfold.tail` does without a policy, a `Turnover` has what such a step needs in one object of the compiled kernels, so that
little runs in Python by token and layer: the policy's own arithmetic, on numbers that lie row by row until someone looks at the
layer's segments. What it does is what `LayerCache.attend` does, number for number.
"""

import torch
import torch.nn.functional as F

from kvfold import kernels
from kvfold.blocks import Blocks
from kvfold.candidates import Candidates, empty_chunk
from kvfold.eviction import Eviction
from kvfold.keep.base import Keep, KeepContext, Moment
from kvfold.kernels import cpu
from kvfold.kernels.cpu import step
from kvfold.kernels.cpu.library import address, check
from kvfold.modes import in_normal_mode
from kvfold.segment import ROOM, Run
from kvfold.tail import takes_tokens

_NEVER = torch.iinfo(torch.int64).max


class Turnover(Candidates):
    """Blocks, and a run in which tokens come: the places of both, in this order, are what the policy chooses among.

    Where the codec takes tokens one by one, the run has one place, and a token goes on into the blocks once it has been
    attended to. Elsewhere it stays in the run, behind the recent ones, until the layer encodes a block.

    Attributes:
        num_real: tokens of each sequence so far.
        held: tokens of each row, sinks left out.
        place: of the run, where the next token goes.
    """

    def __init__(self, sink: Run, body: Blocks, run: Run, place: int, eviction: Eviction, most: int, num_real: list[int]):
        super().__init__(body, run, empty_chunk(run))
        self.run, self.place, self.eviction = run, place, eviction
        self.moves, self._most = most < 0, most  # recent tokens that a row may have
        moves = self.moves
        self.num_real, self.held = list(num_real), super().counts()
        self.num_sinks = sink.width
        self._shape = len(run.slots), body.width + run.width
        segments = [segment.locate(run.k.shape[-1]) for segment in (sink, body, run) if segment.width]
        self._segments = [found for found in segments if found]  # they own what the compiled code points to
        given = [found.descriptor.native for found in self._segments]
        self._native = cpu._native.turnover(given, sink.width > 0, body.width > 0, moves, self._shape[1])
        if eviction.keep.scored:  # held here alone
            self._score = super().score() if body.width else super().score().clone()
            run.score = None
            body.pool.take_scores()
        keep = eviction.keep
        self._observes, self._learns = keep.observed(1) > 0, type(keep).learn is not Keep.learn
        self._told = type(keep).settle is not Keep.settle
        site, (num_rows, _, head_dim) = eviction.site, run.k.shape
        self._query_shape = num_rows, site.num_query_heads // site.num_kv_heads, 1, head_dim

    @staticmethod
    def open(
        sink: Run, body: Blocks, recent: Run, eviction: Eviction, window: int, num_seen: int, num_real: list[int]
    ) -> "Turnover | None":
        """One for heads that have as many tokens each; None where the next token has to go the long way.

        It is then the only one that holds what is recent, and the scores.

        Args:
            window: recent tokens that stay dense.
            num_seen: slots so far.
            num_real: tokens of each sequence so far; what is padding came before them.
        """
        keep, dtype = eviction.keep, recent.k.dtype
        pool = body.pool
        if keep.heads != "uniform" or body.contiguous or pool.shared or not (pool.in_one_place and sink.whole):
            return None
        if kernels.serving(recent.k.device.type) is not cpu or not cpu.supports_dense(dtype):
            return None
        moves = body.unit == "token" and window == 0 and recent.width == 0 and takes_tokens(body.codec, dtype)
        room = 1 if moves else min(ROOM, window + pool.block - recent.width)
        if (moves and not body.width) or (not moves and body.unit == "token") or room < 1:
            return None
        if any(n != num_seen for n in num_real) and (keep.reindex or type(keep).settle is not Keep.settle):
            return None  # sinks would be as far from each row as padding says, or a policy be told of rows that lose no token
        if body.width and not body.locate(recent.k.shape[-1]):
            return None
        counts = [a + b for a, b in zip(body.num_tokens(), recent.num_tokens(), strict=True)]
        heads = eviction.num_heads
        allowed = [eviction.allowed_after(n + 1) - sink.width for n in num_real for _ in range(heads)]
        if any(counts[row] != counts[row // heads * heads] for row in range(len(counts))):
            return None
        if not _fits(body, moves, counts, allowed):
            return None
        most = -1 if moves else window + pool.block
        return Turnover(sink, body, with_room(recent, room), recent.width, eviction, most, num_real)

    @property
    def is_full(self) -> bool:
        """Whether a row may hold as many recent tokens as make a block: the layer then encodes what does."""
        return not self.moves and self.place == self._most

    def has_room(self) -> bool:
        """Whether one more token of each row finds a place, and one at most has to go for it."""
        there = self.moves or self.place < self.run.width
        return there and _fits(self.body, self.moves, self.held, self._allowed())

    def _allowed(self) -> list[int]:
        """Tokens of each row that may stay once the next one has come, sinks left out."""
        known = [self.eviction.allowed_after(n + 1) - self.num_sinks for n in self.num_real]
        return [n for n in known for _ in range(self.eviction.num_heads)]

    # -- a step ----------------------------------------------------------------------------------------------------------

    @in_normal_mode
    def step(self, token: step.Token) -> torch.Tensor:
        """The whole layer for the next token of every sequence: `[B, 1, H]`."""
        layer, hidden, positions, scaling, softcap, slot = token
        keep = self.eviction.keep
        if keep.strict:  # the query is not to see what goes
            self._go(None, [_NEVER if n == most else -1 for n, most in zip(self.held, self._allowed(), strict=True)])
        mass = torch.empty(self._shape) if self._observes else None
        queries = torch.empty(self._query_shape) if self._learns else None
        place = self.place
        attended = layer.come(
            self._native,
            hidden,
            *positions,
            scaling,
            softcap,
            place=place,
            slot=slot,
            shift=self._shift(slot),
            largest=keep.group == "max",
            score=self._score,
            mass=mass,
            queries=queries,
        )
        self.held, self.num_real = [n + 1 for n in self.held], [n + 1 for n in self.num_real]
        self.place += not self.moves
        if type(keep).first_score is not Keep.first_score:
            self.score()[:, self.body.width + place, None] = keep.first_score(self.run.k[:, place, None])
        moment = Moment(slot + 1, self.num_real, [1] * len(hidden))
        self._settle(mass, queries, self.eviction.context(self, moment, [self.num_sinks] * self._shape[0]))
        return layer.after_attention(hidden, attended)

    def _settle(self, mass: torch.Tensor | None, queries: torch.Tensor | None, ctx: KeepContext) -> None:
        """The policy learns from the newest token's query, and one goes if there are too many."""
        keep, slot = self.eviction.keep, ctx.moment.num_seen - 1
        if queries is not None:
            keep.learn(queries, ctx.num_real[:, None] - 1, ctx)
        if mass is not None:
            if keep.measure == "hits":
                mass = (mass * (torch.tensor(self.held)[:, None] + self.num_sinks) >= 1).float()
            self.set_score(keep.update(self.score(), mass, ctx))
        goes = [n > most for n, most in zip(self.held, ctx.allowed, strict=True)]
        if any(goes) and self._told:  # then in every row
            rank = self.eviction.rank(self, ctx)
            self.eviction.victim(self, rank, ctx)
            self._go(rank, [_NEVER] * len(goes))
        elif any(goes):
            rank = self.eviction.rank_beside_recent(self, ctx)
            first = [
                max(0, slot + 1 - keep.recent.tokens(most)) if go else -1 for go, most in zip(goes, ctx.allowed, strict=True)
            ]
            self._go(rank, first)
        if self.moves and not all(goes):
            cpu._native.settle(self._native, step.NUMBERS[self.run.k.dtype], address(self._score))

    def _shift(self, slot: int) -> tuple[torch.Tensor, int] | None:
        """How queries are moved where they look at sinks, with positions that are counted inside the cache."""
        if not (self.eviction.keep.reindex and self.num_sinks):
            return None
        assert self.eviction.rope is not None
        gone = max(0, slot + 1 - self.eviction.allowed_after(slot + 1))
        return self.eviction.rope.inv_freq, -gone

    def _go(self, rank: torch.Tensor | None, first_recent: list[int]) -> None:
        """One token goes of each row whose `first_recent` slot is not negative: of the lowest `rank [R, N]`, or the oldest."""
        if rank is not None:
            rank = rank.contiguous()
            check("rank", rank, self._shape, torch.float32)
        cpu._native.go(self._native, step.NUMBERS[self.run.k.dtype], address(rank), first_recent, address(self._score))
        self.held = [n - (first >= 0) for n, first in zip(self.held, first_recent, strict=True)]

    def close(self) -> Run:
        """Writes back what has changed, and returns what is recent."""
        width = self.body.width
        if self._score is not None:
            self.body.pool.give_scores()
        if width:
            self.body.lengths = (self.body.slots() >= 0).sum(1).tolist()
            if self._score is not None:
                self.body.set_score(self._score[:, :width])
        score = None if self._score is None else self._score[:, width:]
        return Run(self.run.k, self.run.v, self.run.slots, score).where(self.run.slots >= 0).owned()

    # -- what the policy sees --------------------------------------------------------------------------------------------

    @property
    def slots(self) -> torch.Tensor:
        """`[R, N] int32`, as they are now."""
        of_run = self.run.slots
        return torch.cat([self.body.slots(), of_run], 1) if self.body.width else of_run

    def counts(self) -> list[int]:
        return self.held

    def score(self) -> torch.Tensor:
        assert self._score is not None
        return self._score

    def set_score(self, score: torch.Tensor) -> None:
        self._score = score.contiguous()


def _fits(body: Blocks, moves: bool, counts: list[int], allowed: list[int]) -> bool:
    """Whether rows of `counts` tokens can take one more without losing more than one: a budget that layers share may shrink."""
    if any(n > most for n, most in zip(counts, allowed, strict=True)):
        return False
    if not moves:
        return True
    places = [n * body.pool.block for n in body.pool.num_blocks()]
    return all(n < room or n == most for n, room, most in zip(counts, places, allowed, strict=True))


def with_room(recent: Run, num_new: int) -> Run:
    """A copy of a run with room for more tokens behind it, which are zero."""
    pad = (0, 0, 0, num_new)
    score = None if recent.score is None else F.pad(recent.score, (0, num_new))
    return Run(F.pad(recent.k, pad), F.pad(recent.v, pad), F.pad(recent.slots, (0, num_new), value=-1), score)


def comes_first(padding: torch.Tensor, num_real: list[int]) -> bool:
    """Whether the `num_real` tokens of each sequence are its last ones: `padding [B, seen]`, 0 for padding."""
    return all(bool(row[len(row) - n :].all()) for row, n in zip(padding, num_real, strict=True))
