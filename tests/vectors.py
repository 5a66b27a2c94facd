"""What tests of codecs encode: vectors of kinds that have broken a codec somewhere."""

import torch
from hypothesis import strategies as st

from kvfold.percent import Percent
from kvfold.store import levels
from kvfold.store.affine import Affine
from kvfold.store.base import Fields, TensorCodec
from kvfold.store.dense import DenseCodec
from kvfold.store.fitted import Fitted
from kvfold.store.fp8 import Float8
from kvfold.store.outliers import Outliers
from kvfold.store.residual import Residual
from kvfold.store.subspace import Subspace
from kvfold.store.table import Table

HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 256])
KINDS = ["normal", "1e-3", "1e3", "constant channels", "one token large", "zeros", "negative", "positive", "tiny"]

AXES, GROUPS = st.sampled_from(["token", "channel"]), st.sampled_from([16, 32, 64, 128])
SCALES = st.sampled_from(["half", "log8"])
LEVELS = st.sampled_from([levels.nf4(), levels.e2m1(), *(levels.on_a_sphere(b, 64) for b in (2, 3, 4)), (-1.0, -0.1, 0.2, 3.0)])

affines = st.builds(Affine, bits=st.sampled_from([8, 4, 2]), axis=AXES, group=GROUPS, symmetric=st.booleans(), scales=SCALES)
tables = st.builds(
    Table, levels=LEVELS, axis=AXES, group=GROUPS, offset=st.booleans(), scales=SCALES,
    fit=st.sampled_from(["largest", "norm"]), refits=st.sampled_from([0, 0, 1, 3]),
)  # fmt: skip
fitted = st.builds(
    Fitted, bits=st.sampled_from([2, 3, 4]), axis=AXES, group=GROUPS, scales=SCALES, rounds=st.sampled_from([0, 6])
)
outliers = st.builds(
    Outliers, inner=st.one_of(affines, tables, fitted), share=st.sampled_from([Percent(0.01), Percent(0.1)]), axis=AXES
)
subspaces = st.builds(
    Subspace, inner=st.sampled_from([DenseCodec(torch.float16), Affine(8, "channel"), Affine(4, "channel", 16, True)]),
    rank=st.sampled_from([1, 4, 32]), tokens=st.sampled_from([64, 128]),
)  # fmt: skip
residuals = st.builds(Residual, first=st.one_of(affines, tables, outliers), second=subspaces)
floats = st.builds(Float8, format=st.sampled_from(["e4m3", "e5m2"]), scaled=st.booleans())
dense = st.builds(DenseCodec, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))


def values(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Vectors `[..., T, D]` of a kind."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "1e-3":
        return x * 1e-3
    if kind == "1e3":
        return x * 1e3
    if kind == "constant channels":
        x[..., ::7] = 150 * torch.where(torch.arange(x[..., ::7].shape[-1]) % 2 == 0, 1.0, -1.0)
    if kind == "one token large":
        x[..., :1, :] *= 200
    if kind == "zeros":
        return torch.zeros_like(x)
    if kind == "negative":
        return -x.abs() - 3
    if kind == "positive":
        return x.abs() + 3
    if kind == "tiny":
        return x * 1e-6
    return x


def whole_blocks(codec: TensorCodec, num: int) -> int:
    """Codecs of whole blocks take whole blocks, one at least."""
    return num if codec.unit == "token" else max(1, -(-num // codec.block)) * codec.block


def size(fields: Fields) -> int:
    """The bytes of the storages that fields hold."""
    return sum(x.untyped_storage().nbytes() for x in fields.values())
