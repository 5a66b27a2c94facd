"""A few tokens stand for each block: `infllm(25%)`.

Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory (arXiv 2402.04617),
section 3.2. While a token is among the recent ones, it gathers the scores of the queries that come after it,

    r_m = 1/L Σ_j q_{m+j} · k_m,

and when a block leaves, its `representatives` tokens of largest r stand for it: a block's relevance to a chunk is the sum of
q · k over the chunk's queries and the block's representatives.

Differs from the paper: positions stay as they are (the paper reads blocks at one common distance, to go beyond the length that
a model was trained for); L is the number of queries from a token to the end of its block's stay, as prompts come in chunks; and
the query heads of a group are averaged, as blocks are chosen by KV head.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import Budget
from kvfold.errors import PlanError
from kvfold.read.base import Read
from kvfold.registry import register
from kvfold.store.base import Fields


@register("read", "infllm")
@dataclass(frozen=True)
class InfLLM(Read):
    """Reads the blocks whose representative keys score highest."""

    budget: Budget
    representatives: int = 4
    sink: int = 4
    skip: int = 0
    queries: int = 64
    scored: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if not 1 <= self.representatives <= 64:
            raise PlanError(f"infllm: representatives={self.representatives} must be 1 to 64, the tokens of a block")

    def observe(
        self, score: torch.Tensor, k: torch.Tensor, slots: torch.Tensor, q: torch.Tensor, asked: torch.Tensor
    ) -> torch.Tensor:
        seen = (slots[:, None, :] <= asked[:, None]) & (slots[:, None, :] >= 0)
        gained = (q.mean(1) @ k.float().mT).masked_fill(~seen, 0.0).sum(1)
        of_all = (asked[-1] - slots + 1).clamp_min(1)  # every token from this one on has asked once
        return score + (gained - seen.sum(1) * score) / of_all

    def summarize(self, k: torch.Tensor, score: torch.Tensor | None) -> Fields:
        if score is None:  # forgotten where blocks were merged after a crop: then those nearest to the block's mean
            score = (k.float() * k.float().mean(-2, keepdim=True)).sum(-1)
        best = score.topk(self.representatives, dim=-1).indices.sort(-1).values
        return {"page.keys": k.gather(-2, best[..., None].expand(*best.shape, k.shape[-1]))}

    def relevance(self, q: torch.Tensor, summary: Fields) -> torch.Tensor:
        stands = summary["page.keys"].float().sum(2)
        return (q.sum(1, keepdim=True) @ stands.mT)[:, 0]
