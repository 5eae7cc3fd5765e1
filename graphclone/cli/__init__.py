"""The command line: `graphclone show`, `graphclone subclone`, ...; one file a command."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 fine, 1 a check failed, 2 the user must change something,
    3 an internal error, 130 interrupted.

    arguments: without the program's name. Default: those of the process.

    Example:
        >>> main(["show", "absent.onnx"])
        2
    """
    from graphclone.cli.exits import run

    return run(arguments)
