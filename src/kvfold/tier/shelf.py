"""Places for blocks, each as a growing array: in the memory of a device or the host, or in a file."""

import os
import tempfile
import weakref
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from kvfold.errors import FileError
from kvfold.files import explain
from kvfold.pool import resized
from kvfold.store.base import Fields

_GROWTH = 64


class Shelf(ABC):
    """Where blocks lie. A place is an index; a block is an entry of every field."""

    def __init__(self) -> None:
        self.capacity = 0
        self._free: list[int] = []

    @abstractmethod
    def put(self, blocks: Fields) -> torch.Tensor:
        """Takes blocks `[n, *]` in; returns their places, `[n] long` on the CPU."""

    @abstractmethod
    def get(self, places: torch.Tensor, out: Fields) -> None:
        """Copies the blocks at `places [n]` into `out`, tensors `[n, *]` on the shelf's device, the disk's being the CPU."""

    def free(self, places: torch.Tensor) -> None:
        """Gives places back; what lies there is lost."""
        self._free.extend(places.tolist())

    def _take(self, num: int) -> torch.Tensor:
        short = num - len(self._free)
        if short > 0:
            self._grow(self.capacity + max(short, self.capacity // _GROWTH))
        taken, self._free = self._free[:num], self._free[num:]
        return torch.tensor(taken, dtype=torch.long)

    def _grow(self, capacity: int) -> None:
        self._free.extend(range(self.capacity, capacity))
        self.capacity = capacity


class MemoryShelf(Shelf):
    """Tensors `[capacity, *]` on a device; pinned where another device reads them from the host's memory."""

    def __init__(self, device: torch.device, *, pinned: bool = False):
        super().__init__()
        self.device, self._pinned = device, pinned
        self.fields: Fields = {}

    def ensure(self, blocks: Fields) -> None:
        """Makes the tensors, when it is known what blocks are made of: one or more of them, `[n, *]`."""
        for name, x in blocks.items():
            if name not in self.fields:
                self.fields[name] = self._own(torch.zeros(self.capacity, *x.shape[1:], dtype=x.dtype, device=self.device))

    def put(self, blocks: Fields) -> torch.Tensor:
        self.ensure(blocks)
        places = self._take(next(iter(blocks.values())).shape[0])
        self.set(places, blocks)
        return places

    def set(self, places: torch.Tensor, blocks: Fields) -> None:
        """Writes blocks to places that have been taken."""
        places = places.to(self.device)
        for name, x in blocks.items():
            self.fields[name][places] = x.to(self.device)

    def take(self, num: int) -> torch.Tensor:
        """Places for `num` blocks, on the CPU."""
        return self._take(num)

    def get(self, places: torch.Tensor, out: Fields) -> None:
        places = places.to(self.device)
        for name, x in out.items():
            torch.index_select(self.fields[name], 0, places, out=x)

    def compact(self, idle: float) -> torch.Tensor | None:
        """Gives free memory back when more than the share `idle` is; returns the new place of every old one, or None."""
        if len(self._free) <= int(self.capacity * idle):
            return None
        used = torch.ones(self.capacity, dtype=torch.bool)
        used[torch.tensor(self._free, dtype=torch.long)] = False
        places = torch.nonzero(used).flatten()
        moved = torch.full((self.capacity,), -1, dtype=torch.long)
        moved[places] = torch.arange(len(places))
        for name, x in self.fields.items():  # in place: a pool knows this dict
            self.fields[name] = self._own(x[places.to(self.device)])
        self.capacity, self._free = len(places), []
        return moved

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        for name, x in self.fields.items():
            self.fields[name] = self._own(resized(x, capacity))

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory() if self._pinned and x.numel() else x


class DiskShelf(Shelf):
    """A file of records, one a block, with a checksum of each in memory. The file goes when the shelf does.

    It lies in a folder of its own below the system's folder for temporary files (TMPDIR). A record that is not as it was
    written raises FileError, which names the file.
    """

    def __init__(self, name: str):
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="kvfold-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name) / name
        self._record = 0
        self.checksums = torch.zeros(0, dtype=torch.long)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise explain(error, self.path, "write") from error
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def put(self, blocks: Fields) -> torch.Tensor:
        records = _records(blocks)
        num, self._record = records.shape
        places = self._take(num)
        for place, record in zip(places.tolist(), records, strict=True):
            content = memoryview(record.numpy())
            self.checksums[place] = zlib.crc32(content)
            try:
                written = os.pwrite(self._file, content, place * self._record)
            except OSError as error:
                raise explain(error, self.path, "write") from error
            if written != self._record:
                raise FileError(
                    f"can't write {self.path}: the disk is full; reset the cache, or give the tiers above more room"
                )
        return places

    def get(self, places: torch.Tensor, out: Fields) -> None:
        records = torch.empty(len(places), self._record, dtype=torch.uint8)
        self._check_there()
        for record, place in zip(records, places.tolist(), strict=True):
            content = memoryview(record.numpy())
            if os.preadv(self._file, [content], place * self._record) != self._record:
                raise self._damaged(f"it ends before block {place}")
            if zlib.crc32(content) != int(self.checksums[place]):
                raise self._damaged(f"the checksum of block {place} does not fit")
        at = 0
        for name in sorted(out):
            mine = out[name].view(len(places), -1).view(torch.uint8)
            mine.copy_(records[:, at : at + mine.shape[1]])
            at += mine.shape[1]

    def _check_there(self) -> None:
        """An open file outlives its name; but one whose name is gone is one that somebody has removed."""
        try:
            there = self.path.stat()
        except OSError as error:
            raise self._damaged("it has been removed") from error
        if there.st_ino != os.fstat(self._file).st_ino:
            raise self._damaged("another file is in its place")

    def _damaged(self, why: str) -> FileError:
        return FileError(
            f"{self.path}, which holds a part of the cache, is damaged ({why}): reset the cache and read the text again"
        )

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        self.checksums = resized(self.checksums, capacity)


def _records(blocks: Fields) -> torch.Tensor:
    """`[n, bytes] uint8` on the CPU: the fields of a block behind each other, by name."""
    num = next(iter(blocks.values())).shape[0]
    rows = [blocks[name].cpu().contiguous().view(num, -1).view(torch.uint8) for name in sorted(blocks)]
    return torch.cat(rows, 1).contiguous()
