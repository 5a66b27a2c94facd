"""Which kernel attends: the compiled one where it can, plain torch elsewhere, and `kernel_name` says which.

The compiled kernels take segments on the CPU whose codec they know (kvfold.kernels.cpu). All others run on the reference:
other devices, a codec that is new, double precision, or an installation without a compiler. KVFOLD_CPU chooses by hand; what
it asks for and can't have is an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvfold.attention import reference
from kvfold.attention.reference import Partial, Query, Tile, merge
from kvfold.kernels import cpu
from kvfold.kernels.cpu import encode as cpu_encode
from kvfold.store.base import Fields, KVCodec, TensorCodec, join

REFERENCE = "torch-reference"


@dataclass(frozen=True)
class Located:
    """Where a segment lies in memory, for the compiled kernels.

    Attributes:
        starts, lengths: the first slot and the tokens of each row, where rows are contiguous; empty elsewhere.
    """

    descriptor: cpu.Descriptor
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
    known = device == "cpu" and (codec is None or cpu.supports(codec))
    chosen = cpu.chosen() if known else None
    return f"cpu-{chosen}" if chosen else REFERENCE


def attend(looks: Sequence[tuple[Attended, Query]]) -> Partial:
    """Attention over several segments together; their queries differ in q and first_visible only."""
    located: list[tuple[Located, Query]] = []
    partials: list[Partial] = []
    compiled = _compiled(looks[0][1])
    for segment, query in looks:
        if compiled and (place := segment.locate(query.q.shape[-1])):
            located.append((place, query))
        else:
            partials.append(reference.attend(query, segment.codec, segment.tiles()))
    if located:
        first = located[0][1]
        given = [_look(place, query) for place, query in located]
        partials.append(Partial(*cpu.attend(given, first.slots, first.num_groups, first.softcap)))
    return merge(partials)


def mass(segment: Attended, query: Query, lse: torch.Tensor) -> torch.Tensor:
    """`[R, G, N]`: see `kvfold.attention.reference.mass`."""
    if _compiled(query) and (place := segment.locate(query.q.shape[-1])):
        return cpu.mass(_look(place, query), query.slots, query.num_groups, query.softcap, lse, segment.width)
    return reference.mass(query, segment.codec, segment.tiles(), lse)


def encoder_name(codec: KVCodec, device: str = "cpu") -> str:
    """What quantizes and packs: the compiled kernels where they know both codecs."""
    known = all(_encodes(side, device) for side in (codec.k, codec.v))
    return f"cpu-{cpu.chosen()}" if known else REFERENCE


def encode(codec: KVCodec, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None) -> Fields:
    """`KVCodec.encode`, compiled where that can be: the same fields, bit for bit."""
    if codec.positional:
        return codec.encode(k, v, positions)
    return join("k", _encode(codec.k, k)) | join("v", _encode(codec.v, v))


def _encode(codec: TensorCodec, x: torch.Tensor) -> Fields:
    return cpu_encode.encode(codec, x) if _encodes(codec, x.device.type) and x.numel() else codec.encode(x)


def _encodes(codec: TensorCodec, device: str) -> bool:
    return device == "cpu" and cpu.chosen() is not None and cpu_encode.encodes(codec)


def _compiled(query: Query) -> bool:
    return query.q.device.type == "cpu" and cpu.chosen() is not None


def _look(place: Located, query: Query) -> cpu.Look:
    first = None if query.first_visible is None else query.first_visible.contiguous()
    return cpu.Look(place.descriptor, query.q.contiguous(), first, place.starts, place.lengths)
