"""`kvfold eval`: what compression costs on the field's tasks."""

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli.bench import numbers
from kvfold.errors import KvfoldError

if TYPE_CHECKING:
    from kvfold.lab.eval.evaluation import EvalUpdate
    from kvfold.lab.eval.scores import Score

_SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    plans: Annotated[
        str, typer.Option(help="Strategies or plans with ';' or ',' between; the full cache is always added.")
    ] = "int8,int4",
    tasks: Annotated[
        str, typer.Option(help="'quick', 'local', or names of tasks, kvfold's or the harness', with commas.")
    ] = "quick",
    model: Annotated[
        str, typer.Option(help="A short name (smollm2-135m), a hub id (owner/name), a folder or a .gguf file.")
    ] = "smollm2-135m",
    limit: Annotated[int | None, typer.Option(help="Items of each task; all, or the set's own number, without it.")] = None,
    out: Annotated[Path, typer.Option(help="The results folder; a run that was interrupted there goes on.")] = Path(
        "results/eval"
    ),
    lengths: Annotated[str, typer.Option(help="Context lengths of the needle and RULER tasks, in tokens.")] = "512,1024,2048",
    seed: Annotated[int, typer.Option(help="Of made questions, sampling and resampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type; bfloat16's noise hides what 8 bits cost.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of torch; its own choice without it.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts to generate from at once; more than 1 pads them.")] = 1,
    chunk: Annotated[int, typer.Option(help="Tokens of a context read at a time.")] = 512,
    answer_chunk: Annotated[int, typer.Option(help="Tokens of an answer, or of streamed text, read at a time.")] = 32,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts through the model's chat template.")
    ] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long from the left.")] = False,
    kl: Annotated[bool, typer.Option(help="Measure KL and top-1 against the full cache on the answers' tokens.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Put older results in the folder aside and start anew.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the local tasks and the named sets, and exit.")] = False,
) -> None:
    """Answer the field's tasks through compressed caches, and compare each plan with the full cache item by item."""
    if importlib.util.find_spec("lm_eval") is None:
        raise KvfoldError("evaluation needs lm-evaluation-harness: pip install 'kvfold[eval]'")
    if show:
        _print_tasks()
        return
    wanted_lengths = numbers("--lengths", lengths)

    from kvfold.lab.bench import named_plans

    named = named_plans(_words(plans))  # a wrong word is told before the harness is imported, which takes seconds

    from kvfold.lab.eval.evaluation import Evaluation
    from kvfold.lab.eval.run import run
    from kvfold.lab.eval.tasks import wanted

    evaluation = Evaluation(
        plans=named,
        model=model,
        tasks={name: number if limit is None else limit for name, number in wanted(_words(tasks)).items()},
        out=out,
        seed=seed,
        dtype=dtype,
        device=device,
        threads=threads,
        chunk=chunk,
        answer_chunk=answer_chunk,
        batch_size=batch_size,
        lengths=wanted_lengths,
        chat_template=chat_template,
        truncate=truncate,
        divergence=kl,
        again=again,
    )
    with _progress() as on_update:
        outcome = run(evaluation, on_update)
    _print_table(outcome.scores)
    print(f"{out}: scores (.jsonl, .csv, .md), and every answer in items.jsonl")
    if outcome.failures:
        what = "; ".join(f"{name}: {why}" for name, why in outcome.failures.items())
        raise KvfoldError(f"{len(outcome.failures)} could not go on, the rest is in {out}: {what}")


def _words(text: str) -> list[str]:
    """Words between commas or semicolons that are not inside brackets."""
    words, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character in ",;" and depth == 0:
            words.append("")
        else:
            words[-1] += character
    return [word.strip() for word in words if word.strip()]


def _print_tasks() -> None:
    from kvfold.lab.eval.local_tasks import LOCAL_TASKS
    from kvfold.lab.eval.tasks import QUICK

    for task in LOCAL_TASKS.values():
        official = f" (with the hub: {task.official})" if task.official else ""
        print(f"{task.name:38} {task.about}{official}")
    print("\nquick: " + ", ".join(f"{name} × {number}" for name, number in QUICK.items()))
    print("local: all of the above; longbench_english: LongBench's subsets in English and code")
    print("With the hub, every task of lm-evaluation-harness by its own name.")


@contextmanager
def _progress() -> Iterator[Callable[["EvalUpdate"], None]]:
    """A bar with the time left on a terminal; elsewhere a line now and then."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("", total=1.0)

        def show(update: "EvalUpdate") -> None:
            progress.update(bar, completed=update.share, description=f"{_left(update.left_s)} {update.text}")

        yield show


class _Lines:
    """Prints the first and the last update, and in between one every few seconds."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, update: "EvalUpdate") -> None:
        now = time.monotonic()
        if update.text and (update.share >= 1 or now - self.last >= _SECONDS_BETWEEN_LINES):
            self.last = now
            print(f"{100 * update.share:3.0f} %, {_left(update.left_s)}: {update.text}", flush=True)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "starting"
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


_WIDE, _WHERE_WIDE = 110, ("p", "KV MiB", "s/item")
"""Columns that a narrower terminal leaves to scores.md."""


def _print_table(scores: Sequence["Score"]) -> None:
    """A table for each task, of its main metric."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvfold.lab.eval.scores import COLUMNS, NUM_TASK_COLUMNS, rows, setting_line

    console = Console()
    for task, group in itertools.groupby(rows(scores), key=lambda row: row[:NUM_TASK_COLUMNS]):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{task[0]}: {task[1]}", title_justify="left")
        shown = [i for i in range(NUM_TASK_COLUMNS, len(COLUMNS)) if console.width >= _WIDE or COLUMNS[i] not in _WHERE_WIDE]
        for title in (COLUMNS[i] for i in shown):
            name, _, interval = title.partition(" [")
            text, is_plan = f"{name}\n[{interval}" if interval else name, title == "plan"
            table.add_column(text, justify="left" if is_plan else "right", no_wrap=not is_plan, overflow="fold")
        for row in group:
            table.add_row(*(Text(row[i].replace(" [", "\n[")) for i in shown))
        console.print(table)
    for line in dict.fromkeys(map(setting_line, scores)):
        console.print(line, style="dim", highlight=False)
