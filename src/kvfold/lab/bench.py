"""Strategies × contexts × batch sizes: bytes, speed and quality of each, on the same model and text.

Speed is measured in rounds: each round measures every cell once, in an order that the seed shuffles, so that a machine that
warms up or is busy for a while does not favour one strategy. Quality is measured in one process for each context, which holds
the predictions of the full cache. Every measurement is on disk as soon as it is made; what is there is not measured again.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.catalog import STRATEGIES, resolve
from kvfold.errors import KvfoldError, PlanError
from kvfold.files import make_folder
from kvfold.lab import setting as facts
from kvfold.lab.journal import put_aside
from kvfold.lab.merge import merge
from kvfold.lab.passages import Passages
from kvfold.lab.quality import rouge_l
from kvfold.lab.results import Cell, Journal, Measurement, Record, Setting, write_records
from kvfold.lab.worker import HOW, Event, Job, Worker
from kvfold.models.adapter import check_model
from kvfold.models.load import load, source_of
from kvfold.models.weights import describe

LEAST_CONTEXT = 16


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    Attributes:
        plans: names in tables and the texts of their plans.
        model, weights: what `kvfold.load` takes.
        contexts: tokens of each sequence before generation.
        new_tokens: decode steps, and tokens of the continuation.
        text: a file, or None for Wikipedia articles.
        repeats: rounds of speed measurements.
        out: the results folder.
        chunk: tokens prefilled at a time.
        quality_chunk: tokens streamed at a time.
        again: puts an older results folder aside instead of going on with it.
    """

    plans: dict[str, str]
    model: str
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    new_tokens: int
    text: Path | None
    repeats: int
    out: Path
    seed: int
    dtype: str
    device: str
    threads: int | None
    timing: bool = True
    quality: bool = True
    chunk: int = 512
    quality_chunk: int = 32
    quality_dtype: str = "float32"
    weights: str = "dense"
    again: bool = False


