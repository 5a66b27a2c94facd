"""`kvfold report`: one page, figures and tables from results folders."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders that 'kvfold bench --out' wrote.")],
    out: Annotated[Path, typer.Option(help="The page; figures and tables are written beside it.")] = Path("report/report.html"),
) -> None:
    """Write one HTML page, figures, CSV and a Markdown table from results folders."""
    from kvfold.files import make_folder
    from kvfold.lab.report import write_report
    from kvfold.lab.results import read_records, write_csv, write_markdown

    records = [record for folder in folders for record in read_records(folder)]
    make_folder(out.parent)
    page = write_report(records, out)
    write_csv(out.with_suffix(".csv"), records)
    write_markdown(out.with_suffix(".md"), records)
    print(f"{page}: {len(records)} records; figures (.png), .csv and .md are beside it")
