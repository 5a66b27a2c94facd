"""`kvfold calibrate`: what `banded(calibrated=true)` needs to know of a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfold.errors import KvfoldError


def calibrate(
    model: Annotated[
        str, typer.Option(help="A short name (smollm2-135m), a hub id (owner/name), a folder or a .gguf file.")
    ] = "smollm2-135m",
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 files to read instead of eight Wikipedia articles.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens that are drawn from the model's predictions.")] = 0,
) -> None:
    """Find out how a model's keys and values are best coded; a few minutes, once for each model."""
    import kvfold
    from kvfold.files import make_folder
    from kvfold.lab import calibrate as lab
    from kvfold.lab.text import read_text
    from kvfold.models.layer import calibration_path

    loaded, tokenizer = kvfold.load(model, dtype="float32", device=device)
    if text:
        texts = [tokenizer(read_text(path), return_tensors="pt").input_ids[0, : lab.NUM_TOKENS] for path in text]
    else:
        texts = lab.default_texts(tokenizer)
    try:
        made = lab.calibrate(loaded, texts, seed, lambda share: print(f"{share:4.0%}", file=sys.stderr))
    except ValueError as error:
        raise KvfoldError(f"{error}; give longer files, or more than these") from error
    path = calibration_path(loaded)
    make_folder(path.parent)
    made.save(path)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
