"""The process in which `sandbox.run` runs a program: it gives up what it may do, then executes the program.

Started by path, with nothing of kvfold imported. It reads a job as JSON from stdin, and says with a secret word how far it
came.
"""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn"),
    *("os.spawn", "os.startfile", "os.system", "os.chdir", "os.putenv", "pty.", "signal.pthread_kill", "sys.addaudithook"),
)
_ON_PATHS = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> str:
    """Moves this process into a network namespace without interfaces: 'namespace', or 'blocked' where that is not allowed."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWNET) == 0:
            return "namespace"
    except (OSError, AttributeError):
        pass
    return "blocked"


def limit(job: dict[str, Any]) -> None:
    for what, value in (
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_NOFILE, job["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a solution of a programming task has no need of."""
    inside = os.path.realpath(folder) + os.sep

    def within(path: Any) -> bool:
        if isinstance(path, int):
            return path > 2
        return os.path.realpath(os.fsdecode(path)).startswith(inside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"not allowed here: {event}")
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & _WRITING) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            if writes and not within(path):
                raise PermissionError("not allowed here: writing outside of the program's folder")
        if event in _ON_PATHS and not all(within(path) for path in args[:2] if isinstance(path, str | bytes | os.PathLike)):
            raise PermissionError(f"not allowed here: {event} outside of the program's folder")

    return hook


def main() -> None:
    job = json.loads(sys.stdin.read())
    say = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    word, program = job["word"], job["program"]
    say.write(f"{word} network {leave_network()}\n")
    limit(job)
    sys.setrecursionlimit(5000)
    sys.addaudithook(guard(job["folder"]))
    del job
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        end = "passed"
    except BaseException as error:  # SystemExit among them: a program that leaves before its tests has not passed
        end = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ").strip()
    say.write(f"{word} end {end}\n")


if __name__ == "__main__":
    main()