@dataclass(frozen=True)
class Update:
    """How far a run is: `done` of `total` measurements of a kind; `text` when one has ended."""

    kind: str
    done: float
    total: int
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a run left: its records, those of earlier runs in the same folder among them, and what could not be measured."""

    records: list[Record]
    failures: dict[str, str]


def named_plans(words: Sequence[str]) -> dict[str, str]:
    """Names and plans of what was asked for: strategies, plans, 'demo' or 'all'. PlanError when a word is none of them."""
    named: dict[str, str] = {}
    for word in words:
        if word in ("demo", "all"):
            named |= {s.name: str(resolve(s.name)) for s in STRATEGIES.values() if s.demo or word == "all"}
        else:
            plan = resolve(word)
            named[word.strip() if word.strip() in STRATEGIES else str(plan)] = str(plan)
    if not named:
        raise PlanError("nothing to measure: name strategies or plans, or 'demo' ('kvfold strategies' lists all)")
    return named


def run(bench: Bench, on_update: Callable[[Update], None] = lambda _: None) -> Outcome:
    """Measures what is not measured yet, and writes the records.

    Raises:
        KvfoldError: bad input, or the results folder can't be written; what has been measured stays on disk.
    """
    _check(bench)
    if bench.again:
        put_aside(bench.out)
    make_folder(bench.out)
    with Worker() as worker:  # starts importing while this process loads the model
        model, tokenizer = load(bench.model, dtype=bench.dtype, device=bench.device, weights=bench.weights)
        check_model(model)
        passages = Passages.read(bench.text, tokenizer, _needed(bench))
        passages.check(bench.contexts, bench.new_tokens, model)
        journal = Journal(bench.out, _setting(bench, model, passages))
        del model
        failures = _Measuring(bench, worker, journal, passages, on_update).run()
    records = merge(journal.measurements, journal.setting, bench.plans)
    write_records(bench.out, records)
    return Outcome(records, failures)


class _Measuring:
    """One run over all cells."""

    def __init__(
        self, bench: Bench, worker: Worker, journal: Journal, passages: Passages, on_update: Callable[[Update], None]
    ) -> None:
        self.bench, self.worker, self.journal, self.passages, self.on_update = bench, worker, journal, passages, on_update
        self.names = {plan: name for name, plan in bench.plans.items()}
        self.failures: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        if self.bench.timing:
            self._timing()
        if self.bench.quality:
            self._quality()
        return self.failures

    # -- speed and bytes -----------------------------------------------------------------------------------------------------

    def _timing(self) -> None:
        cells = list(self._timing_cells())
        done = self.journal.done()
        num_done = len([c for c in cells if c in done])
        self.on_update(Update("timing", num_done, len(cells)))
        for cell in cells:
            if cell in done:
                continue
            name = self.names[cell.plan]
            num_done += 1
            if name in self.failures:
                self.on_update(Update("timing", num_done, len(cells)))
                continue
            rows = self.passages.rows(cell.context, cell.batch)
            text = ""
            for event in self.worker.run(self._job("timing", (cell.plan,), rows, self.bench.dtype, self.bench.chunk)):
                text = self._take(cell, event) or text
            self.on_update(Update("timing", num_done, len(cells), text))

    def _timing_cells(self) -> Iterator[Cell]:
        for repeat in range(self.bench.repeats):
            one_round = [
                Cell("timing", plan, context, batch, repeat)
                for plan in self.bench.plans.values()
                for context in self.bench.contexts
                for batch in self.bench.batch_sizes
            ]
            random.Random(f"{self.bench.seed}, {repeat}").shuffle(one_round)
            yield from one_round

    # -- quality -------------------------------------------------------------------------------------------------------------

    def _quality(self) -> None:
        done = self.journal.done()
        plans = [plan for plan in self.bench.plans.values() if self.names[plan] not in self.failures]
        open_plans = {
            context: [plan for plan in plans if Cell("quality", plan, context) not in done] for context in self.bench.contexts
        }
        total = len(plans) * len(self.bench.contexts)
        num_done = total - sum(map(len, open_plans.values()))
        self.on_update(Update("quality", num_done, total))
        for context, left in open_plans.items():
            if left:
                self._quality_at(context, left, num_done, total)
                num_done += len(left)

    def _quality_at(self, context: int, plans: list[str], num_done: int, total: int) -> None:
        """One process for all plans at one context length; the reference counts as a part of the first."""
        text = self.passages.rows(context, 1)
        job = self._job("quality", tuple(plans), text, self.bench.quality_dtype, self.bench.quality_chunk, context // 2)
        for event in self.worker.run(job):
            if event.kind == "progress":
                share = event.share / 2 if plans.index(event.plan or plans[0]) == 0 else event.share
                if event.plan == plans[0]:
                    share += 0.5
                done = num_done + (plans.index(event.plan) if event.plan else 0) + share
                self.on_update(Update("quality", done, total))
                continue
            line = self._take(Cell("quality", event.plan, context), event)
            at = num_done + (plans.index(event.plan) + 1 if event.plan else len(plans))
            self.on_update(Update("quality", at, total, line))

    def _quality_result(self, context: int, result: dict[str, Any]) -> dict[str, Any]:
        """The fields of a Quality, with its continuation as text and compared."""
        ours = self.passages.decode(result.pop("continuation"))
        full = self.passages.decode(result.pop("continuation_full"))
        real = self.passages.after(context, self.bench.new_tokens)
        return {
            **result,
            "prefill_len": context // 2,
            "continuation": ours,
            "rouge_l_full": rouge_l(ours, full),
            "rouge_l_text": rouge_l(ours, real),
        }

    # -- both ----------------------------------------------------------------------------------------------------------------

    def _job(
        self, kind: str, plans: tuple[str, ...], rows: list[list[int]], dtype: str, chunk: int, prefill_len: int = 0
    ) -> Job:
        b = self.bench
        threads = self.journal.setting.threads
        return Job(kind, b.model, dtype, b.device, threads, b.seed, plans, rows, b.new_tokens, chunk, prefill_len, b.weights)

    def _take(self, cell: Cell, event: Event) -> str:
        """Writes a result down, or remembers a failure; returns a line about it."""
        label = f"{self.names.get(cell.plan, 'quality')} at {cell.context}"
        if cell.batch > 1:
            label += f" × {cell.batch}"
        if event.kind == "failed":
            self.failures[self.names.get(cell.plan, f"{cell.kind} at {cell.context}")] = event.message
            return f"{label}: {event.message}"
        assert event.result is not None
        result = event.result
        if cell.kind == "quality":
            result = self._quality_result(cell.context, result)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.journal.add(Measurement(cell, result, date, facts.git_commit()))
        if cell.kind == "quality":
            return f"{label}: KL {result['kl']:.5f}, top-1 {100 * result['top1']:.1f} %, perplexity {result['perplexity']:.2f}"
        steps = sorted(result["token_ms"])
        return (
            f"{label}: {result['kv_bytes'] / 2**20:.1f} MiB, {result['ttft_ms']:.0f} ms, {steps[len(steps) // 2]:.1f} ms/token"
        )


def _check(bench: Bench) -> None:
    if not (bench.timing or bench.quality):
        raise KvfoldError("nothing to measure: leave out --no-timing or --no-quality")
    least = {
        "--contexts": (bench.contexts, LEAST_CONTEXT),
        "--batch-sizes": (bench.batch_sizes, 1),
        "--new-tokens": ((bench.new_tokens,), 2),
        "--repeats": ((bench.repeats,), 1),
        "--chunk": ((bench.chunk,), 1),
        "--quality-chunk": ((bench.quality_chunk,), 1),
        "--threads": ((bench.threads or 1,), 1),
    }
    for option, (values, smallest) in least.items():
        if not values or min(values) < smallest:
            raise KvfoldError(f"{option} must be {smallest} or more")


def _needed(bench: Bench) -> int:
    return max(bench.contexts) * max(bench.batch_sizes) + bench.new_tokens


def _setting(bench: Bench, model: PreTrainedModel, passages: Passages) -> Setting:
    return Setting(
        model=bench.model,
        model_source=source_of(model),
        weights=f"{bench.weights}: {describe(model)}",
        text=passages.name,
        text_sha256=hashlib.sha256(passages.text.encode()).hexdigest(),
        new_tokens=bench.new_tokens,
        chunk=bench.chunk,
        quality_chunk=bench.quality_chunk,
        quality_dtype=bench.quality_dtype,
        dtype=bench.dtype,
        device=bench.device,
        threads=bench.threads or torch.get_num_threads(),
        seed=bench.seed,
        versions=facts.versions(),
        code=facts.code_hash(),
        machine=facts.machine(bench.device),
        how=HOW,
    )
