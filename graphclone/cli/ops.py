"""`graphclone ops`: the operators whose axes are understood."""

import inspect
from collections.abc import Callable

import click


@click.command("ops")
def command() -> None:
    """List the operators that are understood: signature, whether PyTorch code is written, the opset they exist since.

    An operator that is not listed locks the axes it touches: nothing breaks, but they cannot be cut.
    """
    from graphclone.axes import load_rules
    from graphclone.axes.registry import RULES
    from graphclone.cli.terminal import out, plural, print_table, table
    from graphclone.pytorch.registry import RULES as WRITTEN

    load_rules()
    since = _first_opsets()
    grid = table(("operator", "name"), ("opset", "number"), ("PyTorch", "text"), ("signature", "text"))
    for domain, name in sorted(RULES):
        shown = f"{domain}.{name}" if domain else name
        opset = str(since.get((domain, name), "" if domain == "" else 1))
        signature = _text(RULES[domain, name].signature)
        grid.add_row(shown, opset, "yes" if (domain, name) in WRITTEN else "no", signature)
    print_table(grid)
    out().print(plural(len(RULES), "operator"))


def _first_opsets() -> dict[tuple[str, str], int]:
    """Return the first opset of every operator that the standard lists."""
    import onnx

    first: dict[tuple[str, str], int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = (schema.domain, schema.name)
        first[key] = min(first.get(key, schema.since_version), schema.since_version)
    return first


def _text(signature: str | Callable) -> str:
    """Return a signature, or what the rule that makes it says of itself."""
    if isinstance(signature, str):
        return signature
    return (inspect.getdoc(signature) or "follows from its attributes and ranks").split("\n")[0]
