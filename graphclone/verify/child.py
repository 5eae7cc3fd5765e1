"""Judge a child against its parent: the plan carried out again, tensor by tensor and output by output."""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from graphclone.model import Model
from graphclone.verify.inputs import Feeds
from graphclone.verify.running import difference, run
from graphclone.weights import Weight


def compare_weights(child: Model, again: Model) -> str:
    """Return how the initializers of two models differ in name, shape, type or value, or ""; both are streamed."""
    ours, theirs = child.weights, again.weights
    for name in sorted(theirs.keys() - ours.keys()):
        return f"the child lacks initializer '{name}'"
    for name in sorted(ours.keys() - theirs.keys()):
        return f"the child has an initializer '{name}' that the plan does not give"
    for name, weight in theirs.items():
        mine = ours[name]
        if (mine.shape, mine.onnx_dtype) != (weight.shape, weight.onnx_dtype):
            return f"'{name}' is {mine}, the plan gives {weight}"
        if not _equal(mine, weight):
            return f"'{name}' differs from the parent's slices"
    return ""


def compare_outputs(child: Model, again: Model, probes: Sequence[Feeds]) -> float:
    """Return the largest relative difference of two models' outputs."""
    return max(difference(got, wanted) for got, wanted in zip(run(child, probes), run(again, probes), strict=True))


def _equal(one: Weight, other: Weight) -> bool:
    if one.onnx_dtype == TensorProto.STRING:  # they have no bytes to stream
        return np.array_equal(one.load(), other.load())
    return _bytes_equal(one.chunks(), other.chunks())


def _bytes_equal(one, other) -> bool:
    """Compare two streams of bytes that may be cut into chunks differently."""
    left = right = memoryview(b"")
    one, other = iter(one), iter(other)
    while True:
        left = left or memoryview(next(one, b"")).cast("B")
        right = right or memoryview(next(other, b"")).cast("B")
        count = min(len(left), len(right))
        if not count:
            return not left and not right
        if left[:count] != right[:count]:
            return False
        left, right = left[count:], right[count:]
