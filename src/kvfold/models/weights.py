"""Weights of 4 and 8 bits: linear layers that hold codes, and nothing else.

Decoding one token reads every weight once, so that its time is that of their bytes. `quantize_linears` replaces the linear
layers of any model by `PackedLinear`, which rounds to the nearest code in groups of 32 columns, in the number formats of GGUF's
Q4_1 (x = scale · code + minimum) and Q8_0 (x = scale · code), with scales and minima in half precision. The same format takes
over the blocks of a GGUF file without a second rounding (kvfold.models.gguf_weights).

For a few tokens the compiled kernels multiply codes as they lie. For more, as in a prompt, slabs of the matrix become numbers
of the activations' type and go through an ordinary matrix product. The same in plain torch is the reference, and what runs
where there are no compiled kernels.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from kvfold.errors import ModelError
from kvfold.kernels.cpu import step
from kvfold.kernels.cpu.step import GROUP, TILE_ROWS

FORMS = ("dense", "int8", "int4", "native")
"""What `kvfold.load` takes as `weights`; native is the form of a .gguf file."""

_SLAB = 1 << 22
"""Numbers that a matrix is turned into at once: they fit into a processor's cache."""
_SHRINKS = (1.0, 0.95, 0.9, 0.85)
"""Parts of a group's range that are tried for 4 bits; the one with the least square error is taken."""


