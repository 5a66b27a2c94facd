"""`kvfold strategies`: the catalog."""

import json
from typing import Annotated

import typer


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the named strategies: their plans, what they change, and where they come from."""
    from kvfold.catalog import STRATEGIES

    rows = [
        {
            "name": s.name,
            "plan": s.plan,
            "changes": s.changes,
            "summary": "; ".join(text for text in (s.summary, s.finding, _also(s.also)) if text),
            "paper": s.paper,
        }
        for s in STRATEGIES.values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(rows)


def _also(names: tuple[str, ...]) -> str:
    return f"also {', '.join(names)}" if names else ""


_FROM_WIDTH = {"name": 0, "plan": 0, "summary": 0, "changes": 100, "paper": 140}
"""The columns, and how wide the window must be for each."""


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [key for key, width in _FROM_WIDTH.items() if console.width >= width]
    for key in columns:
        table.add_column(key.capitalize(), no_wrap=key == "name", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[key], style="bold" if key == "name" else "") for key in columns))
    console.print(table)
    if len(columns) < len(_FROM_WIDTH):
        console.print(f"In a window of {max(_FROM_WIDTH.values())} columns, and with --json: their papers.", style="dim")
    console.print(
        "Any plan can be given in place of a name: keep | protect | hybrid | codec | share | tier, as in 'h2o(25%) | int4'."
    )
