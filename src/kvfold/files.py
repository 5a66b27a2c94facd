"""Writing files so that an interruption or a full disk leaves the old file or none, never half of one."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfold.errors import FileError


def explain(error: OSError, path: Path, doing: str = "write") -> FileError:
    """The one line for an OSError at `path`: what is wrong, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError(f"can't {doing} {path}: the disk is full; free some space or choose another place")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(f"can't {doing} {path}: no permission; choose another place or change its permissions")
    if error.errno == errno.ENOENT:
        return FileError(f"can't {doing} {path}: no such file or folder")
    if error.errno == errno.EISDIR:
        return FileError(f"can't {doing} {path}: it is a folder; name a file")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return FileError(f"can't {doing} {path}: a part of this path is a file, not a folder")
    return FileError(f"can't {doing} {path}: {error.strerror or error}")


def make_folder(path: Path) -> Path:
    """Makes a folder (and those above it) that can be written to. FileError when that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise explain(error, path, "write to") from error


def cache_folder() -> Path:
    """Where fetched files are kept: KVFOLD_CACHE, else kvfold in XDG_CACHE_HOME, else ~/.cache/kvfold. It need not exist."""
    if folder := os.environ.get("KVFOLD_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvfold"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the place of `path` when the block ends well, and is removed otherwise.

    FileError when the folder can't be written to or the disk is full.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except FileError:
        raise
    except OSError as error:
        raise explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The mask that new files get; mkstemp leaves it out and makes files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
