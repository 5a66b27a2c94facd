"""Plans answer questions, the full cache before all others, and are compared with it on each.

Items come first and plans within: the full cache's predictions for an item's answer are held only as long as the other plans
answer it. Each answer is on disk as soon as it is there; what is there is not asked again.
"""

import contextlib
import io
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from lm_eval.api.instance import Instance

from kvfold.errors import KvfoldError
from kvfold.lab import setting as facts
from kvfold.lab.eval.evaluation import Evaluation, EvalUpdate
from kvfold.lab.eval.harness import KvfoldLM
from kvfold.lab.eval.items import Item, Items
from kvfold.lab.eval.reference import Comparison, Reference
from kvfold.lab.eval.scores import FULL
from kvfold.lab.eval.tasks import EvalTask

ANSWER_TOKENS = 64
"""How many of the tokens that the full cache generates plans are compared on."""

_DECODE_WORK, _STREAM_WORK = 40, 4
"""A generated token, and one of a text that is streamed, cost about as much as reading so many; only the time left is estimated
with them."""

Watch = Callable[[torch.Tensor], None]
"""Gets the distributions over scored tokens as they come, `[n, V] float32`."""


@dataclass(frozen=True)
class Question:
    """One item of a task: its requests to the model, a hash of them, and how much work an answer is."""

    task: EvalTask
    doc_id: int
    requests: list[Instance]
    prompt: str
    work: float


def build_questions(evaluation: Evaluation, tasks: Sequence[EvalTask], lm: KvfoldLM) -> list[Question]:
    """All questions of all tasks, each known to fit the model."""
    questions: list[Question] = []
    for task in tasks:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar asks nobody
                task.task.build_all_requests(
                    limit=evaluation.tasks[task.asked],
                    apply_chat_template=evaluation.chat_template,
                    chat_template=lm.apply_chat_template if evaluation.chat_template else None,
                    tokenizer_name=lm.tokenizer_name,
                )
            questions += [_question(task, doc_id, requests, lm) for doc_id, requests in task.items().items()]
        except KvfoldError as error:
            raise KvfoldError(f"{task.name}: {error}") from error
    return questions


def _question(task: EvalTask, doc_id: int, requests: list[Instance], lm: KvfoldLM) -> Question:
    lengths = [lm.lengths_of(request) for request in requests]
    reading = _STREAM_WORK if requests[0].request_type == "loglikelihood_rolling" else 1
    work = reading * max(num_read for num_read, _ in lengths) + _DECODE_WORK * sum(num_new for _, num_new in lengths)
    arguments = [[request.request_type, *request.args] for request in requests]
    return Question(task, doc_id, requests, facts.digest(json.dumps(arguments, default=str)), work)


