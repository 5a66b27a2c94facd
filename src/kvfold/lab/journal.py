"""Results folders that survive interruptions: one setting, and lines of JSON that are on disk as soon as they are written.

A folder holds one setting, in setting.json. Results of another setting are refused, never mixed or overwritten.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvfold.errors import FileError
from kvfold.files import explain, replacing

SETTING = "setting.json"

T = TypeVar("T")


def open_folder(folder: Path, setting: dict[str, Any], log: Path) -> None:
    """Writes the folder's setting, or compares it with the one that is there, and drops half a line at the log's end.

    FileError: not writable, damaged, another setting, or a log without a setting.
    """
    known = folder / SETTING
    if known.exists():
        _check_same(_load(known), setting, folder)
    elif log.exists():
        raise FileError(f"{log} has no {SETTING} beside it: choose another --out")
    else:
        with replacing(known) as temporary:
            temporary.write_text(json.dumps(setting, indent=2) + "\n", encoding="utf-8")
    _drop_torn_line(log)


def put_aside(folder: Path) -> None:
    """Renames an older results folder to the first free of folder.1, folder.2 …"""
    if not (folder / SETTING).exists():
        return
    number = 1
    while (older := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(older)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Appends a line of JSON, and returns when it is on disk. FileError when the disk is full; what is there stays as it is."""
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain(error, path) from error


def read_lines(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `make` makes of each line; an unfinished last one is left out. FileError when another line can't be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise explain(error, path, "read") from error
    made = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            made.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            raise FileError(f"{path}, line {number}, is damaged: remove that line to measure it again") from None
    return made


def _drop_torn_line(path: Path) -> None:
    """A process that was killed, or a full disk, can leave half a line at the end."""
    if not path.exists():
        return
    try:
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    except OSError as error:
        raise explain(error, path) from error


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    # through JSON, so that both sides have its types
    new = json.loads(json.dumps(new))
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        what = ", ".join(_difference(name, old.get(name), new[name]) for name in different[:3])
        raise FileError(
            f"{folder} holds measurements of another setting ({what}): choose another --out, or add --again to put them aside"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if name in ("code", "text_sha256", "machine"):
        return {"code": "kvfold's code has changed", "text_sha256": "other text", "machine": "another machine"}[name]
    if isinstance(old, dict) and isinstance(new, dict):
        name, old, new = next((k, old.get(k), new[k]) for k in new if old.get(k) != new[k])
    return f"{name}: {old}, now {new}"


def _load(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain(error, path, "read") from error
    except ValueError:
        raise FileError(f"{path} is damaged: choose another --out") from None
    return values
