"""Exits: every way a command can end becomes an exit code and at most one message."""

import contextlib
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata

import click

from graphclone.cli.group import group
from graphclone.cli.terminal import OutputClosed
from graphclone.errors import GraphcloneError

INTERNAL_ERROR = 3
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143
DEBUG = "GRAPHCLONE_DEBUG"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors go to stderr."""
    with _terminable():
        return _run(arguments)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = group.main(arguments, prog_name="graphclone", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (GraphcloneError, click.ClickException) as error:
        return _refused(error)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return INTERRUPTED
    except (OutputClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        return _internal(error)


def _refused(error: GraphcloneError | click.ClickException) -> int:
    """Say what the user must change, with the traceback only where it was asked for."""
    if _debugging():
        traceback.print_exception(error)
    message = str(error)
    if isinstance(error, click.ClickException):
        message = error.format_message()
        context = getattr(error, "ctx", None)
        if context is not None:
            message = f"{message}\nsee `{context.command_path} --help`"
    _say(f"error: {message}")
    return error.exit_code


def _internal(error: Exception) -> int:
    if _debugging():
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    _say(
        f"internal error: {type(error).__name__}: {error} (at {os.path.basename(place.filename)}:{place.lineno})\n"
        "This is a bug in graphclone, not in your input. To report it, send its maintainers this command, what it\n"
        f"prints with {DEBUG}=1, the model's exporter (`graphclone show`), and: graphclone {_version()}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    return INTERNAL_ERROR


def _debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def _version() -> str:
    try:
        return metadata.version("graphclone")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
