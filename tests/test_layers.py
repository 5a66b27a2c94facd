"""Dependencies point one way: each part of the house knows the parts below it, and no others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "kvfold"

# The upper floors: what none of the stages, nor the arithmetic below them, may know.
UPPER = {"held_layer", "layer_cache", "shared_layers", "layers", "layer_state", "kv_cache", "models", "lab", "cli"}
# Where tokens lie.
SEGMENTS = {"segment", "block_view", "blocks", "pool"}

# Who must not import whom, at any depth of a function. A part is a package or module of kvfold.
FORBIDDEN = {
    "keep": UPPER | SEGMENTS | {"attention", "catalog", "plan", "store"},
    "store": UPPER | SEGMENTS | {"attention", "budget", "catalog", "keep", "kernels", "plan"},
    "read": UPPER | SEGMENTS | {"attention", "catalog", "keep", "kernels", "plan", "share", "tier"},
    "share": UPPER | SEGMENTS | {"attention", "catalog", "keep", "kernels", "plan", "read", "tier"},
    "tier": UPPER | {"attention", "block_view", "blocks", "catalog", "keep", "kernels", "plan", "read", "segment", "share"},
    "kernels": UPPER | SEGMENTS | {"attention", "budget", "keep", "plan"},
    "attention": UPPER | SEGMENTS | {"keep", "plan"},
    "pool": UPPER | {"block_view", "blocks", "keep", "plan", "read", "segment", "tier"},
    "segment": UPPER | {"block_view", "blocks", "keep", "plan", "pool", "read", "tier"},
    "block_view": UPPER | {"blocks", "keep", "plan", "pool", "read", "tier"},
    "blocks": UPPER | {"keep", "plan", "read", "tier"},
    "held_layer": {"catalog", "cli", "kv_cache", "lab", "layer_cache", "models"},
    "layer_cache": {"catalog", "cli", "kv_cache", "lab", "layers", "layer_state", "models", "shared_layers"},
    "shared_layers": {"catalog", "cli", "kv_cache", "lab", "layers", "models"},
    "layers": {"catalog", "cli", "kv_cache", "lab", "models"},
    "kv_cache": {"cli", "lab", "models"},
    "models": {"cli", "lab"},
    "plan": UPPER | SEGMENTS | {"attention"},
    "lab": {"cli"},
    "budget": {"cli", "keep", "lab", "models", "plan", "store"},
    "errors": {"budget", "cli", "keep", "lab", "models", "plan", "store"},
}


def _imports(path: Path) -> set[str]:
    """Parts of kvfold that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "kvfold":
                names += [f"kvfold.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("kvfold.")}
    return found


def _part(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    wrong = _imports(path) & FORBIDDEN.get(_part(path), set())
    assert not wrong, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(wrong))}"


def test_only_the_lab_and_the_command_line_know_of_each_other() -> None:
    for path in FILES:
        if _part(path) not in ("lab", "cli", "__main__"):
            assert not _imports(path) & {"lab", "cli"}, path


@pytest.mark.parametrize("package", ["keep", "read", "share", "store"])
def test_methods_know_nothing_of_each_other(package: str) -> None:
    """One method, one file. A codec may be built from another codec; a policy never from another policy."""
    shared = {"base"}
    if package == "store":  # codecs that methods are built from, and what these are built from
        shared |= {"affine", "dense", "fitted", "integer", "outliers", "residual", "rotation", "subspace", "table"}
        shared |= {"allocation", "bands", "constants", "levels", "pack", "scales"}
    for path in (SOURCE / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"kvfold.{package}."):
                assert node.module.split(".")[2] in shared, f"{path.name} imports {node.module}"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import kvfold", {"torch", "transformers"}),
        ("import kvfold.errors", {"torch", "transformers"}),
        ("import kvfold.plan", {"transformers"}),
    ],
)
def test_imports_are_cheap(statement: str, heavy: set[str]) -> None:
    code = f"import sys; {statement}; print(*(m for m in {sorted(heavy)!r} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


def test_every_public_name_is_there() -> None:
    import kvfold

    for name in kvfold.__all__:
        assert getattr(kvfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'chache'"):
        kvfold.chache  # noqa: B018
