"""How far attention of the compiled kernels may be from the reference's: what rounding queries and probabilities implies.

The kernels that multiply in integers (kernels/cpu/integer_products.h) round a block's folded vector to steps of its largest
element over 127, or over 32639 for 8-bit codes. An error is uniform within half a step, and codes reach `middle` from their
middle, so that the error of a product of n codes has a standard deviation of at most step / sqrt(12) * sqrt(n) * middle. Six of
them are allowed.
"""

import math

from kvfold.attention.dispatch import kernel_name
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.segment import Segment
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, TensorCodec, part
from kvfold.store.outliers import Outliers
from kvfold.store.residual import Residual
from kvfold.store.rotation import Rotated


def allowance(segment: Segment, query: Query) -> tuple[float, float]:
    """What `out` and `lse` of a segment may differ by, beyond the order of sums."""
    if not isinstance(segment, Blocks) or not segment.pool.fields or "avx" not in kernel_name(segment.codec):
        return 0.0, 0.0
    head_dim, block = query.q.shape[-1], segment.pool.block
    of_score = of_value = 0.0
    k, k_fields = _codes(segment.codec.k, part("k", segment.pool.fields))
    v, v_fields = _codes(segment.codec.v, part("v", segment.pool.fields))
    values = segment.codec.decode(segment.pool.fields)[1].abs().max().item()
    if isinstance(k, Affine) and k.axis == "channel":
        folded = segment.codec.k.fold_query(query.q).abs().amax((0, 1)) * k._scale_zero(k_fields)[0].amax((0, 1))
        of_score = _spread(k, head_dim) * folded.max().item()
    if isinstance(v, Affine) and v.axis == "token":
        turned = math.sqrt(head_dim) if isinstance(segment.codec.v, Rotated) else 1.0
        of_value = _spread(v, block) * v._scale_zero(v_fields)[0].max().item() * turned
    return of_value + math.expm1(2 * of_score) * values, of_score


def _spread(codec: Affine, n: int) -> float:
    levels = 2**codec.bits - 1
    return 6 / (32639 if codec.bits == 8 else 127) / math.sqrt(12) * math.sqrt(n) * levels / 2


def _codes(codec: TensorCodec, fields: Fields) -> tuple[TensorCodec, Fields]:
    """What is left of a codec without its rotation and what it adds to its codes; the latter are not rounded."""
    if isinstance(codec, Rotated):
        return _codes(codec.inner, fields)
    if isinstance(codec, Residual):
        return _codes(codec.first, part("first", fields))
    if isinstance(codec, Outliers):
        return _codes(codec.inner, part("rest", fields))
    return codec, fields
