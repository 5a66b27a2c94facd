"""`kvfold report`: one page, figures and tables from results folders."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders that 'kvfold bench' and 'kvfold eval' wrote.")],
    out: Annotated[Path, typer.Option(help="The page; figures and tables are written beside it.")] = Path("report/report.html"),
    against: Annotated[
        list[Path] | None, typer.Option(help="A results folder to compare with; may be given several times.")
    ] = None,
) -> None:
    """Write one HTML page, figures (PNG) and tables (CSV, Markdown, LaTeX) from results folders."""
    from kvfold.files import make_folder
    from kvfold.lab.report import read_results, write_report, write_tables
    from kvfold.lab.results import write_csv, write_markdown

    results = read_results(folders)
    before = read_results(against) if against else None
    make_folder(out.parent)
    page = write_report(results, out, before)
    write_tables(results, out, before)
    if results.records:
        write_csv(out.with_suffix(".csv"), results.records)
        write_markdown(out.with_suffix(".md"), results.records)
    counts = [f"{len(found)} {what}" for found, what in ((results.records, "records"), (results.scores, "scores")) if found]
    print(f"{page}: {' and '.join(counts)}; figures (.png) and tables (.csv, .md, .tex) are beside it")
