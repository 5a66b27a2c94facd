"""`kvfold bench`: what strategies cost and save, measured."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.errors import KvfoldError
from kvfold.lab.run_log import LogKind, open_log

if TYPE_CHECKING:
    from kvfold.lab.bench import Update
    from kvfold.lab.results import Record
    from kvfold.lab.table import Column


def bench(
    strategies: Annotated[
        list[str], typer.Argument(help="Strategies or plans; 'demo' for those of the demo, 'all' for the whole catalog.")
    ],
    model: Annotated[
        str, typer.Option(help="A short name (smollm2-135m), a hub id (owner/name), a folder or a .gguf file.")
    ] = "smollm2-135m",
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, as in 512,2048.")] = "2048",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, as in 1,4.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after each context.")] = 32,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file; Wikipedia articles without it.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of speed measurements.")] = 1,
    weights: Annotated[
        str, typer.Option(help="How weights are held: dense, int8, int4 or native (as in a .gguf file).")
    ] = "dense",
    out: Annotated[Path, typer.Option(help="The results folder; a run that was interrupted there goes on.")] = Path(
        "results/bench"
    ),
    seed: Annotated[int, typer.Option(help="Shuffles the order of measurements.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type for speed and bytes: bfloat16, float16 or float32.")] = "bfloat16",
    quality_dtype: Annotated[str, typer.Option(help="Type for quality; bfloat16's noise hides that of 8 bits.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of torch; its own choice without it.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens prefilled at a time.")] = 512,
    quality_chunk: Annotated[int, typer.Option(help="Tokens streamed at a time when quality is measured.")] = 32,
    timing: Annotated[bool, typer.Option(help="Measure speed and peak memory.")] = True,
    quality: Annotated[bool, typer.Option(help="Measure KL, top-1, perplexity and ROUGE-L.")] = True,
    log: Annotated[LogKind | None, typer.Option(help="Log each measurement as it is made: csv (in --out) or wandb.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Put older results in the folder aside and start anew.")] = False,
) -> None:
    """Measure bytes, speed and quality of strategies on the same model and text; write records, figures and a page."""
    lengths, sizes = numbers("--contexts", contexts), numbers("--batch-sizes", batch_sizes)

    from kvfold.lab.bench import Bench, named_plans, run
    from kvfold.lab.report import Results, write_report

    wanted = Bench(
        plans=named_plans(strategies),
        model=model,
        contexts=lengths,
        batch_sizes=sizes,
        new_tokens=new_tokens,
        text=text,
        repeats=repeats,
        out=out,
        seed=seed,
        dtype=dtype,
        weights=weights,
        quality_dtype=quality_dtype,
        device=device,
        threads=threads,
        chunk=chunk,
        quality_chunk=quality_chunk,
        timing=timing,
        quality=quality,
        again=again,
    )
    with open_log(log, out, vars(wanted)) as add, _progress() as show:

        def on_update(update: "Update") -> None:
            show(update)
            if update.values:
                add(update.kind, update.values)

        outcome = run(wanted, on_update)
    if outcome.records:
        page = write_report(Results(tuple(outcome.records)), out / "report.html")
        _print_table(outcome.records)
        print(f"{page}: the page; records (.jsonl, .csv, .md) and figures (.png) are beside it")
    if outcome.failures:
        what = "; ".join(f"{name}: {why}" for name, why in outcome.failures.items())
        raise KvfoldError(f"{len(outcome.failures)} could not be measured, the rest is in {out}: {what}")


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`512,2048` as numbers, each once, in order."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise KvfoldError(f"{option} {text}: write whole numbers with commas between, as in 512,2048") from None


@contextmanager
def _progress() -> Iterator[Callable[["Update"], None]]:
    """Bars with the time left on a terminal; elsewhere a line for each measurement."""
    if not sys.stdout.isatty():
        yield _print_update
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Seldom refreshed: the bar must not take time from what is measured.
    with Progress(*columns, refresh_per_second=1) as progress:
        tasks = {}

        def show(update: "Update") -> None:
            if update.kind not in tasks:
                tasks[update.kind] = progress.add_task(update.kind, total=update.total)
            progress.update(tasks[update.kind], completed=update.done)
            if update.text:
                progress.console.print(update.text, highlight=False)

        yield show


def _print_update(update: "Update") -> None:
    if update.text:
        print(f"{update.kind} {update.done:.0f}/{update.total}: {update.text}", flush=True)


_DISPENSABLE = ("plan", "ROUGE-L", "peak MiB", "tok/s", "TTFT ms", "kernel")
"""Columns that a narrow terminal goes without, in this order; records.md and the page have them in any case."""


def _print_table(records: Sequence["Record"]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvfold.lab.table import columns, ordered, settings

    console = Console()
    chosen = _fitting(columns(records), records, console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in chosen:
        title = column.title.replace(" ", "\n")
        table.add_column(title, justify="right" if column.form else "left", no_wrap=column.title != "plan", overflow="fold")
    for record in ordered(records):
        table.add_row(*(Text(column.text(record)) for column in chosen))
    console.print(table)
    for line in settings(records):
        console.print(line, style="dim", highlight=False)


def _fitting(chosen: list["Column"], records: Sequence["Record"], width: int) -> list["Column"]:
    """As many columns as are shown whole: a number that is cut is another number."""

    def needed(column: "Column") -> int:
        return 3 + max(map(len, [*column.title.split(), *(column.text(record) for record in records)]))

    for title in _DISPENSABLE:
        if sum(map(needed, chosen)) <= width:
            break
        chosen = [column for column in chosen if column.title != title]
    return chosen
