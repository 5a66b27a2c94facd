"""Which tasks there are: local ones, the harness' own where the hub is reached, and sets of them with a name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from kvfold.errors import KvfoldError
from kvfold.lab.eval.local_tasks import LOCAL_TASKS, Making
from kvfold.registry import nearest

_HUB_TIMEOUT_S = 3.0

QUICK = {
    "kvfold_wikipedia_local": 4,
    "kvfold_hellaswag_local": 20,
    "kvfold_mmlu_local": 20,
    "kvfold_needle_local": 15,
    "kvfold_gsm8k_local": 3,
    "kvfold_aclsum_local": 5,
}
"""The set `quick`: tasks, and how many items of each; under 10 minutes for two plans of the default model on 2 cores."""

LONGBENCH_ENGLISH = tuple(
    f"longbench_{name}"
    for name in (
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news"),
        *("trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    )
)
"""LongBench's subsets in English and in code (Bai et al. 2023, arxiv.org/abs/2308.14508)."""


@dataclass(frozen=True)
class EvalTask:
    """A task that is ready to be asked.

    Attributes:
        asked: the name that it was asked for by: its own, or that of a group.
        task: the harness' object.
        local: whether its data is a local set, whose scores are not the official ones.
    """

    name: str
    asked: str
    task: Task
    local: bool

    @property
    def version(self) -> str:
        return str((self.task.config.metadata or {}).get("version", ""))

    def items(self) -> dict[int, list[Instance]]:
        """The requests of each item, by its number, in the task's order."""
        found: dict[int, list[Instance]] = {}
        for instance in self.task.instances:
            found.setdefault(instance.doc_id, []).append(instance)
        return {doc_id: sorted(instances, key=lambda i: i.idx) for doc_id, instances in found.items()}


def wanted(words: Sequence[str]) -> dict[str, int | None]:
    """Names of tasks and how many items of each a named set takes (None: all of them).

    Args:
        words: tasks, or the sets 'quick', 'local' (all local tasks) and 'longbench_english'.
    """
    names: dict[str, int | None] = {}
    for word in words:
        if word == "quick":
            names |= QUICK
        elif word == "local":
            names |= dict.fromkeys(LOCAL_TASKS)
        elif word == "longbench_english":
            names |= dict.fromkeys(LONGBENCH_ENGLISH)
        else:
            names[word] = None
    if not names:
        raise KvfoldError("no tasks: name some, or 'quick' ('kvfold eval --list' shows them)")
    return names


def make(names: Sequence[str], making: Making) -> list[EvalTask]:
    """The tasks of these names, each once, without requests yet.

    Raises:
        KvfoldError: a task is unknown, or needs the hub, which is not reached.
        FileError: a package is not reached, or its file is damaged.
    """
    official = [name for name in names if name not in LOCAL_TASKS]
    known = _official(official, making) if official else {}
    tasks: dict[str, EvalTask] = {}
    for name in names:
        local = name in LOCAL_TASKS
        for task in [LOCAL_TASKS[name].make(making)] if local else known[name]:
            tasks.setdefault(task.task_name, EvalTask(task.task_name, name, task, local))
    return list(tasks.values())


def _official(names: Sequence[str], making: Making) -> dict[str, list[Task]]:
    """The harness' own tasks; a group's name stands for all in it."""
    metadata = {"tokenizer": making.tokenizer.name_or_path, "max_seq_lengths": list(making.lengths)}
    manager = TaskManager(metadata=metadata)
    for name in names:
        if name not in manager.task_index:
            close = nearest(name, [*LOCAL_TASKS, *QUICK, "quick", "local", *manager.all_tasks])
            raise KvfoldError(f"unknown task '{name}'{close} ('kvfold eval --list' shows the local ones)")
    _ask_hub(names[0])
    return {name: _loaded(manager, name) for name in names}


def _loaded(manager: TaskManager, name: str) -> list[Task]:
    try:
        tasks: dict[str, Task] = manager.load(name)["tasks"]
    except Exception as error:  # data sets, networks and the task's own code raise what they like
        what: Any = str(error).strip().splitlines() or [type(error).__name__]
        raise KvfoldError(f"the task '{name}' can't be loaded: {what[0]}") from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise KvfoldError(
                f"'{name}' would run a model's code outside of kvfold's sandbox: take kvfold_humaneval_local, which has one"
            )
    return list(tasks.values())


def _ask_hub(name: str) -> None:
    """KvfoldError when the hub is not reached. With HF_HUB_OFFLINE set, what is in its cache will do."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return
    try:
        HfApi().dataset_info("openai/gsm8k", timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # whatever the network layer of the day raises
        near = next((f": take {task.name}" for task in LOCAL_TASKS.values() if task.official == name), "")
        raise KvfoldError(f"the task '{name}' takes its data from the hub, and the hub is not reached{near}") from error
