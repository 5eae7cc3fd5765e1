"""Evaluate shape arithmetic: what small integer and scalar tensors hold in each probe, without running the model."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx

from graphclone.op import Op, Values

MAX_ELEMENTS = 4096


def evaluate(op: Op, output: int = 0) -> Values | None:
    """Return what an output of the node holds in each probe; None where that depends on data or is large."""
    function = FUNCTIONS.get(op.type) if not op.domain else None
    if function is None or (output and op.type != "Split"):
        return None
    if op.type == "Split":
        function = partial(_split, output=output)
    if op.type in ("Shape", "Size"):
        if not op.axes or op.axes[0] is None:
            return None
        probes = range(len(op.axes[0][0].size)) if op.axes[0] else range(2)
        arguments = [[np.array([axis.size[probe] for axis in op.axes[0]], np.int64)] for probe in probes]
    else:
        values = [op.value(slot) for slot in range(len(op.node.inputs))]
        known = [value for value in values if value is not None]
        if not known or any(value is None and op.has(slot) for slot, value in enumerate(values)):
            return None
        arguments = [[value and value[probe] for value in values] for probe in range(len(known[0]))]
    try:
        with np.errstate(all="ignore"):
            results = tuple(np.asarray(function(op, *inputs)) for inputs in arguments)
    except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
        return None
    if any(result.size > MAX_ELEMENTS for result in results):
        return None
    return results


def _shape(op: Op, sizes):
    start, end = op.attribute("start", 0), op.attribute("end", None)
    return sizes[start:end]


def _cast(op: Op, x):
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(int(op.attribute("to"))))


def _squeeze(op: Op, x, axes=None):
    axes = op.attribute("axes", None) if axes is None else axes
    return np.squeeze(x, None if axes is None else tuple(int(a) for a in np.atleast_1d(axes)))


def _unsqueeze(op: Op, x, axes=None):
    axes = [int(a) for a in np.atleast_1d(op.attribute("axes") if axes is None else axes)]
    rank = x.ndim + len(axes)
    return np.expand_dims(x, tuple(sorted(a % rank for a in axes)))


def _reshape(op: Op, x, shape):
    sizes = [int(s) for s in shape]
    if not op.attribute("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def _slice(op: Op, x, starts=None, ends=None, axes=None, steps=None):
    starts = np.atleast_1d(op.attribute("starts") if starts is None else starts)
    ends = np.atleast_1d(op.attribute("ends") if ends is None else ends)
    axes = op.attribute("axes", range(len(starts))) if axes is None else np.atleast_1d(axes)
    steps = [1] * len(starts) if steps is None else np.atleast_1d(steps)
    index: list = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        limit = int(end)
        index[int(axis)] = slice(int(start), None if step < 0 and limit < -x.shape[int(axis)] else limit, int(step))
    return x[tuple(index)]


def _div(op: Op, a, b):
    if np.issubdtype(np.result_type(a), np.integer):
        return np.trunc(np.true_divide(a, b)).astype(a.dtype)
    return np.divide(a, b)


def _reduce(function: Callable) -> Callable:
    def apply(op: Op, x, axes=None):
        axes = op.attribute("axes", None) if axes is None else axes
        which = tuple(int(a) for a in np.atleast_1d(axes)) if axes is not None and np.size(axes) else None
        if which is None and op.attribute("noop_with_empty_axes", 0):
            return x
        return function(x, axis=which, keepdims=bool(op.attribute("keepdims", 1))).astype(x.dtype)

    return apply


def _constant_of_shape(op: Op, shape):
    value = op.attribute("value", None)
    value = np.zeros(1, np.float32) if value is None else np.asarray(value)
    if math.prod(int(s) for s in shape) > MAX_ELEMENTS:
        raise ValueError
    return np.full([int(s) for s in shape], value.reshape(-1)[0], value.dtype)


def _expand(op: Op, x, shape):
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(s) for s in shape)))


def _range(op: Op, start, limit, delta):
    if abs((limit - start) / delta) > MAX_ELEMENTS:
        raise ValueError
    return np.arange(start.item(), limit.item(), delta.item()).astype(start.dtype)


def _one_hot(op: Op, indices, depth, values):
    count = int(np.ravel(depth)[0])
    hot = np.where(indices < 0, indices + count, indices)[..., None] == np.arange(count)
    return np.where(np.moveaxis(hot, -1, int(op.attribute("axis", -1))), values[1], values[0])


def _gather_nd(op: Op, x, indices):
    if op.attribute("batch_dims", 0):
        raise ValueError
    return x[tuple(np.moveaxis(indices, -1, 0))]


def _cumsum(op: Op, x, axis):
    axis = int(np.atleast_1d(axis)[0])
    x = np.flip(x, axis) if op.attribute("reverse", 0) else x
    sums = np.cumsum(x, axis) - (x if op.attribute("exclusive", 0) else 0)
    return np.flip(sums, axis) if op.attribute("reverse", 0) else sums


def _scatter_nd(op: Op, data, indices, updates):
    if str(op.attribute("reduction", "none")) != "none":
        raise ValueError
    result = np.array(data)
    result[tuple(np.moveaxis(indices, -1, 0))] = updates
    return result


def _split(op: Op, x, sizes=None, output: int = 0):
    axis = int(op.attribute("axis", 0))
    sizes = op.attribute("split", None) if sizes is None else sizes
    if sizes is None:
        part = -(-x.shape[axis] // op.output_count)
        sizes = [part] * op.output_count
    start = int(np.sum(np.asarray(sizes[:output], np.int64)))
    return np.take(x, range(start, min(start + int(sizes[output]), x.shape[axis])), axis)


FUNCTIONS: dict[str, Callable] = {
    "Shape": _shape,
    "Size": lambda op, sizes: np.prod(sizes),
    "Identity": lambda op, x: x,
    "Cast": _cast,
    "CastLike": lambda op, x, like: x.astype(like.dtype),
    "Gather": lambda op, x, i: np.take(x, i, axis=int(op.attribute("axis", 0))),
    "GatherND": _gather_nd,
    "Concat": lambda op, *xs: np.concatenate(xs, axis=int(op.attribute("axis", 0))),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": lambda op, x: np.transpose(x, op.attribute("perm", None)),
    "Expand": _expand,
    "Tile": lambda op, x, repeats: np.tile(x, [int(r) for r in repeats]),
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Add": lambda op, a, b: a + b,
    "Sub": lambda op, a, b: a - b,
    "Mul": lambda op, a, b: a * b,
    "Div": _div,
    "Mod": lambda op, a, b: np.fmod(a, b) if op.attribute("fmod", 0) else np.mod(a, b),
    "Pow": lambda op, a, b: np.power(a, b).astype(a.dtype),
    "Min": lambda op, *xs: np.minimum.reduce(np.broadcast_arrays(*xs)),
    "Max": lambda op, *xs: np.maximum.reduce(np.broadcast_arrays(*xs)),
    "Sum": lambda op, *xs: sum(xs),
    "Neg": lambda op, x: -x,
    "Abs": lambda op, x: np.abs(x),
    "Sign": lambda op, x: np.sign(x),
    "Floor": lambda op, x: np.floor(x),
    "Ceil": lambda op, x: np.ceil(x),
    "Round": lambda op, x: np.round(x),
    "Sqrt": lambda op, x: np.sqrt(x),
    "Reciprocal": lambda op, x: 1 / x,
    "Log": lambda op, x: np.log(x),
    "Exp": lambda op, x: np.exp(x),
    "Equal": lambda op, a, b: a == b,
    "Less": lambda op, a, b: a < b,
    "LessOrEqual": lambda op, a, b: a <= b,
    "Greater": lambda op, a, b: a > b,
    "GreaterOrEqual": lambda op, a, b: a >= b,
    "Not": lambda op, x: ~x,
    "And": lambda op, a, b: a & b,
    "Or": lambda op, a, b: a | b,
    "Where": lambda op, c, a, b: np.where(c, a, b),
    "OneHot": _one_hot,
    "ScatterND": _scatter_nd,
    "GatherElements": lambda op, x, i: np.take_along_axis(x, i, int(op.attribute("axis", 0))),
    "Clip": lambda op, x, low=None, high=None: np.clip(x, op.attribute("min", low), op.attribute("max", high)),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceMean": _reduce(np.mean),
    "CumSum": _cumsum,
    "Flatten": lambda op, x: x.reshape(int(np.prod(x.shape[: int(op.attribute("axis", 1))])), -1),
}
