"""What `kvfold bench` writes into a results folder, and how it reads it again.

    setting.json     what all measurements of the folder have in common
    raw.jsonl        every measurement as it finished, appended and flushed to disk; an interrupted run goes on from here
    records.jsonl    one record for each strategy, context and batch size, made of raw.jsonl
    records.csv, records.md

A folder holds one setting. Measurements of another setting are refused, never mixed or overwritten.
"""

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from kvfold.errors import FileError
from kvfold.files import explain, replacing
from kvfold.lab.journal import append_line, open_folder, read_lines

RAW, RECORDS = "raw.jsonl", "records.jsonl"


@dataclass(frozen=True)
class Setting:
    """What measurements must have in common to stand in one table.

    Attributes:
        model: as it was asked for.
        model_source: where its weights came from.
        text: the name of the text.
        text_sha256: of its characters.
        new_tokens: decode steps and length of the continuation.
        chunk: tokens prefilled at a time.
        quality_chunk: tokens streamed at a time.
        quality_dtype: the type that quality is measured in.
        dtype: the type that speed and bytes are measured in.
        code: a hash of kvfold's source.
        how: in what kind of process speed was measured.
        weights: the form of the weights: as it was asked for, and what it came to.
    """

    model: str
    model_source: str
    text: str
    text_sha256: str
    new_tokens: int
    chunk: int
    quality_chunk: int
    quality_dtype: str
    dtype: str
    device: str
    threads: int
    seed: int
    versions: dict[str, str]
    code: str
    machine: dict[str, str]
    how: str
    weights: str = "dense"


@dataclass(frozen=True)
class Cell:
    """One measurement: a plan at a context length, and for speed a batch size and the number of the repeat."""

    kind: str
    plan: str
    context: int
    batch: int = 1
    repeat: int = 0


@dataclass(frozen=True)
class Measurement:
    """A line of raw.jsonl: a cell, the fields of its Timing or of its quality, when, and at which commit."""

    cell: Cell
    result: dict[str, Any]
    date: str
    git_commit: str | None


@dataclass(frozen=True)
class Record:
    """A row of the results: a strategy at a context length and batch size. None stands for what was not measured.

    Attributes:
        strategy: its name in the catalog, or its plan.
        context: tokens of each sequence before generation.
        batch: sequences at once; quality is that of one sequence.
        kv_bytes: the cache after the context and the new tokens, all sequences; after the context alone without timing.
        kv_bytes_per_token: the same for each token seen.
        compression: 16-bit bytes of K and V of all seen tokens over kv_bytes.
        ttft_ms: time to first token, median over repeats.
        ms_per_token_p50: time of a decode step, over all steps and repeats; likewise p20 and p80.
        tokens_per_s: while decoding, all sequences together.
        peak_bytes: most memory in use beyond the loaded model, the largest of the repeats; how, says peak_method.
        perplexity, perplexity_full: of the plan and of the full cache on the same text.
        kl: mean KL(full || plan) in nats a token.
        top1: share of positions with the same most probable token.
        rouge_l_full, rouge_l_text: ROUGE-L of the greedy continuation against the full cache's, and against the text.
        continuation: that continuation.
        quality_prefill_len, quality_chunk, quality_dtype: how quality was streamed.
        repeats: runs that the times come from.
        step: what computed decode steps: compiled layers, a CUDA graph, or transformers.
    """

    strategy: str
    plan: str
    model: str
    model_source: str
    text: str
    text_sha256: str
    context: int
    batch: int
    new_tokens: int
    kv_bytes: int | None
    kv_bytes_per_token: float | None
    compression: float | None
    ttft_ms: float | None
    ms_per_token_p20: float | None
    ms_per_token_p50: float | None
    ms_per_token_p80: float | None
    tokens_per_s: float | None
    peak_bytes: int | None
    peak_method: str | None
    perplexity: float | None
    perplexity_full: float | None
    kl: float | None
    top1: float | None
    rouge_l_full: float | None
    rouge_l_text: float | None
    continuation: str | None
    quality_prefill_len: int | None
    quality_chunk: int
    quality_dtype: str
    kernel: str | None
    dtype: str
    device: str
    threads: int
    seed: int
    repeats: int
    chunk: int
    how: str
    versions: dict[str, str]
    code: str
    git_commit: str | None
    machine: dict[str, str]
    date: str
    weights: str = "dense"
    step: str | None = None


class Journal:
    """The measurements of a results folder, on disk as soon as they are made."""

    def __init__(self, folder: Path, setting: Setting):
        """Opens or starts the folder's journal. FileError: not writable, or it holds measurements of another setting."""
        self.path, self.setting = folder / RAW, setting
        open_folder(folder, asdict(setting), self.path)
        self.measurements = read_measurements(self.path) if self.path.exists() else []

    def add(self, measurement: Measurement) -> None:
        """Appends, and returns when it is on disk. FileError when the disk is full; what is there stays as it is."""
        append_line(self.path, asdict(measurement))
        self.measurements.append(measurement)

    def done(self) -> set[Cell]:
        return {m.cell for m in self.measurements}


def read_measurements(path: Path) -> list[Measurement]:
    """The lines of a raw.jsonl; an unfinished last line is left out. FileError when another line can't be read."""
    return read_lines(path, lambda values: Measurement(**{**values, "cell": Cell(**values["cell"])}))


def read_records(folder: Path) -> list[Record]:
    """The records of a results folder, checked field by field. FileError when there are none or one can't be read."""
    path = folder / RECORDS
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder: give one that 'kvfold bench --out' wrote")
    if not path.exists():
        raise FileError(f"{folder} holds no {RECORDS}: run 'kvfold bench … --out {folder}' first")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise explain(error, path, "read") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            raise FileError(f"{path}, line {number}, is not a record of this version of kvfold: measure again") from None
        if wrong := wrong_fields(record):
            raise FileError(f"{path}, line {number}: '{wrong[0]}' has no value of its type: measure again")
        records.append(record)
    if not records:
        raise FileError(f"{path} is empty: run 'kvfold bench … --out {folder}' first")
    return records


def wrong_fields(record: Record) -> list[str]:
    """The fields whose values are not of their declared type."""
    hints = typing.get_type_hints(Record)
    return [f.name for f in fields(record) if not _fits(getattr(record, f.name), hints[f.name])]


def write_records(folder: Path, records: Sequence[Record]) -> None:
    """Writes records.jsonl, .csv and .md, each all or nothing. FileError when that fails."""
    with replacing(folder / RECORDS) as temporary:
        temporary.write_text("".join(json.dumps(asdict(r), allow_nan=False) + "\n" for r in records), encoding="utf-8")
    write_csv(folder / "records.csv", records)
    write_markdown(folder / "records.md", records)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """All fields, one row a record; versions and machine as JSON."""
    rows = [{k: json.dumps(v) if isinstance(v, dict) else v for k, v in asdict(r).items()} for r in records]
    with replacing(path) as temporary:
        pd.DataFrame(rows, columns=[f.name for f in fields(Record)]).to_csv(temporary, index=False)


def write_markdown(path: Path, records: Sequence[Record]) -> None:
    from kvfold.lab.table import markdown

    with replacing(path) as temporary:
        temporary.write_text(markdown(records), encoding="utf-8")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is float:
            if type(value) in (int, float):
                return True
        elif type(value) is kind:
            return True
    return False
