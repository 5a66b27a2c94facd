"""Bounds of each page's keys say which pages can matter to a query: `quest(25%)`.

Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv 2406.10774), section 3.3 and
Algorithm 1. A page keeps the least and the largest value of every channel of its keys, m and M; no key of the page can
score more with a query q than

    u = Σ_d max(q_d m_d, q_d M_d) = max(q, 0) · M + min(q, 0) · m

The pages of the largest bounds are read. The first two layers read everything, as in the paper.

Differs from the paper: what is read are blocks of 64 tokens, the unit in which codecs write; a block counts as its best page
does, so that finer pages give sharper bounds for more bytes. Pages are chosen by KV head, not by query head: a head's bounds
become probabilities over all pages (softmax), and the query heads of a group, and the queries of a chunk, add theirs up.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvfold.budget import Budget
from kvfold.read.base import Read
from kvfold.registry import register
from kvfold.store.base import Fields


@register("read", "quest")
@dataclass(frozen=True)
class Quest(Read):
    """Reads the blocks whose keys may score highest; bounds are kept for every `page` tokens, in the model's type."""

    budget: Budget
    page: Literal[16, 32, 64] = 64
    sink: int = 4
    skip: int = 2
    queries: int = 64

    def summarize(self, k: torch.Tensor, score: torch.Tensor | None) -> Fields:
        *lead, num_tokens, head_dim = k.shape
        low, high = k.view(*lead, num_tokens // self.page, self.page, head_dim).aminmax(dim=-2)
        return {"page.low": low, "page.high": high}

    def relevance(self, q: torch.Tensor, summary: Fields) -> torch.Tensor:
        return bounds(q, summary["page.low"], summary["page.high"]).amax(-1).softmax(-1).sum(1)


def bounds(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The most that any key of a page can score: `q [R, M, D]`, `low, high [R, C, p, D]` to `[R, M, C, p] float32`."""
    pages = low.flatten(1, 2).float().mT, high.flatten(1, 2).float().mT
    most = q.clamp_max(0) @ pages[0] + q.clamp_min(0) @ pages[1]
    return most.view(*q.shape[:2], *low.shape[1:3])
