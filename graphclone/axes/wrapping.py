"""See through `where(ids < 0, ids + size, ids)`, by which NumPy-like frameworks count negative indices from the end.

Ids are not negative, so the comparison is known, the shifted ids are thrown away, and what is looked up is the ids
themselves. Exporters write the choice as a Where, or as a sum of products with a cast condition.
"""

import numpy as np

from graphclone.op import Op


class WrappedIndices:
    """Follow the idiom through the graph; `origin` maps tensors to the graph input whose values they hold."""

    def __init__(self, origin: dict[str, str]):
        self.origin = origin
        self.known: dict[str, int] = {}  # tensors that are 0 or 1 throughout while ids are not negative
        self.shifted: dict[str, str] = {}  # ids plus a constant -> the graph input, until something reads them

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


def _is_zero(op: Op, slot: int) -> bool:
    value = op.value(slot)
    return value is not None and all(not np.any(entry) for entry in value)
