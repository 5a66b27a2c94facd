"""What the full cache predicted for the tokens of an answer, and how a plan's predictions differ from it."""

from dataclasses import dataclass

import torch

from kvfold.lab.quality import divergence, room


class Reference:
    """The full cache's distributions over the scored tokens of one item, in the order in which they came."""

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []
        self._num_bytes = 0

    def add(self, log_probs: torch.Tensor) -> None:
        """Keeps `[n, V] float32`, in memory as long as that is not much, then in files."""
        block = room(tuple(log_probs.shape), self._num_bytes)
        block.copy_(log_probs)
        self._num_bytes += block.nbytes
        self.blocks.append(block)


@dataclass
class Comparison:
    """Compares a plan's distributions with the reference's, block by block.

    Attributes:
        num_tokens: compared so far.
        kl_sum: of KL(full || plan) over them, in nats.
        num_same: tokens with the same most probable one.
    """

    reference: Reference
    num_blocks: int = 0
    num_tokens: int = 0
    kl_sum: float = 0.0
    num_same: int = 0

    def add(self, log_probs: torch.Tensor) -> None:
        full = self.reference.blocks[self.num_blocks].to(log_probs.device)
        if full.shape != log_probs.shape:
            raise ValueError(f"{list(log_probs.shape)} are compared with {list(full.shape)}: other tokens")
        self.num_blocks += 1
        self.num_tokens += len(full)
        self.kl_sum += divergence(full, log_probs)
        self.num_same += int((full.argmax(-1) == log_probs.argmax(-1)).sum())

    @property
    def kl(self) -> float | None:
        """Mean in nats a token; None when nothing was compared."""
        return self.kl_sum / self.num_tokens if self.num_tokens else None

    @property
    def top1(self) -> float | None:
        """Share of tokens with the same most probable one; None when nothing was compared."""
        return self.num_same / self.num_tokens if self.num_tokens else None
