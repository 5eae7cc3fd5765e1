"""Sizes that an operator admits only in steps: what that asks of the atoms of an axis, and of the axis in turn."""

import math
from collections import Counter
from collections.abc import Iterable

from graphclone.axes.axis import Axis, find, is_static, leaves


def atom_steps(asked: Iterable[tuple[Axis, int, str]]) -> dict[int, int]:
    """Return {id of an atom: what its size must be a multiple of}, for axes whose sizes must be multiples.

    asked: (axis, step, node) triples. A parent that is no multiple itself runs where no step is asked for.

    Example:
        >>> pair = Axis((32, 32))
        >>> list(atom_steps([(Axis((64, 64), "sum", (pair, pair)), 16, "GroupQueryAttention")]).values())
        [8]
    """
    steps: dict[int, int] = {}
    for axis, step, _ in asked:
        if find(axis).size[0] % step == 0:
            _ask(find(axis), step, steps)
    return steps


def step_of(axis: Axis, steps: dict[int, int]) -> int:
    """Return a number that every size an axis can have is a multiple of, where its atoms have `steps`."""
    axis = find(axis)
    if axis.kind == "atom":
        return steps.get(id(axis), 1) if _is_free(axis) else axis.size[0]
    if axis.kind == "product":
        return math.prod(step_of(part, steps) for part in axis.parts)
    parts = Counter(id(find(part)) for part in axis.parts)
    return math.gcd(*(parts[id(find(part))] * step_of(part, steps) for part in axis.parts))


def asking(axis: Axis, asked: Iterable[tuple[Axis, int, str]]) -> str:
    """Return the node that admits an axis, or a part of it, only in steps; "" where none does."""
    atoms = {id(leaf) for leaf in leaves(axis)}
    return next((where for other, _, where in asked if atoms & {id(leaf) for leaf in leaves(other)}), "")


def _ask(axis: Axis, step: int, steps: dict[int, int]) -> None:
    """Ask of atoms what makes the size of an axis a multiple of `step`; of a product the last free factor is asked."""
    if axis.kind == "atom":
        if _is_free(axis) and axis.size[0] % step == 0:
            steps[id(axis)] = math.lcm(step, steps.get(id(axis), 1))
    elif axis.kind == "product":
        parts = [find(part) for part in axis.parts]
        last = next((part for part in reversed(parts) if step_of(part, {}) != part.size[0]), None)
        if last is not None:
            whole = math.prod(part.size[0] for part in parts if part is not last and step_of(part, {}) == part.size[0])
            _ask(last, step // math.gcd(step, whole), steps)
    else:
        times = Counter(id(find(part)) for part in axis.parts)
        for part in {id(find(part)): find(part) for part in axis.parts}.values():
            _ask(part, step // math.gcd(step, times[id(part)]), steps)


def _is_free(axis: Axis) -> bool:
    return axis.lock is None and is_static(axis) and axis.size[0] > 1
