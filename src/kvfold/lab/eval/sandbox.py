"""Runs a program that a model has written, apart from everything else.

A separate Python process, in a folder of its own that is removed afterwards, with limits on processor time, wall time, memory,
file sizes and open files. It has no network: it gets an empty network namespace where Linux lets it (`unshare`), and in any
case Python refuses it sockets, other programs, foreign libraries, and writing outside of its folder (`sandbox_child`). This
holds against a model's mistakes; it is no wall against an attacker.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kvfold.errors import KvfoldError

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_s: seconds until it is killed.
        cpu_s: seconds of processor time.
        memory_bytes: of address space.
        file_bytes: of any file that it writes.
        open_files: at once.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    open_files: int = 32


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Attributes:
        passed: it ran to its end.
        why: 'passed', the error's name and text, or what limit it met.
        network: 'namespace' where it had an empty one, 'blocked' where only Python refused sockets; '' when it never started.
    """

    passed: bool
    why: str
    network: str


def run(program: str, limits: Limits | None = None) -> Verdict:
    """Runs a Python program to its end. A program that exits early, by itself or by a signal, has not passed.

    KvfoldError where the system has no such limits (it is no POSIX system).
    """
    if os.name != "posix":
        raise KvfoldError("programs are only run on POSIX systems, which can limit them: leave out this task")
    limits = limits or Limits()
    word = secrets.token_hex(16)  # what a program that ends early can't have said
    with tempfile.TemporaryDirectory(prefix="kvfold-run-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            text=True,
        )
        job = json.dumps({"program": program, "word": word, "folder": folder, **asdict(limits)})
        try:
            said, _ = process.communicate(job, timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"took more than {limits.wall_s:g} s", "")
        finally:
            _end(process)
    return _verdict(said, word, process.returncode, limits)


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends the process, and any that it may have started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _verdict(said: str, word: str, status: int, limits: Limits) -> Verdict:
    lines = [line.removeprefix(word) for line in said.splitlines() if line.startswith(word)]
    network = next((line.removeprefix(" network ") for line in lines if line.startswith(" network ")), "")
    end = next((line.removeprefix(" end ") for line in lines if line.startswith(" end ")), "")
    if end:
        return Verdict(end == "passed", end, network)
    if status == -signal.SIGXCPU or status == -signal.SIGKILL:
        return Verdict(False, f"took more than {limits.cpu_s} s of processor time", network)
    return Verdict(False, f"ended early with status {status}", network)
