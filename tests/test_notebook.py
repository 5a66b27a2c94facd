"""notebooks/demo.ipynb runs from its first cell to its last, in a short setting, and is kept without outputs."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model_folder

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "demo.ipynb"
SECONDS = 240
"""The most that a cell may take, on a busy machine; all of them take some 15."""


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    assert [cell["execution_count"] for cell in cells] == [None] * len(cells)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'dev': nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'dev': nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs the extra 'dev': nbclient and ipykernel")
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    model = tiny_model_folder(tmp_path / "model", num_hidden_layers=6)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\nCONTEXT, NEW_TOKENS, MODEL, TEXT = 320, 6, {str(model)!r}, {str(text)!r}"
    nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    tables = [output.data["text/plain"] for output in outputs if "text/html" in output.get("data", {})]
    plans = ("full", "int8", "int4", "hybrid(edge=2, edge_store=int8) | int4", "h2o(25%)", "random(25%)", "h2o(50%) | int4")
    last = next(table for table in tables if "h2o(50%) | int4" in table)
    assert all(plan in last for plan in plans)
