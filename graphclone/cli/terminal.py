"""Terminal: where commands print; colour and width follow the terminal, and a pipe gets plain text."""

import functools

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST_NAME = 44  # a first column is not wrapped up to so many characters


class OutputClosed(Exception):
    """Whoever read our output has stopped reading, as `head` does."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise OutputClosed


@functools.cache
def out() -> Console:
    """Return the console for results (stdout)."""
    return _Console(highlight=False, soft_wrap=False, emoji=False, markup=False)


@functools.cache
def err() -> Console:
    """Return the console for progress and notes (stderr)."""
    return _Console(stderr=True, highlight=False, emoji=False, markup=False)


def table(*columns: tuple[str, str]) -> Table:
    """Return an empty table without lines under bold heads; `print_table` prints it.

    columns: (head, kind) with kind `name` (wrapped only where very long), `number` (to the right) or `text` (wrapped at
    words).
    """
    result = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for head, kind in columns:
        result.add_column(
            Text(head),
            justify="right" if kind == "number" else "left",
            no_wrap=kind == "number",
            overflow="fold",
        )
    return result


def print_table(grid: Table) -> None:
    """Print a table and a blank line; where it is too wide, its first column is the last to be wrapped."""
    first = grid.columns[0]
    first.min_width = min(LONGEST_NAME, max(len(str(cell)) for cell in (first.header, *first.cells)))
    out().print(grid)
    out().print()


def count(number: int) -> str:
    """Return a number with separators.

    >>> count(124439808)
    '124,439,808'
    """
    return f"{number:,}"


def size(number: int) -> str:
    """Return bytes as a person says them.

    >>> [size(n) for n in (812, 649_419, 1_950_000_000)]
    ['812 B', '649 KB', '1.95 GB']
    """
    value = float(number)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def plural(number: int, noun: str) -> str:
    """Return `1 block`, `12 blocks`."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def spans(numbers: tuple[int, ...]) -> str:
    """Return ascending numbers with runs joined.

    >>> spans((0, 1, 2, 5, 7, 8))
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