@dataclass(frozen=True)
class Codes:
    """A matrix in groups of 32 columns.

    Attributes:
        codes: `[R, C]`, uint8 below 16 (int4) or int8.
        scale: `[R, C / 32] float16`.
        least: `[R, C / 32] float16`, what code 0 stands for; None for int8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor | None

    @property
    def form(self) -> str:
        return "int8" if self.least is None else "int4"

    def dense(self) -> torch.Tensor:
        """`[R, C] float32`."""
        x = self.codes.float().unflatten(1, (-1, GROUP)) * self.scale.float()[..., None]
        if self.least is not None:
            x = x + self.least.float()[..., None]
        return x.flatten(1)


def quantize(weight: torch.Tensor, form: str) -> Codes:
    """Rounds `[R, C]` to the nearest codes, C a multiple of 32."""
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    if form == "int8":
        scale = (groups.abs().amax(-1) / 127).half()
        codes = (groups / _safe(scale)).round_().clamp_(-127, 127)
        return Codes(codes.flatten(1).to(torch.int8), scale, None)
    low, high = groups.amin(-1), groups.amax(-1)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINKS:
        middle, half = (low + high) / 2, shrink * (high - low) / 2
        scale, least = (2 * half / 15).half(), (middle - half).half()
        codes = ((groups - least.float()[..., None]) / _safe(scale)).round_().clamp_(0, 15)
        error = (codes * scale.float()[..., None] + least.float()[..., None] - groups).square_().sum(-1)
        if best is None:
            best = codes, scale, least, error
        else:
            better = error < best[3]
            best = (
                torch.where(better[..., None], codes, best[0]),
                *map(torch.where, [better] * 3, (scale, least, error), best[1:]),
            )
    assert best is not None
    return Codes(best[0].flatten(1).to(torch.uint8), best[1], best[2])


def _safe(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.float()[..., None]
    return torch.where(scale > 0, scale, 1)


# -- the packed form ---------------------------------------------------------------------------------------------------------


def pack(codes: Codes) -> torch.Tensor:
    """Tiles `[ceil(R / 16), C / 32, bytes] uint8`, as kernels/cpu/step.h describes them."""
    rows = codes.codes.shape[0]
    short = -rows % TILE_ROWS
    whole, scale = F.pad(codes.codes, (0, 0, 0, short)), F.pad(codes.scale, (0, 0, 0, short))
    tiles = whole.view(-1, TILE_ROWS, whole.shape[1] // GROUP, GROUP)  # [tile, row, group, column]
    if codes.least is None:
        parts = [tiles.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2), _by_tile(scale)]
    else:
        pairs = tiles.unflatten(3, (4, 4, 2))  # [tile, row, group, word, byte, nibble]
        words = pairs[..., 0] | pairs[..., 1] << 4
        least = F.pad(codes.least, (0, 0, 0, short))
        parts = [words.permute(0, 2, 3, 1, 4).flatten(2), _by_tile(scale), _by_tile(least)]
    return torch.cat(parts, 2)


def unpack(packed: torch.Tensor, form: str, rows: int) -> Codes:
    """The inverse of `pack`."""
    if form == "int8":
        codes, halves = packed.split([512, 32], 2)
        tiles = codes.unflatten(2, (GROUP, TILE_ROWS)).permute(0, 3, 1, 2).contiguous().view(torch.int8)
        return Codes(tiles.flatten(2).flatten(0, 1)[:rows], _by_row(halves, rows), None)
    codes, scale, least = packed.split([256, 32, 32], 2)
    words = codes.unflatten(2, (4, TILE_ROWS, 4)).permute(0, 3, 1, 2, 4)
    pairs = torch.stack([words & 15, words >> 4], -1)
    return Codes(pairs.flatten(2).flatten(0, 1)[:rows], _by_row(scale, rows), _by_row(least, rows))


def _by_tile(x: torch.Tensor) -> torch.Tensor:
    """Halves `[R, groups]` to `[tiles, groups, 32] uint8`."""
    return x.view(-1, TILE_ROWS, x.shape[1]).permute(0, 2, 1).contiguous().view(torch.uint8)


def _by_row(halves: torch.Tensor, rows: int) -> torch.Tensor:
    return halves.contiguous().view(torch.float16).permute(0, 2, 1).flatten(0, 1)[:rows]


class PackedLinear(nn.Module):
    """A linear layer whose weight is codes.

    Attributes:
        packed: the weight, as `pack` makes it.
        form: int4 or int8.
    """

    def __init__(self, codes: Codes, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = codes.codes.shape
        self.form = codes.form
        self.packed = nn.Parameter(pack(codes), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in]` to `[..., out]`, in x's type."""
        if x.numel() <= step.MOST_VECTORS * self.in_features and self._compiled(x):
            return step.linear(self.weight_view(), x.detach())
        slab = max(TILE_ROWS, _SLAB // self.in_features // TILE_ROWS * TILE_ROWS)
        parts = [F.linear(x, self.dense(x.dtype, start, slab)) for start in range(0, self.out_features, slab)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias

    def dense(self, dtype: torch.dtype = torch.float32, start: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """Rows from `start` (a multiple of 16) as numbers, `[num_rows, in]`; to the end where there are fewer."""
        rows = min(num_rows or self.out_features, self.out_features - start)
        tiles = self.packed[start // TILE_ROWS : -(-(start + rows) // TILE_ROWS)]
        if self._compiled(tiles) and step.supports(dtype):
            return step.unpack(step.packed_weight(self.form, tiles, rows, self.in_features, None), dtype)
        return unpack(tiles, self.form, rows).dense().to(dtype)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows as numbers: `indices [n] long` to `[n, in]`."""
        tile, row = indices // TILE_ROWS, indices % TILE_ROWS
        held = self.packed[tile]  # [n, groups, bytes]
        wide = row[:, None, None]
        if self.form == "int8":
            codes = (
                held[..., :512]
                .unflatten(2, (GROUP, TILE_ROWS))
                .gather(3, wide[..., None].expand(-1, *held.shape[1:2], GROUP, 1))
            )
            found = Codes(codes.flatten(1).contiguous().view(torch.int8), _half_of(held[..., 512:], wide), None)
        else:
            words = held[..., :256].unflatten(2, (4, TILE_ROWS, 4))
            words = words.gather(3, wide[..., None, None].expand(-1, *held.shape[1:2], 4, 1, 4)).squeeze(3)
            codes = torch.stack([words & 15, words >> 4], -1)
            found = Codes(codes.flatten(1), _half_of(held[..., 256:288], wide), _half_of(held[..., 288:], wide))
        return found.dense().to(dtype)

    def weight_view(self) -> step.Weight:
        """For the compiled kernels."""
        address = self.packed.data_ptr()
        known: tuple[int, step.Weight] | None = self.__dict__.get("_view")
        if known is None or known[0] != address:
            view = step.packed_weight(self.form, self.packed.detach(), self.out_features, self.in_features, self.bias)
            known = self.__dict__["_view"] = address, view
        return known[1]

    def _compiled(self, x: torch.Tensor) -> bool:
        return x.is_cpu and self.packed.is_cpu and step.usable() and (x.dtype == torch.uint8 or step.supports(x.dtype))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


def _half_of(halves: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """One of each 16 halves `[n, groups, 32] uint8`: `[n, groups]`."""
    return halves.contiguous().view(torch.float16).gather(2, row.expand(-1, halves.shape[1], 1)).squeeze(2)


class PackedEmbedding(nn.Module):
    """An embedding that looks its rows up in the head that it is tied to."""

    def __init__(self, head: PackedLinear, dtype: torch.dtype):
        super().__init__()
        self.packed = head.packed
        self.__dict__["_head"] = head  # the head is a module of its own elsewhere
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids [...] long` to `[..., H]`."""
        head: PackedLinear = self.__dict__["_head"]
        return head.rows(ids.flatten(), self.dtype).view(*ids.shape, head.in_features)


# -- a whole model -----------------------------------------------------------------------------------------------------------


def quantize_linears(model: PreTrainedModel, form: str) -> None:
    """Replaces linear layers by ones of `form`, int4 or int8; the head, and an embedding that is tied to it, always by int8.

    What is no plain linear layer, or has columns that are no multiple of 32, stays as it is: `bytes_by_form` says how much.

    Raises:
        ModelError: nothing in the model fits.
    """
    head = model.get_output_embeddings()
    for parent, name, linear in linears(model):
        replace(model, parent, name, PackedLinear(quantize(linear.weight, "int8" if linear is head else form), linear.bias))
    check_replaced(model, form)


def check_replaced(model: PreTrainedModel, form: str) -> None:
    """ModelError when no layer of a model is packed. One that has some can't be saved: no other library reads its layers."""
    if not any(isinstance(m, PackedLinear) for m in model.modules()):
        raise ModelError(f"{type(model).__name__} has no linear layer that can be held as {form}: leave out --weights")
    model.save_pretrained = functools.partial(_refuse_to_save, form)


def _refuse_to_save(form: str, *_: object, **__: object) -> None:
    raise ModelError(
        f"packed weights ({form}) are not saved: save the model as it was, and give weights='{form}' to kvfold.load"
    )


def linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers that can be packed, with their parent and their name in it."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.in_features % GROUP == 0
    ]
    yield from found


def replace(model: PreTrainedModel, parent: nn.Module, name: str, packed: PackedLinear) -> None:
    """Puts a packed layer in the place of a linear one, and of the embedding that shared its weight."""
    old = getattr(parent, name)
    embedding = model.get_input_embeddings()
    tied = type(embedding) is nn.Embedding and embedding.weight is old.weight
    packed.train(old.training).to(old.weight.device)
    setattr(parent, name, packed)
    if tied:
        model.set_input_embeddings(PackedEmbedding(packed, old.weight.dtype))


def bytes_by_form(model: PreTrainedModel) -> dict[str, int]:
    """What a model's weights take up: bytes of "int4", "int8", "bfloat16" ..., each storage counted once."""
    forms = {m.packed.data_ptr(): m.form for m in model.modules() if isinstance(m, PackedLinear)}
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        form = forms.get(parameter.data_ptr(), str(parameter.dtype).removeprefix("torch."))
        sizes[form] = sizes.get(form, 0) + storage.nbytes()
    return sizes


def describe(model: PreTrainedModel) -> str:
    """`int4 66.4 MB, int8 30.1 MB, bfloat16 0.1 MB`."""
    return ", ".join(f"{form} {size / 1e6:.1f} MB" for form, size in bytes_by_form(model).items())
