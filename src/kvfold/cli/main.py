"""The entry point `kvfold`: the commands, and how errors are shown."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import kvfold
from kvfold.cli.bench import bench
from kvfold.cli.calibrate import calibrate
from kvfold.cli.eval import evaluate
from kvfold.cli.generate import generate
from kvfold.cli.info import info
from kvfold.cli.profile import profile
from kvfold.cli.report import report
from kvfold.cli.strategies import strategies
from kvfold.errors import KvfoldError

app = typer.Typer(
    name="kvfold",
    help="Compresses the key-value cache of language models, and shows what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, bench, profile, report, calibrate, strategies, info):
    app.command()(command)
app.command("eval")(evaluate)

# Some versions of typer bring a copy of click, others don't: a public error leads to the base of all usage errors.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


_INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvfold {kvfold.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="KVFOLD_DEBUG", help="Show the traceback of an error. Comes before the command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ["KVFOLD_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits.

    The status is 0, 2 for anything that the user can act on, which is said in one line, or 130 after an interrupt.
    """
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("kvfold")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))
    finally:
        logger.removeHandler(handler)


def _run(arguments: list[str]) -> int:
    """The exit status."""
    try:
        # Outside of its standalone mode typer raises errors, and returns the status of an Exit.
        status: int = app(arguments, prog_name="kvfold", standalone_mode=False) or 0
        return _fail("interrupted", _INTERRUPTED) if status == _INTERRUPTED else status
    except BrokenPipeError:
        # The reader of a pipe has seen enough; Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except _UsageError as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        return _fail(f"{message.rstrip('.')} ('kvfold --help' lists commands and options)")
    except KvfoldError as error:
        return _fail(str(error))
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{named}")
    except MemoryError:
        return _fail("out of memory: take a smaller model, batch, context or chunk")
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _fail("out of memory: take a smaller model, batch, context or chunk")


def _out_of_memory(error: RuntimeError) -> bool:
    """torch's error on a GPU is a class of its own, on a CPU a RuntimeError whose text says it."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _fail(message: str, status: int = 2) -> int:
    if os.environ.get("KVFOLD_DEBUG") not in (None, "", "0"):
        traceback.print_exc()
    print(f"kvfold: {' '.join(message.split())}", file=sys.stderr)
    return status
