"""Keys of low norm receive high attention, so keys of high norm go: `l2norm(25%)`.

Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430), section 3:
needs no attention at all.

The first two layers keep everything, as in the authors' experiments (section 3.1: there the norm says little); `skip=0` evicts
in them too. The budget is that of each other layer.

Differs from the paper: the last tokens can be pinned with `recent`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.keep.base import NO_TOKENS, Keep, Share
from kvfold.registry import register


@register("keep", "l2norm")
@dataclass(frozen=True)
class L2Norm(Keep):
    """Keeps the keys with the smallest L2 norm."""

    budget: Budget
    recent: Share = NO_TOKENS
    sink: int = 0
    skip: int = 2
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM
    reads_vectors: ClassVar[bool] = True

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        return -k.float().norm(dim=-1)
