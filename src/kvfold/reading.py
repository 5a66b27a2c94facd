"""The end of a layer's cache under a read stage while tokens come one by one: all stay, and a step reads some of the blocks.

As a `kvfold.tail` does without one, a `Reading` has what such a step needs at hand: the newest tokens in a run with room, and
where the blocks lie. Which of them are read is the stage's own choice, in torch. What it does is what `LayerCache.attend` does.
"""

import torch

from kvfold import kernels
from kvfold.blocks import Blocks
from kvfold.kernels import cpu
from kvfold.kernels.cpu import step
from kvfold.modes import in_normal_mode
from kvfold.read.base import Read
from kvfold.segment import ROOM, Run
from kvfold.turnover import with_room


class Reading:
    """Sinks, blocks, and a run in which tokens come; whole blocks are encoded by the layer."""

    def __init__(self, sink: Run, body: Blocks, recent: Run, left: int, most: int, num_real: list[int], read: Read):
        self.body, self.read, self.left = body, read, left
        self.run, self._place = with_room(recent, left), recent.width
        head_dim = self.run.k.shape[-1]
        sinks = sink.locate(head_dim) if sink.width else None
        self._runs = [place.descriptor for place in (sinks, self.run.locate(head_dim)) if place]
        self._sides = cpu.describe_sides(body.codec, body.pool.fields, head_dim) if body.width else None
        self._num_real, self._most = num_real, most
        self._dense = [sink.width + n for n in recent.num_tokens()]

    @staticmethod
    def open(sink: Run, body: Blocks, recent: Run, window: int, num_real: list[int], read: Read) -> "Reading | None":
        """One for these segments; None where the next token has to go the long way.

        Args:
            window: recent tokens that stay dense.
            num_real: tokens of each sequence so far.
        """
        dtype, pool = recent.k.dtype, body.pool
        if kernels.serving(recent.k.device.type) is not cpu or not (cpu.supports(body.codec) and cpu.supports_dense(dtype)):
            return None
        left = min(window + pool.block - recent.width, ROOM)
        if left <= 0 or body.unit != "block" or not body.contiguous or not pool.in_one_place or not sink.whole:
            return None
        return Reading(sink, body, recent, left, window + pool.block, num_real, read)

    @property
    def is_full(self) -> bool:
        """Whether a row may hold as many recent tokens as make a block: the layer then encodes what does."""
        return self._place == self._most

    def has_room(self) -> bool:
        """Whether one more token finds a place."""
        return self.left > 0

    @in_normal_mode
    def step(self, token: step.Token) -> torch.Tensor:
        """The whole layer for the next token of every sequence: `[B, 1, H]`."""
        layer, hidden, positions, scaling, softcap, slot = token
        run, place = self.run, self._place
        rows, _, head_dim = run.k.shape
        queries, k, v = layer.before_attention(hidden, *positions)
        q = queries.mul_(scaling).view(rows, -1, head_dim)
        run.k[:, place], run.v[:, place], run.slots[:, place] = k.view(rows, head_dim), v.view(rows, head_dim), slot
        self._place, self.left = place + 1, self.left - 1
        self._num_real, self._dense = [n + 1 for n in self._num_real], [n + 1 for n in self._dense]
        looks = [cpu.Look(segment, q, None, (), ()) for segment in self._runs]
        if self._sides:
            looks.append(self._look_at_blocks(self._sides, q))
        asked = torch.tensor([slot])
        out, _ = cpu.attend(looks, asked, q.shape[1], softcap, run.k.dtype)
        if self.read.scored:
            assert run.score is not None
            span = slice(0, self._place)
            given = run.score[:, span], run.k[:, span], run.slots[:, span].long()
            run.score[:, span] = self.read.observe(*given, q[:, :, None], asked)
        return layer.after_attention(hidden, out.view(queries.shape))

    def _look_at_blocks(self, sides: cpu.Sides, q: torch.Tensor) -> cpu.Look:
        body, pool = self.body, self.body.pool
        counts = pool.num_blocks()
        columns = self.read.choose(
            q, pool.table, pool.summary, counts, self.read.blocks(self._num_real, self._dense, pool.block)
        )
        assert body.starts is not None
        if columns is None:
            return cpu.Look(sides.at(pool.table), q, None, body.starts, body.lengths)
        table = pool.table.gather(1, columns.clamp_min(0)).masked_fill_(columns < 0, -1)
        tokens = [n * pool.block for n in (columns >= 0).sum(1).tolist()]
        return cpu.Look(sides.at(table), q, None, [0] * len(tokens), tokens)

    def close(self) -> Run:
        """What is recent now."""
        return self.run.where(self.run.slots >= 0).owned()
