"""Rows: dimensions that a reader sees as one, `blocks.*.ffn 3072` rather than twelve lines."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphclone.axes.axis import describe, find, first_lock, leaves
from graphclone.axes.steps import step_of
from graphclone.blocks import Stack
from graphclone.cli.terminal import plural, spans
from graphclone.dimensions import Dimension

BLOCK = re.compile(r"\bblocks\.(\d+)\.")
LISTED = 12  # sizes that differ are listed up to so many


@dataclass(frozen=True)
class Row:
    """A line of a table: what the dimensions of a group are called together, and the dimensions in order."""

    name: str
    dimensions: tuple[Dimension, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(dimension.size for dimension in self.dimensions)

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(dimension.weights for dimension in self.dimensions)

    @property
    def lock(self) -> str | None:
        return self.dimensions[0].locked


def group(dimensions: Iterable[Dimension]) -> list[Row]:
    """Group dimensions that differ only by block, or by number outside blocks, and are locked alike."""
    groups: dict[tuple, list[Dimension]] = defaultdict(list)
    for dimension in dimensions:
        groups[_key(dimension)].append(dimension)
    return [Row(_row_name(members), tuple(members)) for members in groups.values()]


def pattern(name: str) -> str:
    """Return a name with its block's number replaced.

    >>> pattern("encoder.blocks.3.ffn")
    'encoder.blocks.*.ffn'
    """
    return BLOCK.sub("blocks.*.", name)


def between(numbers: Sequence[int]) -> str:
    """Return one number, or the range that several lie in.

    >>> between((3072, 3072)), between((2048, 3072))
    ('3072', '2048-3072')
    """
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def notes(row: Row, stacks: Sequence[Stack]) -> list[str]:
    """Return what a reader should know of a row: which blocks, what is coupled, the least size, why it is locked."""
    found = [_span(row, stacks)]
    if len(set(row.sizes)) > 1 and len(row.sizes) <= LISTED:
        found.append("sizes " + ", ".join(map(str, row.sizes)))
    found += [_others(row), _structure(row), _least(row), _steps(row), _reason(row)]
    return [note for note in found if note]


def _key(dimension: Dimension) -> tuple:
    lock = dimension.locked and re.sub(r"'[^']*'", "''", dimension.locked)
    if dimension.blocks:
        return (*sorted({pattern(name) for name in dimension.names}), lock)
    if dimension.role == "free":
        return re.sub(r"_\d+$", "", dimension.name), dimension.size, lock
    return dimension.name, lock


def _row_name(members: list[Dimension]) -> str:
    first = members[0]
    if first.blocks:
        single = len(members) == 1 and len(first.blocks) == 1
        return first.name if single else pattern(first.name)
    names = [member.name for member in members]
    return ", ".join(names if len(names) <= 2 else [names[0], "..", names[-1]]).replace(", ..,", " ..")


def _span(row: Row, stacks: Sequence[Stack]) -> str:
    """Say which blocks a row speaks of, and whether they are cut one by one or together."""
    coupled = [dimension for dimension in row.dimensions if len(dimension.blocks) > 1]
    if not row.dimensions[0].blocks:
        return f"{len(row.dimensions)} of them" if len(row.dimensions) > 2 else ""
    blocks = tuple(sorted({block for dimension in row.dimensions for block in dimension.blocks}))
    total = sum(len(stack.blocks) for stack in stacks if stack.prefix == row.dimensions[0].stack)
    everywhere = len(blocks) == total
    if not coupled:
        if len(row.dimensions) == 1:
            return ""
        return f"each of {plural(total, 'block')}" if everywhere else f"each of blocks {spans(blocks)}"
    if len(row.dimensions) == 1:
        return f"one for all {plural(total, 'block')}" if everywhere else f"one for blocks {spans(blocks)}"
    return "one each for blocks " + " | ".join(spans(dimension.blocks) for dimension in row.dimensions)


def _others(row: Row) -> str:
    """Name the aliases that are not the same name in another block."""
    names = dict.fromkeys(pattern(name) for name in row.dimensions[0].names)
    names.pop(pattern(row.dimensions[0].name))
    return f"also {', '.join(names)}" if names and len(row.dimensions[0].names) > 1 else ""


def _structure(row: Row) -> str:
    """Say what an axis with parts asks of a plan."""
    axis = find(row.dimensions[0].axes[0])
    if axis.kind == "product" and not row.lock and (reason := first_lock(axis)):
        locked = math.prod(leaf.size[0] for leaf in leaves(axis) if leaf.lock)
        return f"in whole groups of {locked}, because {reason}"
    if axis.kind != "sum":
        return ""
    parts = [find(part) for part in axis.parts]
    if len(parts) == 2 and parts[0] is parts[1]:
        return f"in pairs (i, i+{parts[0].size[0]})"
    return f"built as {describe(axis)[1:-1]}"


def _least(row: Row) -> str:
    least = max(dimension.minimum for dimension in row.dimensions)
    return f"at least {least}" if least > 1 else ""


def _steps(row: Row) -> str:
    """Say by how much the size changes, where an operator has more to say on it than the structure of the axis."""
    dimension = row.dimensions[0]
    odd = dimension.step == step_of(dimension.axes[0], {}) or dimension.step == dimension.size
    return "" if odd else f"in steps of {dimension.step}"


def _reason(row: Row) -> str:
    if not row.lock:
        return ""
    reasons = len({dimension.locked for dimension in row.dimensions})
    return row.lock if reasons == 1 else f"{row.lock} (and {reasons - 1} more like it)"
