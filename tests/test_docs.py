"""What the documentation says works."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

import kvfold
from kvfold import registry
from kvfold.catalog import STRATEGIES
from kvfold.plan import Plan

ROOT = Path(__file__).parents[1]


def _blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_example_of_a_new_method_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = _blocks("docs/add-a-method.md", "python")
    assert len(source.splitlines()) < 60
    monkeypatch.setitem(registry._METHODS, "keep", registry.methods("keep"))  # gone again after this test
    exec(compile(source, "strided.py", "exec"), {"__name__": "strided"})
    ids = torch.randint(0, 100, (1, 80), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    cache = kvfold.cache(model, "strided(24, recent=8) | int4")
    with torch.no_grad():
        for part in ids.split(16, dim=1):
            model(part, past_key_values=cache)
    kept = cache.layers[0].kept_slots()[0]
    assert len(kept) == 24
    assert set(kept) >= {0, 1, 2, 3, *range(72, 80)}
    assert set(range(0, 72, 8)) <= set(kept)


def test_every_plan_in_the_readme_can_be_read() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    plans = [plan.replace("\\|", "|") for row in rows for plan in re.findall(r"`(.*?)`", row)]
    plans = [plan for plan in plans if plan not in STRATEGIES or plan in ("full", "int8", "int4", "int2")]
    assert len(plans) > 12
    for plan in plans:
        assert str(Plan.parse(plan)) == plan


def test_documents_link_to_what_exists() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
