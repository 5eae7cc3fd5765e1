"""Take a rule away, or let it say something else: tests show that what it guards then comes out wrong."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from graphclone.axes import load_rules
from graphclone.axes.axis import free_leaves
from graphclone.axes.registry import RULES, Rule, Typing
from graphclone.axes.typed import AxisTyping, Site
from graphclone.op import Op, Values
from graphclone.surgery.child import Editor
from graphclone.surgery.reports import REPORTS
from graphclone.surgery.stores import STORES

Breaking = Callable[[pytest.MonkeyPatch], None]


def changed(op: str, change: Callable[[Typing], Typing], domain: str = "") -> Breaking:
    """Let a rule say something else."""

    def apply_to(patch: pytest.MonkeyPatch) -> None:
        load_rules()
        right = RULES[domain, op]

        def wrong(node: Op) -> Typing | None:
            typing = right.read(node)
            return None if typing is None else change(typing)

        patch.setitem(RULES, (domain, op), Rule(op, domain, wrong))

    return apply_to


def without(name: str, instead: Callable) -> Breaking:
    return lambda patch: patch.setattr(name, instead)


def unedited(editors: dict[str, Editor], kind: str) -> Breaking:
    """Let surgery leave the sites of a kind as they are."""
    return lambda patch: patch.setitem(editors, kind, lambda child, site, node: None)


def by_value(typing: AxisTyping) -> list[Site]:
    """Take any number that is a power of a width for it, wherever it stands: also the scales of attention, and caps."""
    axes = {id(x): x for types in typing.types.values() for axis in types or () for x in free_leaves(axis)}.values()
    return [
        Site(node.op, slot, "denominator", (axis,), value=power)
        for node in typing.nodes
        if node.op.type in ("Mul", "Div")
        for slot in (0, 1)
        for axis in axes
        if slot < len(node.op.values) and (power := _power(node.op.value(slot), axis.size[0]))
    ]


def _power(value: Values | None, size: int) -> float | None:
    """Return the p for which a number is size ** p, or None."""
    if value is None or np.size(value[0]) != 1 or np.asarray(value[0]).dtype.kind != "f":
        return None
    number = float(np.ravel(value[0])[0])
    return next((p for p in (1.0, 0.5, 0.25, -0.25, -0.5, -1.0) if math.isclose(number, size**p, rel_tol=1e-5)), None)


def storeless(typing: Typing) -> Typing:
    return replace(typing, stores=())


def unfilled(typing: Typing) -> Typing:
    return replace(typing, fills=())


def unfixed(typing: Typing) -> Typing:
    return replace(typing, fixed=())


def second_ignored(typing: Typing) -> Typing:
    return replace(typing, text="..., . -> ...")


NO_DENOMINATORS = without("graphclone.axes.solver.find_denominators", lambda typing: [])
BY_VALUE = without("graphclone.axes.solver.find_denominators", by_value)
NO_SCALE = unedited(STORES, "scale")
NO_FREEZING = unedited(REPORTS, "shape")
ANY_POSITIONS = without("graphclone.axes.positions.Positions.index", lambda positions, op, tensor, axis: None)
NO_REPETITION = without("graphclone.axes.initializers.repeated_axes", lambda weight: ())
NO_CLIPS = without("graphclone.axes.wrapping._clipped", lambda op, names, origin: None)
NO_LIMITS = without(
    "graphclone.axes.wrapping._clipped",
    lambda op, names, origin: (origin[names[0]], math.inf) if names[0] in origin else None,
)
