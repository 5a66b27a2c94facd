"""Heavy hitters: tokens that have received most attention so far, and the recent ones: `h2o(25%)`.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs (arXiv 2306.14048), Algorithm 1:

    score_t = Σ_i softmax(q_i K^T)_t,  over all queries so far, prompt and generated text alike

Half of the budget is for the recent tokens, as in the paper's experiments.

Differs from the paper in that a score belongs to a KV head: over the query heads of a group it is the mean (or
`group=max`). Prompts are read in chunks, with eviction after each, so that memory is bounded; the attention that a chunk
pays is to what was kept before it.
"""

from dataclasses import dataclass

from kvfold.budget import UNIFORM, Budget, HeadSplit, LayerSplit
from kvfold.keep.base import HALF, GroupReduce, Keep, Share
from kvfold.registry import register


@register("keep", "h2o")
@dataclass(frozen=True)
class H2O(Keep):
    """Keeps the `recent` tokens of the budget, and those with the largest accumulated attention."""

    budget: Budget
    recent: Share = HALF
    sink: int = 0
    group: GroupReduce = "mean"
    heads: HeadSplit = "uniform"
    layers: LayerSplit = UNIFORM

    def observed(self, num_queries: int) -> int:
        return num_queries
