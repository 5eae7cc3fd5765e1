"""Overview: a model's dimensions and blocks as a person reads them."""

import itertools

import onnx_graphsurgeon as gs
from rich.table import Table
from rich.text import Text

from graphclone.analysis import Analysis
from graphclone.blocks import Block, Stack
from graphclone.cli import rows
from graphclone.cli.description import parameters, producer, type_name
from graphclone.cli.terminal import count, out, plural, print_table, size, spans, table
from graphclone.dtypes import holds_weights
from graphclone.model import Model

LISTED = 8  # nodes without a rule that are named


def print_overview(model: Model, analysis: Analysis) -> None:
    """Print what `graphclone show` shows."""
    out().print(_head(model), end="\n\n")
    out().print(_facts(model, analysis))
    out().print()
    for grid in _dimensions(analysis):
        print_table(grid)
    _print_unknown(analysis)


def interface(tensor: gs.Tensor) -> str:
    """Return a tensor's shape: `batch x sequence x 768`."""
    return "?" if tensor.shape is None else " x ".join(str(s or "?") for s in tensor.shape) or "scalar"


def halves(block: Block) -> str:
    """Return what a block consists of: `attention + ffn`."""
    return " + ".join(half.kind.replace("_", "-") for half in block.parallel or block.halves)


def _head(model: Model) -> Text:
    text = Text(model.path.name if model.path else "model", style="bold cyan")
    weights = model.weights.values()
    types = sorted({weight.dtype.name for weight in weights if holds_weights(weight.onnx_dtype)})
    facts = [plural(parameters(model), "parameter"), ", ".join(types), size(sum(weight.nbytes for weight in weights))]
    facts += [f"opset {model.opset}", producer(model)]
    return text.append("\n" + " · ".join(filter(None, facts)), style="default not bold")


def _facts(model: Model, analysis: Analysis) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    for _ in range(3):
        grid.add_column(overflow="fold")
    for title, tensors in (("inputs", model.inputs), ("outputs", model.outputs)):
        for number, tensor in enumerate(tensors):
            grid.add_row("" if number else title, tensor.name, type_name(tensor), interface(tensor))
    for number, (symbol, (length, where)) in enumerate(analysis.typing.written.items()):
        grid.add_row("" if number else "fixed", symbol, f"is {length}", f"{where} takes no other size")
    for number, stack in enumerate(analysis.stacks):
        for row in _stack(stack):
            grid.add_row("" if number else "blocks", *row)
            number += 1
    if not analysis.stacks:
        grid.add_row("blocks", "none found", "", "")
    elif not any("attention" in half.kind for s in analysis.stacks for block in s.blocks for half in block.halves):
        grid.add_row("attention", "none found", "", "")
    for number, tie in enumerate(model.ties[:LISTED]):
        grid.add_row(
            "" if number else "tied", tie.first, "equals", tie.second + (" transposed" if tie.transposed else "")
        )
    return grid


def _stack(stack: Stack) -> list[tuple[str, str, str]]:
    """Return (names, how many, what each consists of) for runs of equal blocks."""
    found = []
    for kind, run in itertools.groupby(stack.blocks, halves):
        indices = tuple(block.index for block in run)
        found.append((f"{stack.prefix}blocks.{spans(indices)}", plural(len(indices), "block"), kind))
    return found


def _dimensions(analysis: Analysis) -> list[Table]:
    free = [dimension for dimension in analysis.dimensions if dimension.locked is None]
    locked = [dimension for dimension in analysis.dimensions if dimension.locked is not None]
    parts = []
    if free:
        grid = table(("can be cut", "name"), ("size", "number"), ("weights", "number"), ("", "text"))
        for row in rows.group(free):
            note = "; ".join(rows.notes(row, analysis.stacks))
            grid.add_row(Text(row.name, "green"), rows.between(row.sizes), rows.between(row.weights), note)
        parts.append(grid)
    else:
        parts.append(table(("nothing here can be cut", "name")))
    if locked:
        grid = table(("cannot be cut", "name"), ("size", "number"), ("because", "text"))
        for row in rows.group(locked):
            grid.add_row(Text(row.name, "yellow"), rows.between(row.sizes), "; ".join(rows.notes(row, analysis.stacks)))
        parts.append(grid)
    return parts


def _print_unknown(analysis: Analysis) -> None:
    nodes = analysis.typing.unknown
    if not nodes:
        return
    out().print(
        f"{plural(len(nodes), 'node')} without an axis rule; the axes they touch are locked:", style="bold yellow"
    )
    for node in nodes[:LISTED]:
        out().print(f"  {node}", soft_wrap=True)
    if len(nodes) > LISTED:
        out().print(f"  and {count(len(nodes) - LISTED)} more")