class Asking:
    """One run over all questions."""

    def __init__(
        self,
        evaluation: Evaluation,
        models: Mapping[str, KvfoldLM],
        items: Items,
        questions: Sequence[Question],
        on_update: Callable[[EvalUpdate], None],
    ) -> None:
        self.evaluation, self.models, self.items, self.questions = evaluation, models, items, questions
        self.on_update = on_update
        self.failures: dict[str, str] = {}
        self.pace = _Pace()
        for q in questions:
            self.pace.add(q.task.name, q.work * len(self._open_plans([q])))

    def run(self) -> dict[str, str]:
        self.on_update(EvalUpdate(0.0, None, ""))
        for questions in self._blocks():
            open_plans = self._open_plans(questions)
            if not open_plans:
                continue
            references: dict[int, Reference] | None = {} if self.evaluation.divergence else None
            for plan in (FULL, *(plan for plan in self.models if plan != FULL)):
                needed = plan in open_plans or (plan == FULL and references is not None and open_plans != [FULL])
                if needed and plan not in self.failures:
                    self._guarded(plan, questions, references)
                    self.models[plan].answerer.forget()
        return self.failures

    def _blocks(self) -> Iterator[list[Question]]:
        """Questions of one task that are generated from at once; one where nothing is generated."""
        for _, group in itertools.groupby(self.questions, key=lambda question: question.task.name):
            rest = list(group)
            generates = any(request.request_type == "generate_until" for request in rest[0].requests)
            size = self.evaluation.batch_size if generates else 1
            while rest:
                yield rest[:size]
                rest = rest[size:]

    def _open_plans(self, questions: Sequence[Question]) -> list[str]:
        """The plans that have not answered all of the questions."""
        return [
            plan
            for plan in self.models
            if any(self.items.get(q.task.name, q.doc_id, q.prompt, plan) is None for q in questions)
        ]

    def _guarded(self, plan: str, questions: Sequence[Question], references: dict[int, Reference] | None) -> None:
        """A plan that can't serve a question is left out from then on; without the full cache nothing goes on."""
        try:
            self._answer(plan, questions, references)
        except KvfoldError as error:
            if plan == FULL:
                raise
            self.failures[plan] = str(error)

    def _answer(self, plan: str, questions: Sequence[Question], references: dict[int, Reference] | None) -> None:
        lm = self.models[plan]
        known = [self.items.get(q.task.name, q.doc_id, q.prompt, plan) for q in questions]
        texts: dict[int, tuple[list[str], list[list[int]]]] = {}
        seconds = 0.0
        if any(item is None for item in known):
            start = time.perf_counter()
            texts = self._generate(lm, questions)
            seconds = (time.perf_counter() - start) / len(questions)
        for question, item in zip(questions, known, strict=True):
            if item is None:
                item = self._item(plan, question, texts[question.doc_id], seconds, references)
                self.items.add(item)
                self._report(question, item)
            elif plan == FULL and references is not None:  # its predictions are needed once more
                references[question.doc_id] = Reference()
                self._responses(lm, question, [], references[question.doc_id].add)
                self._after_generated(lm, question, item.answer_tokens, references[question.doc_id].add)

    def _generate(self, lm: KvfoldLM, questions: Sequence[Question]) -> dict[int, tuple[list[str], list[list[int]]]]:
        """Generated texts of each question, as one batch, and their tokens; repeats one after the other."""
        requests = [
            r for q in questions for r in q.requests if r.request_type == "generate_until" for _ in range(r.repeats or 1)
        ]
        texts = lm.generate_until(requests) if requests else []
        tokens = lm.generated if requests else []
        found = {}
        start = 0
        for q in questions:
            num = sum(r.repeats or 1 for r in q.requests if r.request_type == "generate_until")
            found[q.doc_id] = (texts[start : start + num], tokens[start : start + num])
            start += num
        return found

    def _item(
        self,
        plan: str,
        question: Question,
        generated: tuple[list[str], list[list[int]]],
        seconds: float,
        references: dict[int, Reference] | None,
    ) -> Item:
        """Scores an item's remaining requests, compares, and lets the harness turn responses into metrics."""
        lm = self.models[plan]
        answer_tokens = generated[1][0][:ANSWER_TOKENS] if generated[1] and plan == FULL else None
        watch: Watch | None = None
        comparison = None
        if references is not None:
            if plan == FULL:
                references[question.doc_id] = Reference()
                watch = references[question.doc_id].add
            else:
                comparison = Comparison(references[question.doc_id])
                watch = comparison.add
        timed = _Timed(watch) if watch else None
        start = time.perf_counter()
        responses = self._responses(lm, question, generated[0], timed)
        seconds += time.perf_counter() - start - (timed.seconds if timed else 0.0)
        if watch is not None:
            full = answer_tokens if plan == FULL else self._full_tokens(question)
            self._after_generated(lm, question, full, watch)
        held = lm.answerer.largest
        assert held is not None
        num_tokens = sum(len(block) for block in references[question.doc_id].blocks) if references else 0
        exact = plan == FULL and references is not None
        return Item(
            task=question.task.name,
            doc_id=question.doc_id,
            prompt=question.prompt,
            plan=plan,
            metrics=_metrics(question, responses),
            answer=responses if len(responses) > 1 else responses[0],
            target=str(question.task.task.doc_to_target(question.requests[0].doc)),
            answer_tokens=answer_tokens,
            num_answer_tokens=num_tokens,
            kl=0.0 if exact else (comparison.kl if comparison else None),
            top1=1.0 if exact else (comparison.top1 if comparison else None),
            num_context_tokens=held.num_seen,
            kv_bytes=held.kv_bytes,
            fp16_bytes=held.fp16_bytes,
            kernel=lm.answerer.kernel,
            seconds=seconds,
            facts=dict(question.requests[0].doc.get("facts") or {}),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            git_commit=facts.git_commit(),
        )

    def _responses(self, lm: KvfoldLM, question: Question, texts: list[str], watch: Watch | None) -> list[Any]:
        """The model's response to each request, in order; generated texts are given."""
        lm.on_log_probs = watch
        scored = [r for r in question.requests if r.request_type == "loglikelihood"]
        pairs = iter(lm.loglikelihood(scored, disable_tqdm=True) if scored else [])
        rest = iter(texts)
        responses: list[Any] = []
        for request in question.requests:
            if request.request_type == "loglikelihood":
                responses.append(next(pairs))
            elif request.request_type == "loglikelihood_rolling":
                responses += lm.loglikelihood_rolling([request])
            elif texts:
                repeats = [next(rest) for _ in range(request.repeats or 1)]
                responses.append(repeats if len(repeats) > 1 else repeats[0])
        lm.on_log_probs = None
        return responses

    def _after_generated(self, lm: KvfoldLM, question: Question, tokens: list[int] | None, watch: Watch) -> None:
        """Reads what the full cache generated, so that its distributions can be compared."""
        if not tokens:
            return
        request = next(r for r in question.requests if r.request_type == "generate_until")
        lm.on_log_probs = watch
        lm.score_after(request.args[0], lm.lengths_of(request)[1], tokens)
        lm.on_log_probs = None

    def _full_tokens(self, question: Question) -> list[int] | None:
        item = self.items.get(question.task.name, question.doc_id, question.prompt, FULL)
        return item.answer_tokens if item else None

    def _report(self, question: Question, item: Item) -> None:
        share, left = self.pace.after(question.task.name, question.work)
        metric, value = next(iter(item.metrics.items()))
        shown = f"{value:g}" if isinstance(value, int | float) else ""
        text = f"{item.task} #{item.doc_id} {item.plan}: {metric.removesuffix(',none')} {shown} {item.seconds:.1f} s"
        values = {
            "task": item.task,
            "doc_id": item.doc_id,
            "plan": item.plan,
            "metric": metric,
            "value": value if isinstance(value, int | float) else None,
            **{name: getattr(item, name) for name in ("kl", "top1", "kv_bytes", "num_context_tokens", "seconds")},
        }
        self.on_update(EvalUpdate(share, left, " ".join(text.split()), values))


