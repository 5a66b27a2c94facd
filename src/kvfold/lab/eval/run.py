"""`kvfold eval`: tasks × items × plans, from a model's name to scores in a folder."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import lm_eval
import torch

from kvfold.files import make_folder
from kvfold.lab import setting as facts
from kvfold.lab.eval.asking import Asking, Question, build_questions
from kvfold.lab.eval.evaluation import Evaluation, EvalUpdate
from kvfold.lab.eval.harness import KvfoldLM
from kvfold.lab.eval.items import EvalSetting, Items
from kvfold.lab.eval.local_tasks import Making
from kvfold.lab.eval.scores import FULL, Score, TaskFacts, read_scores, scores_of, write_scores
from kvfold.lab.eval.tasks import make
from kvfold.lab.journal import put_aside
from kvfold.models.load import load, source_of


@dataclass(frozen=True)
class Outcome:
    """What a run left: the folder's scores, and the plans that could not go on, with the reason."""

    scores: list[Score]
    failures: dict[str, str]


def run(evaluation: Evaluation, on_update: Callable[[EvalUpdate], None] = lambda _: None) -> Outcome:
    """Answers what is not answered yet, and writes items and scores.

    Raises:
        KvfoldError: bad input, no network, a damaged file, a context beyond the model's; what has been answered stays on disk.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if evaluation.threads:
        torch.set_num_threads(evaluation.threads)
    model, tokenizer = load(evaluation.model, dtype=evaluation.dtype, device=evaluation.device)
    plans = {FULL: FULL} | {plan: name for name, plan in evaluation.plans.items()}
    models = {
        plan: KvfoldLM(
            model,
            plan,
            tokenizer=tokenizer,
            batch_size=evaluation.batch_size,
            chunk=evaluation.chunk,
            answer_chunk=evaluation.answer_chunk,
            truncate=evaluation.truncate,
            seed=evaluation.seed,
        )
        for plan in plans
    }
    tasks = make(list(evaluation.tasks), Making(tokenizer, evaluation.lengths, evaluation.seed))
    questions = build_questions(evaluation, tasks, models[FULL])
    if evaluation.again:  # not before all input is known to be good
        put_aside(evaluation.out)
    setting = _setting(evaluation, source_of(model))
    items = Items(make_folder(evaluation.out), setting)
    failures: dict[str, str] = {}
    try:
        failures = Asking(evaluation, models, items, questions, on_update).run()
    finally:
        scores = _scored(evaluation.out, items, questions, plans, setting)
    return Outcome(scores, {plans[plan]: why for plan, why in failures.items()})


def _scored(
    folder: Path, items: Items, questions: Sequence[Question], plans: Mapping[str, str], setting: EvalSetting
) -> list[Score]:
    """Scores of the tasks of this run, and those of other tasks that the folder held before."""
    scores: list[Score] = []
    for _, group in itertools.groupby(questions, key=lambda question: question.task.name):
        asked = list(group)
        task = asked[0].task
        found = {plan: items.of(task.name, plan, [(q.doc_id, q.prompt) for q in asked]) for plan in plans}
        answered = [{item.doc_id for item in own} for own in found.values() if own]
        common = set.intersection(*answered) if answered else set()
        paired = {plan: [item for item in own if item.doc_id in common] for plan, own in found.items()}
        known = TaskFacts(task.name, task.version, task.local, task.task.aggregation(), task.task.higher_is_better())
        scores += scores_of(known, paired, plans, setting)
    now = {score.task for score in scores}
    scores = [score for score in read_scores(folder) if score.task not in now] + scores
    if scores:
        write_scores(folder, scores)
    return scores


def _setting(evaluation: Evaluation, source: str) -> EvalSetting:
    return EvalSetting(
        model=evaluation.model,
        model_source=source,
        dtype=evaluation.dtype,
        device=evaluation.device,
        threads=evaluation.threads or torch.get_num_threads(),
        seed=evaluation.seed,
        chunk=evaluation.chunk,
        answer_chunk=evaluation.answer_chunk,
        batch_size=evaluation.batch_size,
        chat_template=evaluation.chat_template,
        truncate=evaluation.truncate,
        lengths=evaluation.lengths,
        versions=facts.versions() | {"lm_eval": lm_eval.__version__, "datasets": datasets.__version__},
        code=facts.code_hash(),
        machine=facts.machine(evaluation.device),
    )
