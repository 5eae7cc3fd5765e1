"""Reports: what a verification found, as a table or in a line."""

from rich.text import Text

from graphclone.cli.terminal import out, plural, print_table, table
from graphclone.verify.report import Check, Report


def print_report(report: Report) -> None:
    """Print every check of a verification."""
    grid = table(("check", "name"), ("result", "text"), ("difference", "number"), ("at most", "number"), ("", "text"))
    for check in report.checks:
        result = Text("ok", "green") if check.ok else Text("FAIL", "bold red")
        grid.add_row(check.name, result, _figure(check.figure), _figure(check.tolerance), check.where)
    print_table(grid)
    passed = len(report.checks) - len(report.failed)
    out().print(f"{passed} of {plural(len(report.checks), 'check')} passed")


def summary(report: Report) -> str:
    """Return a line about a verification that passed: `verified  7 checks passed, ...`."""
    figures = [check.figure for check in report.checks if check.figure is not None]
    worst = f", largest relative difference {max(figures):.1e}" if figures else ""
    return f"verified  {plural(len(report.checks), 'check')} passed{worst}"


def failure(report: Report) -> str:
    """Return what failed, a line a check."""
    return "verification failed:\n" + "\n".join(f"  {_line(check)}" for check in report.failed)


def _line(check: Check) -> str:
    figure = "" if check.figure is None else f" differs by {_figure(check.figure)} (at most {_figure(check.tolerance)})"
    return f"{check.name}{figure}" + (f" at {check.where}" if check.where else "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
