"""What `kvfold eval` writes into a results folder.

    setting.json     what all items of the folder have in common: an `EvalSetting`
    items.jsonl      an `Item` a line, one for each question and plan, on disk as soon as it is answered
    scores.jsonl     a `Score` a line, one for each task, metric and plan (kvfold.lab.eval.scores); also .csv and .md

An interrupted run goes on from items.jsonl. A folder may grow by tasks, plans and items; its setting stays.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfold.lab.journal import append_line, open_folder, read_lines

ITEMS, SCORES = "items.jsonl", "scores.jsonl"


@dataclass(frozen=True)
class EvalSetting:
    """What items must have in common to be compared.

    Attributes:
        model: as it was asked for.
        model_source: where its weights came from.
        chunk: tokens of a context read at a time.
        answer_chunk: tokens of an answer, or of streamed text, read at a time.
        batch_size: prompts that were generated from at once.
        chat_template: whether prompts went through the model's chat template.
        truncate: whether what is too long was cut from the left.
        lengths: of the contexts of tasks that are made here (needles), in tokens.
        code: a hash of kvfold's source.
    """

    model: str
    model_source: str
    dtype: str
    device: str
    threads: int
    seed: int
    chunk: int
    answer_chunk: int
    batch_size: int
    chat_template: bool
    truncate: bool
    lengths: tuple[int, ...]
    versions: dict[str, str]
    code: str
    machine: dict[str, str]


@dataclass(frozen=True)
class Item:
    """A question that a plan has answered.

    Attributes:
        task, doc_id: which question; `prompt` is a hash of its requests, so that another question is not taken for it.
        plan: the plan's text.
        metrics: 'metric,filter' to the value that the harness aggregates: a number, or a list such as (log-likelihood, words).
        answer: the generated text, or [log-likelihood, is greedy] of each choice.
        target: what the task expects.
        answer_tokens: tokens that the full cache generated, which plans are compared on; None elsewhere.
        num_answer_tokens: tokens that KL and top-1 were measured on.
        kl: mean KL(full || plan) over these tokens, in nats; None where it was not measured.
        top1: share of them with the same most probable token.
        num_context_tokens: of the longest context.
        kv_bytes: the largest cache while it was answered, everything counted, dense tokens with 16 bits, one sequence.
        fp16_bytes: K and V of its tokens in 16 bits.
        kernel: what attended to the compressed segments.
        seconds: to answer; measuring KL is left out.
        facts: of the question, such as depth and length of a needle.
    """

    task: str
    doc_id: int
    prompt: str
    plan: str
    metrics: dict[str, Any]
    answer: Any
    target: str
    answer_tokens: list[int] | None
    num_answer_tokens: int
    kl: float | None
    top1: float | None
    num_context_tokens: int
    kv_bytes: int
    fp16_bytes: int
    kernel: str
    seconds: float
    facts: dict[str, Any]
    date: str
    git_commit: str | None

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.task, self.doc_id, self.prompt, self.plan


class Items:
    """The items of a results folder, on disk as soon as they are answered."""

    def __init__(self, folder: Path, setting: EvalSetting):
        """Opens or starts the folder. FileError: not writable, damaged, or it holds items of another setting."""
        self.path = folder / ITEMS
        open_folder(folder, asdict(setting), self.path)
        self._items = {item.key: item for item in read_items(self.path)} if self.path.exists() else {}

    def add(self, item: Item) -> None:
        append_line(self.path, asdict(item))
        self._items[item.key] = item

    def get(self, task: str, doc_id: int, prompt: str, plan: str) -> Item | None:
        return self._items.get((task, doc_id, prompt, plan))

    def of(self, task: str, plan: str, prompts: Sequence[tuple[int, str]]) -> list[Item]:
        """Those of the questions `prompts` (doc_id, prompt) that the plan has answered, in that order."""
        found = [self.get(task, doc_id, prompt, plan) for doc_id, prompt in prompts]
        return [item for item in found if item is not None]


def read_items(path: Path) -> list[Item]:
    """The lines of an items.jsonl; an unfinished last line is left out. FileError when another line can't be read."""
    return read_lines(path, lambda values: Item(**values))
