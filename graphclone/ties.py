"""Ties: initializers that hold the same matrix twice, as a tied embedding and its exported copy do."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graphclone.dtypes import is_float
from graphclone.weights import Weight

PROBES = 64
COMPARE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Tie:
    """Two initializers that are equal, or `transposed`: equal to each other's transpose."""

    first: str
    second: str
    transposed: bool


def find_ties(weights: Mapping[str, Weight]) -> tuple[Tie, ...]:
    """Find the floating point weights of two or more axes that are equal, or (of two) equal up to transpose.

    A few elements are compared first, whole tensors only where those agree, a few MB at a time. Constant-valued
    weights are left out: equal zeros are no sign of sharing. Each weight is tied to the first one it equals.

    Example:
        >>> table = np.arange(15, dtype=np.float32).reshape(5, 3)
        >>> find_ties({"embedding": Weight.of(table), "head": Weight.of(table.T)})
        (Tie(first='embedding', second='head', transposed=True),)
    """
    seen: dict[tuple, list[str]] = defaultdict(list)
    ties: list[Tie] = []
    for name, weight in weights.items():
        if len(weight.shape) < 2 or not weight.size or not is_float(weight.onnx_dtype):
            continue
        keys = {False: (weight.onnx_dtype, weight.shape, _probe(weight, transposed=False))}
        if len(weight.shape) == 2:
            keys[True] = (weight.onnx_dtype, weight.shape[::-1], _probe(weight, transposed=True))
        tie = next(
            (
                Tie(first, name, transposed)
                for transposed, key in keys.items()
                for first in seen.get(key, ())
                if _equal(weights[first], weight, transposed)
            ),
            None,
        )
        if tie is None:
            seen[keys[False]].append(name)
        elif not _is_constant(weight):
            ties.append(tie)
    return tuple(ties)


def _probe(weight: Weight, transposed: bool) -> bytes:
    """Return a few elements, at the same places of every weight of one shape."""
    shape = weight.shape[::-1] if transposed else weight.shape
    size = weight.size
    coordinates = np.unravel_index(np.arange(PROBES) * 2654435761 % size, shape)
    return weight.at(coordinates[::-1] if transposed else coordinates).tobytes()


def _equal(first: Weight, second: Weight, transposed: bool) -> bool:
    """Compare bit by bit, a few rows of `first` with the same rows or columns of `second` at a time."""
    rows = first.shape[0]
    step = max(1, COMPARE_ELEMENTS // max(1, first.size // rows))
    for start in range(0, rows, step):
        part = np.arange(start, min(start + step, rows))
        ours = first.take(0, part).load()
        theirs = second.take(1, part).load().T if transposed else second.take(0, part).load()
        if ours.tobytes() != theirs.tobytes():
            return False
    return True


def _is_constant(weight: Weight) -> bool:
    rows = weight.shape[0]
    step = max(1, COMPARE_ELEMENTS // max(1, weight.size // rows))
    value = weight.at(tuple(np.zeros(1, np.int64) for _ in weight.shape)).tobytes()
    for start in range(0, rows, step):
        part = weight.take(0, np.arange(start, min(start + step, rows)))
        if part.load().tobytes() != value * part.size:
            return False
    return True
