"""What the model needs in order to repeat what it has read: `kvzip(25%)`.

Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (arXiv 2505.23416), section 3: the model
reads the context a second time, through the cache, and a token's score is the largest attention that it receives then, over all
queries and the query heads of the group. What no query of the repetition looks at is not needed to answer any question.

    score_t = max_{i in the repetition, g in the group} softmax(q_ig [K, K_rep]^T)_t

The second pass is made by `kvfold.models.reconstruct` after every chunk of more than one token, so that a prefill takes about
twice as long. Heads share a layer's budget (`heads=ada`), as scores of different heads compare well.

Differs from the paper in that a chunk is repeated when it has been read, not when all has, so that memory is bounded by the
budget and a chunk; that no instruction ('Repeat the previous context') comes between, as a cache has no tokenizer; that the
budget is split over the heads of a layer, not over all layers; and that generated tokens, which were not repeated, stay as
long as there are repeated ones to let go.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.keep.base import NO_TOKENS, UNSCORED, Keep, KeepContext, Measure, Share
from kvfold.registry import register


@register("keep", "kvzip")
@dataclass(frozen=True)
class KVzip(Keep):
    """Keeps the tokens that are looked at when the context is repeated."""

    budget: Budget
    sink: int = 4
    recent: Share = NO_TOKENS
    heads: HeadSplit = "ada"
    layers: LayerSplit = UNIFORM
    group = "max"  # without a type: no argument
    measure: ClassVar[Measure] = "max"
    reconstructs: ClassVar[bool] = True

    def first_score(self, k: torch.Tensor) -> torch.Tensor:
        return torch.full(k.shape[:2], UNSCORED, device=k.device)

    def update(self, score: torch.Tensor, mass: torch.Tensor, ctx: KeepContext) -> torch.Tensor:
        return torch.where(score >= UNSCORED, mass, torch.maximum(score, mass))
