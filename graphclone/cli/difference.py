"""Difference: what a plan makes of a parent, as a person reads it before or after the cut."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.text import Text

from graphclone.analysis import Analysis
from graphclone.cli import rows
from graphclone.cli.description import parameters
from graphclone.cli.overview import interface
from graphclone.cli.terminal import count, print_table, size, spans, table
from graphclone.cut import Cut
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.resolution import resolve

LISTED = 8  # kept indices that are listed


@dataclass(frozen=True)
class Change:
    """A line: what changed, from, to, and a remark."""

    name: str
    before: str
    after: str
    note: str = ""


def print_difference(parent: Model, child: Model, plan: Plan, analysis: Analysis) -> None:
    """Print the sizes, blocks, parameters and interface shapes that differ.

    analysis: of the parent.
    """
    cut = resolve(plan, analysis)
    changes = [*size_changes(analysis, cut), *block_changes(analysis, cut), *_halves(plan)]
    grid = table(("dimension", "name"), ("parent", "number"), ("child", "number"), ("", "text"))
    for change in changes:
        grid.add_row(Text(change.name, "green"), change.before, Text(change.after, "bold"), change.note)
    if not changes:
        grid.add_row("nothing is cut", "", "", "")
    grid.add_section()
    for change in (_parameters(parent, child), _bytes(parent, child)):
        grid.add_row(change.name, change.before, Text(change.after, "bold"), change.note)
    print_table(grid)
    changed = interface_changes(parent, child)
    if changed:
        grid = table(("interface that changed", "name"), ("parent", "text"), ("child", "text"))
        for change in changed:
            grid.add_row(change.name, change.before, change.after)
        print_table(grid)


def size_changes(analysis: Analysis, cut: Cut) -> list[Change]:
    """Return the dimensions that are cut, in kept blocks, blocks of the same name together."""
    kept = [dimension for dimension in analysis.dimensions if _stays(dimension.blocks, dimension.stack, cut.blocks)]
    changes = []
    for row in rows.group(kept):
        sizes = tuple(cut.size(dimension.axes[0])[0] for dimension in row.dimensions)
        if sizes == row.sizes and all(cut.picks(dimension.axes[0]) is None for dimension in row.dimensions):
            continue
        picks = cut.picks(row.dimensions[0].axes[0])
        notes = ["reordered"] if sizes == row.sizes else []
        if len(set(sizes)) > 1 and len(sizes) <= rows.LISTED:
            notes.append(", ".join(map(str, sizes)))
        elif len(row.dimensions) == 1 and picks is not None:
            notes.append(f"keeps {_shortened([int(pick) for pick in picks])}")
        changes.append(Change(row.name, rows.between(row.sizes), rows.between(sizes), "; ".join(notes)))
    return changes


def block_changes(analysis: Analysis, cut: Cut) -> list[Change]:
    """Return the stacks that lose blocks."""
    changes = []
    for stack in analysis.stacks:
        kept = cut.blocks[stack.prefix]
        if len(kept) != len(stack.blocks):
            note = f"keeps {spans(kept)}"
            changes.append(Change(f"{stack.prefix}blocks", str(len(stack.blocks)), str(len(kept)), note))
    return changes


def interface_changes(parent: Model, child: Model) -> list[Change]:
    """Return the inputs and outputs whose shape changed, or that are gone or renumbered."""
    after = {tensor.name: tensor for tensor in (*child.inputs, *child.outputs)}
    changes = []
    before = [*parent.inputs, *parent.outputs]
    for tensor in before:
        new = after.get(tensor.name)
        if new is None:
            changes.append(Change(tensor.name, interface(tensor), "removed"))
        elif interface(new) != interface(tensor):
            changes.append(Change(tensor.name, interface(tensor), interface(new)))
    known = {tensor.name for tensor in before}
    return changes + [Change(name, "", interface(tensor)) for name, tensor in after.items() if name not in known]


def _stays(blocks: tuple[int, ...], stack: str, kept: Mapping[str, tuple[int, ...]]) -> bool:
    return not blocks or stack not in kept or any(block in kept[stack] for block in blocks)


def _halves(plan: Plan) -> list[Change]:
    return [Change(name, "", "gone") for name in plan.drop]


def _parameters(parent: Model, child: Model) -> Change:
    before, after = parameters(parent), parameters(child)
    return Change("parameters", count(before), count(after), f"{after / max(before, 1):.1%}")


def _bytes(parent: Model, child: Model) -> Change:
    before, after = (sum(weight.nbytes for weight in model.weights.values()) for model in (parent, child))
    return Change("weights", size(before), size(after))


def _shortened(indices: list[int]) -> str:
    """Return indices, runs of them joined where they ascend, those in the middle left out where there are many."""
    ascending = indices == sorted(indices)
    parts = spans(tuple(indices)).split(", ") if ascending else [str(index) for index in indices]
    if len(parts) <= LISTED:
        return ", ".join(parts)
    return f"{', '.join(parts[: LISTED - 1])} .. {parts[-1]}"
