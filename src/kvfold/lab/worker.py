"""Measurements in fresh processes.

`python -m kvfold.lab.worker` reads jobs from stdin and writes events to stdout, each a line of JSON. It imports torch and
transformers once, computes nothing itself, and forks for each job: a job starts with a clean heap, idle threads and no
leftovers of other strategies, without the seconds that the imports take. Where forking is not safe (outside Linux) `Worker`
starts it anew for each job.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from kvfold.errors import KvfoldError

CAN_FORK = sys.platform == "linux"
HOW = "a fresh process for each measurement" + (", forked from one that has only imported torch" if CAN_FORK else "")


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do.

    Attributes:
        kind: "timing" runs the one plan on all rows of `ids`; "quality" streams the one row of `ids` through the full cache,
            then through every plan.
        model, weights: what `kvfold.load` takes.
        threads: of torch.
        plans: texts of plans.
        ids: `[B, S]` tokens.
        num_new: tokens to generate.
        chunk: tokens prefilled at a time (timing) or streamed at a time (quality).
        prefill_len: tokens prefilled before streaming; quality only.
    """

    kind: str
    model: str
    dtype: str
    device: str
    threads: int
    seed: int
    plans: tuple[str, ...]
    ids: list[list[int]]
    num_new: int
    chunk: int
    prefill_len: int = 0
    weights: str = "dense"


@dataclass(frozen=True)
class Event:
    """What a worker reports.

    Attributes:
        kind: "progress" (`share` of `plan` is done, or of the reference where `plan` is empty), "result" (`plan` has `result`,
            the fields of a Timing or Quality), "failed" (`plan` can't be measured, `message` says why; others may), "crash" (a
            mistake in kvfold, `message` is the traceback) or "end".
    """

    kind: str
    plan: str = ""
    share: float = 0.0
    message: str = ""
    result: dict[str, Any] | None = None


class WorkerError(RuntimeError):
    """A mistake in kvfold itself, with the worker's traceback."""


# -- in the process that asks -------------------------------------------------------------------------------------------------


class Worker:
    """Runs jobs, one at a time. A context manager: leaving it ends the processes that it started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: TextIO | None = None

    def __enter__(self) -> "Worker":
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def run(self, job: Job) -> Iterator[Event]:
        """The events of a job as they come, without the end. WorkerError when kvfold itself is at fault."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        for line in self._process.stdout:
            event = Event(**json.loads(line))
            if event.kind == "crash":
                raise WorkerError(event.message)
            if event.kind == "end":
                break
            yield event
        else:
            raise WorkerError(self._last_words())
        if not CAN_FORK:
            self._stop()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  _stop closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvfold.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # ctrl-C is for the process that asks; it ends this one
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it holds nothing that would be lost
        process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        return "the measuring process ended: " + (self._errors.read()[-2000:].strip() or "it said nothing")


# -- in the process that measures ----------------------------------------------------------------------------------------------


def serve(jobs: TextIO, events: TextIO) -> None:
    """Does each job in a fork of this process, or in this process where it can't fork."""
    import kvfold.lab.quality
    import kvfold.models.load  # noqa: F401  the forks find it imported

    def emit(event: Event) -> None:
        events.write(json.dumps(asdict(event)) + "\n")
        events.flush()

    for line in iter(jobs.readline, ""):
        job = _read(line)
        if CAN_FORK:
            _fork(job, emit)
        else:
            _guarded(job, emit)
        emit(Event("end"))


def _read(line: str) -> Job:
    fields = json.loads(line)
    return Job(**{**fields, "plans": tuple(fields["plans"])})


def _fork(job: Job, emit: Callable[[Event], None]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            _guarded(job, emit)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = "the system killed it, most likely for lack of memory" if number == signal.SIGKILL else f"signal {number}"
        emit(Event("failed", message=f"its process ended early: {why}"))


def _guarded(job: Job, emit: Callable[[Event], None]) -> None:
    """A job, with every error as an event."""
    import torch

    try:
        _work(job, emit)
    except (MemoryError, torch.OutOfMemoryError):
        emit(Event("failed", message="out of memory"))
    except KvfoldError as error:
        emit(Event("failed", message=str(error)))
    except BaseException as error:
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            emit(Event("failed", message="out of memory"))
        else:
            emit(Event("crash", message=traceback.format_exc()))


def _work(job: Job, emit: Callable[[Event], None]) -> None:
    import torch

    from kvfold.models.load import load

    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model, _ = load(job.model, dtype=job.dtype, device=job.device, weights=job.weights)
    ids = torch.tensor(job.ids, device=model.device)
    if job.kind == "timing":
        from kvfold.lab.measure import measure

        timing = measure(model, ids, job.plans[0], job.num_new, job.chunk)
        emit(Event("result", job.plans[0], result=asdict(timing)))
    else:
        _qualities(job, model, ids, emit)


def _qualities(job: Job, model: Any, ids: Any, emit: Callable[[Event], None]) -> None:
    from kvfold.lab.quality import reference_of, stream_quality

    def progress(plan: str) -> Callable[[float], None]:
        return lambda share: emit(Event("progress", plan, share))

    reference = reference_of(model, ids, job.prefill_len, job.chunk, job.num_new, progress(""))
    for plan in job.plans:
        try:
            quality = stream_quality(model, ids, plan, reference, progress(plan))
        except KvfoldError as error:
            emit(Event("failed", plan, message=str(error)))
            continue
        emit(Event("result", plan, result={**asdict(quality), "continuation_full": reference.continuation}))


def main() -> None:
    """Keeps stdout for events: what libraries print goes to stderr."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, events)


if __name__ == "__main__":
    main()
