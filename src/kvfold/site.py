"""Where a method works: one attention layer of a model, with what may be known of it before any token has come."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvfold.calibration import Calibration
from kvfold.rope import Rope


@dataclass(frozen=True)
class Projections:
    """How a layer makes keys and values of its input x: `k = x W^T + b`, before norms and rotation.

    Attributes:
        k, v: the weights W, `[Hkv, D, hidden]`.
        k_bias, v_bias: `[Hkv, D]`, or None.
        k_normed: whether keys are normalised afterwards, before their rotation.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    k_normed: bool = False


class LayerOfModel(Protocol):
    """What a method may ask of the model itself. All raise ModelError where the model has no such thing."""

    def rope(self) -> Rope: ...

    def projections(self) -> Projections: ...

    def calibration(self) -> Calibration: ...


@dataclass(frozen=True)
class Site:
    """One attention layer.

    Attributes:
        head_dim: D.
        dtype: the model's type.
        num_kv_heads, num_query_heads: Hkv, Hq.
        layer, num_layers: which one of the layers that kvfold serves; layers with a sliding window of their own don't count.
        model: the layer in the model, or None where there is none (tests, saved caches).
    """

    head_dim: int
    dtype: torch.dtype = torch.float32
    num_kv_heads: int = 1
    num_query_heads: int = 1
    layer: int = 0
    num_layers: int = 1
    model: LayerOfModel | None = None