class _Pace:
    """How far a run is. Tasks differ in how long their work takes, so each is held to its own pace once it has one."""

    def __init__(self) -> None:
        self.work: dict[str, float] = defaultdict(float)
        self.done: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = self.last = time.monotonic()

    def add(self, task: str, work: float) -> None:
        self.work[task] += work

    def after(self, task: str, work: float) -> tuple[float, float]:
        """The share of the time that has gone by when an answer has just been given, and the seconds that are left."""
        now = time.monotonic()
        self.done[task] += work
        self.seconds[task] += now - self.last
        self.last = now
        usual = sum(self.seconds.values()) / sum(self.done.values())
        paces = {name: self.seconds[name] / done if (done := self.done[name]) else usual for name in self.work}
        left = sum(paces[name] * max(0.0, all_of_it - self.done[name]) for name, all_of_it in self.work.items())
        elapsed = now - self.start
        return elapsed / (elapsed + left) if elapsed + left else 1.0, left


class _Timed:
    """A watch that knows how long it took, so that comparing does not count as answering."""

    def __init__(self, watch: Watch):
        self.watch, self.seconds = watch, 0.0

    def __call__(self, log_probs: torch.Tensor) -> None:
        start = time.perf_counter()
        self.watch(log_probs)
        self.seconds += time.perf_counter() - start


def _metrics(question: Question, responses: Sequence[Any]) -> dict[str, Any]:
    """'metric,filter' to the item's value, by the harness' own filters and metrics."""
    task, requests = question.task.task, question.requests
    for request, response in zip(requests, responses, strict=True):
        request.resps = list(response) if (request.repeats or 1) > 1 else [response]
        request.filtered_resps = {}
    task._instances = requests
    task.apply_filters()
    metrics: dict[str, Any] = {}
    for name in requests[0].filtered_resps:
        values = task.process_results(requests[0].doc, [request.filtered_resps[name] for request in requests])
        metrics |= {f"{metric},{name}": _plain(value) for metric, value in values.items()}
    return metrics


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy's and torch's numbers become Python's."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value
