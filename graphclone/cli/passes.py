"""`graphclone passes`: the passes that are installed, with their options."""

import dataclasses
import inspect

import click


@click.command("passes")
def command() -> None:
    """List the passes that `graphclone run` can combine, with their options and defaults."""
    from rich.text import Text

    from graphclone.cli.terminal import print_table, table
    from graphclone.pipeline import passes

    grid = table(("pass", "name"), ("what it decides", "text"))
    for name, kind in passes().items():
        fields = [f"{item.name}={_default(item)}" for item in dataclasses.fields(kind)]
        first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        grid.add_row(Text(name, "green"), Text(first).append(f"\n{{{' '.join(fields)}}}", style="dim"))
    print_table(grid)


def _default(item: dataclasses.Field) -> str:
    if item.default is dataclasses.MISSING:
        return "..."
    return (
        "none"
        if item.default is None
        else str(item.default).lower()
        if isinstance(item.default, bool)
        else str(item.default)
    )
