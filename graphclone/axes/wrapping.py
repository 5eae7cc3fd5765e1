"""See through what NumPy-like frameworks do to ids before a look-up: count negative ones from the end, clip large ones.

In `where(ids < 0, ids + size, ids)` ids are not negative, so the comparison is known, the shifted ids are thrown away,
and what is looked up is the ids themselves. Exporters write the choice as a Where, or as a sum of products with a cast
condition. A clip to `[0, size - 1]` changes no id that is valid, and none of the smaller ones after a cut.
"""

import math

import numpy as np

from graphclone.op import Op, Values


class WrappedIndices:
    """Follow the idiom through the graph; `origin` maps tensors to the graph input whose values they hold."""

    def __init__(self, origin: dict[str, str]):
        self.origin = origin
        self.known: dict[str, int] = {}  # tensors that are 0 or 1 throughout while ids are not negative
        self.shifted: dict[str, str] = {}  # ids plus a constant -> the graph input, until something reads them
        self.limits: dict[str, float] = {}  # graph input -> the largest of its values that every clip lets through

    def follow(self, op: Op) -> bool:
        """Tell whether a node belongs to the idiom; what its output holds is noted then."""
        names = [tensor.name for tensor in op.node.inputs]
        known = [self.known.get(name) for name in names]
        output = op.node.outputs[0].name
        match op.type:
            case "Less" | "GreaterOrEqual" if names[0] in self.origin and _is_zero(op, 1):
                self.known[output] = int(op.type == "GreaterOrEqual")
            case "Not" if known[0] is not None:
                self.known[output] = 1 - known[0]
            case "Cast" | "Reshape" | "Expand" | "Unsqueeze" | "Squeeze" | "Identity" if known[0] is not None:
                self.known[output] = known[0]
            case "Cast" | "Reshape" | "Expand" | "Unsqueeze" | "Squeeze" | "Identity" if names[0] in self.shifted:
                self.shifted[output] = self.shifted[names[0]]
            case "Clip" | "Min" | "Max" if (clipped := _clipped(op, names, self.origin)) is not None:
                source, limit = clipped
                self.limits[source] = min(limit, self.limits.get(source, limit))
                self.origin[output] = source
            case "Where" if known[0] is not None:
                self._pass_on(names[1 if known[0] else 2], output)
            case "Mul" if 0 in known:
                self.known[output] = 0
            case "Mul" | "Add" if (1 if op.type == "Mul" else 0) in known:
                self._pass_on(names[1 - known.index(1 if op.type == "Mul" else 0)], output)
            case "Add" if names[0] in self.origin and op.is_constant(1) and op.value(1) is not None:
                self.shifted[output] = self.origin[names[0]]
            case "Add" if names[1] in self.origin and op.is_constant(0) and op.value(0) is not None:
                self.shifted[output] = self.origin[names[1]]
            case _:
                return False
        return True

    def _pass_on(self, chosen: str, output: str) -> None:
        for table in (self.origin, self.known, self.shifted):
            if chosen in table:
                table[output] = table[chosen]


def _number(value: Values | None) -> float | None:
    """Return the one number that a tensor holds in every probe, or None."""
    numbers = None if value is None else np.unique(np.concatenate([np.ravel(entry) for entry in value]))
    return float(numbers[0]) if numbers is not None and len(numbers) == 1 else None


def _is_zero(op: Op, slot: int) -> bool:
    value = op.value(slot)
    return value is not None and all(not np.any(entry) for entry in value)


def _clipped(op: Op, names: list[str], origin: dict[str, str]) -> tuple[str, float] | None:
    """Return the graph input whose values a node clips from above at most, and the bound; None for other nodes."""
    slot = next((slot for slot, name in enumerate(names) if name in origin), None)
    bounds = {other: _number(op.value(other)) for other in range(len(names)) if other != slot and op.has(other)}
    if slot is None or None in bounds.values() or {"min", "max"} & {*op.node.attrs}:
        return None
    if op.type == "Clip":
        lower, upper = bounds.get(1, 0), bounds.get(2, math.inf)
    else:
        limits = bounds.values()
        lower, upper = (max(limits, default=0), math.inf) if op.type == "Max" else (0, min(limits, default=math.inf))
    passes = lower <= 0 and (slot == 0 or op.type != "Clip")
    return (origin[names[slot]], upper) if passes else None
