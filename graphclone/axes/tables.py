"""Find tables computed from a size (RoPE, sinusoids, ALiBi slopes), and whether a cut keeps their formula.

A framework computes them anew from the smaller config, so a cut one is expressible only where the formula gives the
kept entries: every second pair of RoPE, say, is base ** (-2i / d) of half the head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, free_leaves
from graphclone.axes.typed import AxisTyping, Use
from graphclone.dtypes import is_float
from graphclone.weights import Weight, weight_of

TRIGONOMETRIC = {"Cos", "Sin"}
PASSING = {
    "Mul",
    "MatMul",
    "Cast",
    "Reshape",
    "Concat",
    "Expand",
    "Einsum",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Identity",
    "Slice",
}
FUSED_SLOTS = {
    "RotaryEmbedding": {"": (1, 2), "com.microsoft": (2, 3)},
    "GroupQueryAttention": {"com.microsoft": (7, 8)},
}
TOLERANCE = 1e-4
FEW = 8


@dataclass(frozen=True)
class Table:
    """An initializer that a formula makes of the size of `axis`; `entries` are what the formula gives along it."""

    use: Use
    kind: str
    axis: Axis
    entries: np.ndarray

    @property
    def name(self) -> str:
        return self.use.node.inputs[self.use.slot].name

    @property
    def where(self) -> str:
        return f"{self.use.node.op} node '{self.use.node.name}'"

    def reproduces(self, picks: np.ndarray) -> bool:
        """Tell whether the formula of the smaller size gives the kept entries."""
        kept = self.entries[picks]
        wanted = slopes(len(picks)) if self.kind == "slopes" else _geometric(self.entries, len(picks))
        return wanted is not None and bool(np.allclose(kept, wanted, rtol=TOLERANCE, atol=0))


def find_tables(typing: AxisTyping) -> Iterator[Table]:
    """Yield the tables among the initializers that carry an axis which may be cut.

    Example:
        [table.name for table in find_tables(type_axes(model))]
    """
    for uses in typing.uses.values():
        for use in uses:
            weight = _float_weight(use)
            if weight is None:
                continue
            for place, axis in enumerate(use.axes):
                if axis.size[0] > 1 and free_leaves(axis) and (found := _entries(use, weight, place)) is not None:
                    yield Table(use, found[0], axis, found[1])


def slopes(heads: int) -> np.ndarray:
    """Return the slopes of ALiBi (arXiv 2108.12409): a power of two, and every second one of the next for the rest.

    Example:
        >>> slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]
    """
    closest = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 / closest * np.arange(1, closest + 1))
    rest = 2.0 ** (-4.0 / closest * np.arange(1, 2 * (heads - closest), 2))
    return np.concatenate([first, rest])


def _float_weight(use: Use) -> Weight | None:
    if use.node is None:
        return None
    weight = weight_of(use.node.inputs[use.slot])
    return weight if is_float(weight.onnx_dtype) and len(weight.shape) <= 4 and weight.size > 1 else None


def _entries(use: Use, weight: Weight, place: int) -> tuple[str, np.ndarray] | None:
    others = [axis for axis, size in enumerate(weight.shape) if size > 1 and axis != place]
    if not others:
        values = np.asarray(weight.load(), np.float64).reshape(-1)
        if _reaches_trigonometry(use.node):
            return "frequencies", values
        if values.size > 1 and np.allclose(values, slopes(values.size), rtol=1e-3):
            return "slopes", values
        return None
    if len(others) > 1 or weight.shape[others[0]] < 3:
        return None
    fused = FUSED_SLOTS.get(use.node.op, {}).get(use.node.domain or "", ())
    rows = weight.take(others[0], range(min(FEW, weight.shape[others[0]]))).load()
    found = frequencies(
        np.moveaxis(np.asarray(rows, np.float64), (others[0], place), (0, 1)).reshape(-1, weight.shape[place])
    )
    if found is None and use.slot in fused:
        found = np.full(weight.shape[place], np.nan)
    return None if found is None else ("sinusoids", found)


def frequencies(rows: np.ndarray) -> np.ndarray | None:
    """Return w where column j of `rows` (positions 0, 1, 2, ...) is sin(w_j p) or cos(w_j p); None where it is not.

    Rows of zeros are parameters at their start, no sines of nothing.

    Example:
        >>> angles = np.arange(5)[:, None] * np.array([1.0, 0.1])
        >>> frequencies(np.concatenate([np.cos(angles), np.sin(angles)], 1)).round(3).tolist()
        [1.0, 0.1, 1.0, 0.1]
        >>> frequencies(np.zeros((5, 4))) is None
        True
    """
    first = rows[0]
    if not np.all((np.abs(first) < 1e-6) | (np.abs(first - 1) < 1e-6)) or np.abs(rows).max() > 1 + 1e-6:
        return None
    is_cosine = first > 0.5
    angle = np.where(is_cosine, np.arccos(np.clip(rows[1], -1, 1)), np.arcsin(np.clip(rows[1], -1, 1)))
    positions = np.arange(len(rows))[:, None]
    wanted = np.where(is_cosine, np.cos(positions * angle), np.sin(positions * angle))
    return angle if np.any(angle) and np.allclose(rows, wanted, atol=2e-3) else None


def _reaches_trigonometry(node: gs.Node) -> bool:
    waiting, seen = [node], set()
    while waiting and len(seen) < 64:
        current = waiting.pop()
        if current.op in TRIGONOMETRIC:
            return True
        if id(current) in seen or current.op not in PASSING:
            continue
        seen.add(id(current))
        waiting += [consumer for tensor in current.outputs for consumer in tensor.outputs]
    return False


def _geometric(entries: np.ndarray, count: int) -> np.ndarray | None:
    """Return what base ** (-i / n) is for `count` entries in place of n; repetitions (halves, pairs) stay."""
    size = len(entries)
    if not np.all(np.isfinite(entries)) or np.any(entries <= 0):
        return None
    for repeat in (1, 2) if size % 2 == 0 and count % 2 == 0 else (1,):
        for arranged in (False, True):
            grid = entries.reshape(-1, repeat) if arranged else entries.reshape(repeat, -1).T
            if not np.allclose(grid, grid[:, :1], rtol=TOLERANCE):
                continue
            line = grid[:, 0]
            if len(line) < 2 or not np.allclose(
                line, line[0] * (line[1] / line[0]) ** np.arange(len(line)), rtol=TOLERANCE
            ):
                continue
            half = count // repeat
            fresh = line[0] * (line[1] / line[0]) ** (np.arange(half) * len(line) / half)
            return np.repeat(fresh, repeat) if arranged else np.tile(fresh, repeat)
    return None
