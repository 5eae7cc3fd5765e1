"""Dimensions while names for them are collected, and what becomes of those the graph couples."""

from dataclasses import dataclass, field

from graphclone.axes.axis import Axis, find, is_static, leaves
from graphclone.axes.steps import atom_steps, step_of
from graphclone.axes.typed import AxisTyping
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.dimension import Dimension
from graphclone.dimensions.widths import axis_key, is_of_units, lock_of


@dataclass(slots=True)
class Found:
    """A width that got a name. others: axes that go with it without being equal to it in the graph."""

    role: str
    axis: Axis
    names: list[str] = field(default_factory=list)
    stack: str = ""
    blocks: list[int] = field(default_factory=list)
    others: list[Axis] = field(default_factory=list)


class Collection:
    """What was named so far. taken: ids of the atoms that a name speaks of."""

    def __init__(self) -> None:
        self._found: dict[tuple, Found] = {}
        self.taken: set[int] = set()

    def add(self, role: str, axis: Axis, name: str, stack: str = "", block: int | None = None) -> None:
        """Give an axis a name in a role; a second one in the same role becomes an alias."""
        axis = find(axis)
        if is_of_units(axis) or not is_static(axis):
            return
        entry = self._found.setdefault((axis_key(axis), role), Found(role, axis, stack=stack))
        if name not in entry.names:
            entry.names.append(name)
        if block is not None and block not in entry.blocks:
            entry.blocks.append(block)
        self.taken |= {id(leaf) for leaf in leaves(axis)}

    def join(self, role: str, axis: Axis, other: Axis) -> None:
        """Let another axis go with one that has a name in a role."""
        self._found[axis_key(axis), role].others.append(other)
        self.taken |= {id(leaf) for leaf in leaves(other)}

    def names(self) -> set[str]:
        """Return every name that was given."""
        return {name for entry in self._found.values() for name in entry.names}

    def dimensions(self, typing: AxisTyping, carriers: Carriers) -> tuple[Dimension, ...]:
        """Return what was collected, in the order of the first names."""
        steps = atom_steps(typing.steps)
        return tuple(_finished(group, typing, carriers, steps) for group in self._coupled())

    def _coupled(self) -> list[list[Found]]:
        """Group what shares an atom in the same role: axes the graph couples are one dimension."""
        groups: list[list[Found]] = []
        by_leaf: dict[tuple[int, str, int], list[Found]] = {}
        for entry in self._found.values():
            keys = [(id(leaf), entry.role, entry.axis.size[0]) for leaf in leaves(entry.axis)]
            group = next((by_leaf[key] for key in keys if key in by_leaf), None)
            if group is None:
                group = []
                groups.append(group)
            group.append(entry)
            by_leaf.update(dict.fromkeys(keys, group))
        return groups


def _finished(group: list[Found], typing: AxisTyping, carriers: Carriers, steps: dict[int, int]) -> Dimension:
    axes = tuple(axis for entry in group for axis in (entry.axis, *entry.others))
    names = list(dict.fromkeys(name for entry in group for name in entry.names))
    first = group[0]
    if first.role == "hidden" and len(names) > 1 and "hidden" not in names:
        names.insert(0, "hidden")
    roots = {id(entry.axis) for entry in group}
    least = [n for axis, n, _ in typing.minimum if id(find(axis)) in roots]
    return Dimension(
        name=names[0],
        size=first.axis.size[0],
        role=first.role,
        axes=axes,
        aliases=tuple(names[1:]),
        locked=next((reason for axis in axes if (reason := lock_of(axis))), None),
        stack=first.stack,
        blocks=tuple(sorted({block for entry in group for block in entry.blocks})),
        weights=carriers.count(axes),
        minimum=max(least, default=1),
        step=step_of(first.axis, steps),
    )
