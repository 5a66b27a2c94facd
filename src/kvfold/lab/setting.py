"""What the numbers of a run depend on besides the plan: versions, code, machine."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import psutil
import torch
import transformers

import kvfold

_PACKAGE = Path(kvfold.__file__).resolve().parent
_SHOW_ONLY = ("cli", "lab/plots.py", "lab/report.py", "lab/table.py")
"""Code that no measured number depends on."""


def versions() -> dict[str, str]:
    return {
        "kvfold": kvfold.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@cache
def code_hash() -> str:
    """A short hash of the source that numbers depend on, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        name = path.relative_to(_PACKAGE).as_posix()
        if path.suffix in (".py", ".cpp", ".h", ".cu") and not name.startswith(_SHOW_ONLY):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def git_commit() -> str | None:
    """The commit of kvfold's checkout, with a '+' when files differ from it; None when it is not run from one."""
    root = _PACKAGE.parent.parent
    if root / "src" / "kvfold" != _PACKAGE or not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: str) -> dict[str, str]:
    """Processor, cores and memory; the GPU as well when it is used."""
    facts = {
        "cpu": _cpu_name(),
        "cores": f"{os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
