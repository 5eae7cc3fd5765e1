"""`graphclone ops`: the operators whose axes are understood."""

import inspect
from collections import defaultdict
from collections.abc import Callable

import click


@click.command("ops")
def command() -> None:
    """List the operators whose axes are understood, with their signatures.

    An operator that is not listed locks the axes it touches: nothing breaks, but they cannot be cut.
    """
    from graphclone.axes import load_rules
    from graphclone.axes.registry import RULES
    from graphclone.cli.terminal import out, plural, print_table, table

    load_rules()
    groups: dict[tuple, list[str]] = defaultdict(list)
    for (domain, op), rule in RULES.items():
        groups[domain, rule.signature].append(op)
    grid = table(("operators", "text"), ("signature", "text"))
    for (domain, signature), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[1])):
        grid.add_row(", ".join(f"{domain}.{name}" if domain else name for name in sorted(names)), _text(signature))
    print_table(grid)
    out().print(plural(len(RULES), "operator"))


def _text(signature: str | Callable) -> str:
    """Return a signature, or what the rule that makes it says of itself."""
    if isinstance(signature, str):
        return signature
    return (inspect.getdoc(signature) or "follows from its attributes and ranks").split("\n")[0]
