"""What is known of a model's keys and values before any token has come: made once from some text by `kvfold calibrate`.

It belongs to the model as its weights do, and holds nothing of any request.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvfold.errors import FileError
from kvfold.files import replacing
from kvfold.frame import Frame


@dataclass(frozen=True)
class Calibration:
    """Coordinates for every layer and KV head, the most important first, and how important they are.

    Attributes:
        k_origin, v_origin: `[L, Hkv, D] float32`, the mean key and value.
        k_basis, v_basis: `[L, Hkv, D, D] float32`: column c makes coordinate c, which has variance 1 and is uncorrelated with
            the others, in the tokens it was made of.
        k_loss, v_loss: `[L, D] float32`, by the same order: what is lost where coordinate c is left out in every token, summed
            over heads, up to a factor that all have in common.
        positions: `[1] long`, the longest context that it was made for.
    """

    k_origin: torch.Tensor
    k_basis: torch.Tensor
    k_loss: torch.Tensor
    v_origin: torch.Tensor
    v_basis: torch.Tensor
    v_loss: torch.Tensor
    positions: torch.Tensor

    def frame(self, layer: int) -> Frame:
        return Frame.of(self.k_origin[layer], self.k_basis[layer], self.v_origin[layer], self.v_basis[layer])

    def save(self, path: Path) -> None:
        """Writes it to a file. FileError when that fails."""
        with replacing(path) as temporary:
            save_file({name: x.contiguous() for name, x in asdict(self).items()}, temporary)


def load_calibration(path: Path) -> Calibration:
    """Reads what `Calibration.save` wrote. FileError when the file is missing or damaged."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise FileError(f"there is no calibration {path}") from error
    return _load(path, changed)


@functools.lru_cache(maxsize=2)
def _load(path: Path, changed: int) -> Calibration:
    try:
        return Calibration(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise FileError(f"{path} is not a calibration, or is damaged: remove it and run 'kvfold calibrate' again") from error
