"""Measurements as they are made, for those who watch: plain CSV files, or Weights & Biases.

Records and scores are made from journals (kvfold.lab.journal), never from these logs: a log may be thrown away.
"""

import csv
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvfold.errors import FileError, KvfoldError
from kvfold.files import explain

LogKind = Literal["csv", "wandb"]
Values = Mapping[str, str | float | None]
Add = Callable[[str, Values], None]


@contextmanager
def open_log(kind: LogKind | None, folder: Path, config: Mapping[str, Any]) -> Iterator[Add]:
    """A function that takes what was measured and its values; None logs nothing.

    Args:
        folder: of the results. CSV files, `log-<what>.csv`, are written into it; a run that goes on appends.
        config: what was asked for, for Weights & Biases.

    Raises:
        KvfoldError: Weights & Biases is not installed, or has not been logged in to.
        FileError: a file can't be written to, or has other columns.
    """
    if kind is None:
        yield lambda _what, _values: None
    elif kind == "csv":
        yield lambda what, values: _append(folder / f"log-{what}.csv", values)
    else:
        log = _Wandb(folder.name, config)
        try:
            yield log.add
        finally:
            log.close()


def _append(path: Path, values: Values) -> None:
    try:
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            if columns is not None and columns != list(values):
                raise FileError(f"{path} has other columns: move it away, or choose another --out")
            writer = csv.DictWriter(file, list(values))
            if columns is None:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise explain(error, path) from error


class _Wandb:
    """A run of Weights & Biases, which starts with its first values. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, name: str, config: Mapping[str, Any]):
        if importlib.util.find_spec("wandb") is None:
            raise KvfoldError("--log wandb needs Weights & Biases: pip install 'kvfold[wandb]'")
        self._name, self._config = name, {key: str(value) for key, value in config.items()}
        self._run: Any = None

    def add(self, what: str, values: Values) -> None:
        import wandb

        try:
            if self._run is None:
                settings = wandb.Settings(silent=True)
                self._run = wandb.init(project="kvfold", name=self._name, config=self._config, settings=settings)
            self._run.log({f"{what}/{key}": value for key, value in values.items() if value is not None})
        except wandb.Error as error:
            raise KvfoldError(f"Weights & Biases: {error}; set WANDB_MODE=offline, or log in with 'wandb login'") from error

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
