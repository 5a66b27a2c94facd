"""Which kernel attends: the compiled one where it can, plain torch elsewhere, and `kernel_name` says which.

The compiled kernels take segments whose codec they know, on the CPU (kvfold.kernels.cpu) and on NVIDIA GPUs
(kvfold.kernels.triton). All others run on the reference: other devices, a codec that is new, double precision, or an
installation without a compiler or Triton. KVFOLD_CPU and KVFOLD_TRITON choose by hand; what they ask for and can't have is an
error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch

from kvfold import kernels
from kvfold.attention import reference
from kvfold.attention.reference import Partial, Query, Tile, merge
from kvfold.kernels import cpu, triton
from kvfold.kernels.cpu import encode as cpu_encode
from kvfold.store.base import Fields, KVCodec, TensorCodec, join

REFERENCE = "torch-reference"


@dataclass(frozen=True)
class Located:
    """Where a segment lies in memory, for the compiled kernels.

    Attributes:
        descriptor: what the family of kernels that serves its device made of it.
        starts, lengths: the first slot and the tokens of each row, where rows are contiguous; empty elsewhere.
    """

    descriptor: Any
    starts: Sequence[int] = ()
    lengths: Sequence[int] = ()


class Attended(Protocol):
    """What attention needs of a segment."""

    @property
    def codec(self) -> KVCodec: ...

    @property
    def width(self) -> int: ...

    def tiles(self) -> Iterator[Tile]: ...

    def locate(self, head_dim: int) -> Located | None:
        """Where it lies, or None when the compiled kernels can't read it."""


def kernel_name(codec: KVCodec | None = None, device: str = "cpu") -> str:
    """The kernel for a codec on a device ("cpu-avx512", "torch-reference"); without a codec, for those that are known."""
    family = kernels.serving(device)
    if family is None or (codec is not None and not family.supports(codec)):
        return REFERENCE
    return kernels.name(device) or REFERENCE


def attend(looks: Sequence[tuple[Attended, Query]]) -> Partial:
    """Attention over several segments together; their queries differ in q and first_visible only."""
    located: list[tuple[Located, Query]] = []
    partials: list[Partial] = []
    family = _family(looks[0][1])
    for segment, query in looks:
        if family and (place := segment.locate(query.q.shape[-1])):
            located.append((place, query))
        else:
            partials.append(reference.attend(query, segment.codec, segment.tiles()))
    if family and located:
        first = located[0][1]
        given = [_look(family, place, query) for place, query in located]
        partials.append(Partial(*family.attend(given, first.slots, first.num_groups, first.softcap, first.dtype)))
    return merge(partials)


def mass(segment: Attended, query: Query, lse: torch.Tensor) -> torch.Tensor:
    """`[R, G, N]`: see `kvfold.attention.reference.mass`."""
    if (family := _family(query)) and (place := segment.locate(query.q.shape[-1])):
        look = _look(family, place, query)
        received: torch.Tensor = family.mass(look, query.slots, query.num_groups, query.softcap, lse, segment.width)
        return received
    return reference.mass(query, segment.codec, segment.tiles(), lse)


def room_for_scores(segments: Sequence[Attended], query: Query) -> torch.Tensor | None:
    """`[R, M, N] float32` for the scores of all places of `segments`; None where attention to one of them leaves none."""
    if _family(query) is not triton or not all(segment.locate(query.q.shape[-1]) for segment in segments):
        return None
    rows, num_vectors, _ = query.q.shape
    return query.q.new_empty(rows, num_vectors, sum(segment.width for segment in segments))


def received(scores: torch.Tensor, lse: torch.Tensor, *, largest: bool) -> torch.Tensor:
    """`[R, N] float32`: the mean, or the largest, over queries of what each place received; `lse [R, M]` is of the whole."""
    return triton.received(scores, lse, largest)


def encoder_name(codec: KVCodec, device: str = "cpu") -> str:
    """What quantizes and packs: the compiled kernels where they know both codecs (on a GPU, for head dims that they take)."""
    if kernels.serving(device) is triton:
        return triton.chosen(device) or REFERENCE
    known = all(_encodes(side, device) for side in (codec.k, codec.v))
    return f"cpu-{cpu.chosen()}" if known else REFERENCE


def encode(codec: KVCodec, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None) -> Fields:
    """`KVCodec.encode`, compiled where that can be: the same fields, on a CPU bit for bit."""
    if codec.positional:
        return codec.encode(k, v, positions)
    return join("k", _encode(codec.k, codec.block, k)) | join("v", _encode(codec.v, codec.block, v))


def _encode(codec: TensorCodec, block: int, x: torch.Tensor) -> Fields:
    if kernels.serving(x.device.type) is triton and triton.encodes(codec, block, *x.shape[-2:]):
        return triton.encode(codec, x)
    return cpu_encode.encode(codec, x) if _encodes(codec, x.device.type) and x.numel() else codec.encode(x)


def _encodes(codec: TensorCodec, device: str) -> bool:
    return device == "cpu" and cpu.chosen() is not None and cpu_encode.encodes(codec)


def _family(query: Query) -> ModuleType | None:
    return kernels.serving(query.q.device.type)


def _look(family: ModuleType, place: Located, query: Query) -> Any:
    first = None if query.first_visible is None else query.first_visible.contiguous()
    look = family.Look(place.descriptor, query.q.contiguous(), first, place.starts, place.lengths)
    return look if query.scores is None else replace(look, scores=query.scores)
