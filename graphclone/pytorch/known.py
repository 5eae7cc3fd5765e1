"""Shape arithmetic: the operators whose result is known but for the sizes of the inputs."""

import math
from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto

from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.sizes import Integer, Size, equal, operation, probe_of

LARGEST = 64
"""Arrays with more elements than this are computed at run time."""

LARGEST_FLOAT = float(np.finfo(np.float32).max)

TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
    TensorProto.COMPLEX64: torch.complex64,
}


def torch_type(onnx_type: int, name: str = "") -> torch.dtype:
    """Return the torch dtype of an ONNX element type; `name` is that of a tensor that has it.

    Raises: Unsupported for strings and for types that torch does not compute with.
    """
    if int(onnx_type) not in TORCH_TYPES:
        kind = TensorProto.DataType.Name(int(onnx_type))
        example = f", such as '{name:.80}'" if name else ""
        raise Unsupported(f"PyTorch computes with no tensors of type {kind}{example}")
    return TORCH_TYPES[int(onnx_type)]


class Undecided(Exception):
    """A comparison that depends on the sizes of the run."""


def compute(op: Op) -> list[tuple[np.ndarray, torch.dtype]] | None:
    """Return what the outputs hold and their types, or None where that needs the tensors."""
    function = FUNCTIONS.get(op.type) if not op.domain else None
    if function is None or (op.type not in READS_SHAPE and any(v is not None and v.known is None for v in op.inputs)):
        return None
    try:
        results = function(op)
        results = results if isinstance(results, list) else [results]
        if any(result is None or result[0].size > LARGEST for result in results):
            return None
        return [(_settled(array, dtype), dtype) for array, dtype in results]
    except (Undecided, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError):
        return None


def array(values) -> np.ndarray:
    """Return an object array of numbers and sizes."""
    result = np.empty(np.shape(values), dtype=object)
    result[...] = values
    return result


def _settled(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round numbers as the type would."""
    values = array(values)
    for index, each in np.ndenumerate(values):
        if isinstance(each, Size):
            if dtype.is_floating_point:
                raise_undecided()
        elif dtype == torch.bool:
            values[index] = bool(each)
        elif dtype.is_floating_point:
            values[index] = shortest(each) if dtype == torch.float32 else float(each)
        else:
            values[index] = int(each)
    return values


def shortest(number: float) -> float:
    """Return the shortest decimal that float32 rounds to the same number: 0.044714998 is 0.044715."""
    exact = float(np.float32(number))
    short = float(str(np.float32(number)))
    return short if abs(short) <= LARGEST_FLOAT or exact in (float("inf"), float("-inf")) else exact


def raise_undecided():
    raise Undecided


# -- functions, each from an op to (array, dtype) ----------------------------------------------------------------


def _binary(function: Callable) -> Callable:
    def run(op: Op):
        left, right = op[0], op[1]
        kept = np.frompyfunc(lambda a, b: function(a, b, left.dtype), 2, 1)(left.known, right.known)
        return array(kept), left.dtype

    return run


def _compare(function: Callable[[Integer, Integer], bool | None]) -> Callable:
    def decide(a, b):
        answer = function(a, b)
        return raise_undecided() if answer is None else answer

    return lambda op: (array(np.frompyfunc(decide, 2, 1)(op[0].known, op[1].known)), torch.bool)


def _divide(a, b, dtype):
    if dtype.is_floating_point:
        return float(np.float32(a) / np.float32(b))
    return _truncate(a, b) if any(x * y < 0 for x, y in zip(probe_of(a), probe_of(b), strict=True)) else a // b


def _truncate(a: Integer, b: Integer) -> Integer:
    """Divide towards zero."""
    return operation("int({} / {})", lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1), a, b)


def _power(a, b, dtype):
    if dtype.is_floating_point:
        return float(np.float32(a) ** np.float32(b))
    if isinstance(b, Size) or b < 0 or (isinstance(a, Size) and b != 1):
        return raise_undecided()
    return int(a**b) if b != 1 else a


def _mod(op: Op):
    """Take the sign of the divisor, or of the dividend where fmod=1."""
    signed = bool(op.attribute("fmod", 0))

    def pair(a, b, dtype):
        if isinstance(a, Size) or isinstance(b, Size):
            return a % b
        if dtype.is_floating_point:
            return math.fmod(a, b)
        return a - b * (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if signed else a % b

    return _binary(pair)(op)


def _greater(a, b):
    if isinstance(a, Size) or isinstance(b, Size):
        return raise_undecided()
    return a > b


def _unary(function: Callable) -> Callable:
    def checked(a):
        return raise_undecided() if isinstance(a, Size) else function(a)

    return lambda op: (array(np.frompyfunc(checked, 1, 1)(op[0].known)), op[0].dtype)


def _same(op: Op):
    return op[0].known, op[0].dtype


def _cast(op: Op):
    to = torch_type(op.attribute("to"))
    if to == torch.bool:
        kept = np.frompyfunc(lambda a: raise_undecided() if isinstance(a, Size) else bool(a), 1, 1)(op[0].known)
        return array(kept), to
    return op[0].known, to


def _cast_like(op: Op):
    if op[0].known is None or op[1].dtype is None:
        return None
    return op[0].known, op[1].dtype


def _shape(op: Op):
    dims = op[0].dims
    return array(list(dims)[op.attribute("start", 0) : op.attribute("end", None)]), torch.int64


def _size(op: Op):
    return array(math.prod(op[0].dims)), torch.int64


def _gather(op: Op):
    indices = op[1].known.astype(np.int64)
    return array(np.take(op[0].known, indices, axis=op.axis(0))), op[0].dtype


def _concat(op: Op):
    return array(np.concatenate([each.known for each in op.inputs], axis=op.axis(0))), op[0].dtype


def _slice(op: Op):
    starts, ends = op.integers(1, "starts"), op.integers(2, "ends")
    axes, steps = op.integers(3, "axes") or range(len(starts)), op.integers(4) or [1] * len(starts)
    index = [slice(None)] * op[0].known.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, None if step < 0 and end < -(2**31) else end, step)
    return op[0].known[tuple(index)], op[0].dtype


def _squeeze(op: Op):
    axes = op.integers(1, "axes")
    return np.squeeze(op[0].known, None if axes is None else tuple(axes)), op[0].dtype


def _unsqueeze(op: Op):
    return np.expand_dims(op[0].known, tuple(op.integers(1, "axes"))), op[0].dtype


def _reshape(op: Op):
    return op[0].known.reshape([int(size) for size in op[1].known]), op[0].dtype


def _expand(op: Op):
    shape = np.broadcast_shapes(op[0].known.shape, tuple(int(size) for size in op[1].known))
    return np.broadcast_to(op[0].known, shape), op[0].dtype


def _constant_of_shape(op: Op):
    shape = [int(size) if not isinstance(size, Size) else raise_undecided() for size in op[0].known]
    if math.prod(shape) > LARGEST:
        return None
    value = op.attribute("value")
    fill = value.reshape(-1)[0] if value is not None else np.float32(0)
    return array(np.full(shape, fill.item())), torch.from_numpy(np.zeros(1, fill.dtype)).dtype


def _where(op: Op):
    for each in op[0].known.reshape(-1):
        if isinstance(each, Size):
            raise_undecided()
    return array(np.where(op[0].known.astype(bool), op[1].known, op[2].known)), op[1].dtype


def _range(op: Op):
    start, limit, step = (each.scalar for each in op.inputs)
    if any(isinstance(each, Size) for each in (start, limit, step)):
        return None
    return array(np.arange(start, limit, step).tolist()), op[0].dtype


def _reduce(function: Callable) -> Callable:
    def run(op: Op):
        axes = op.integers(1, "axes")
        if axes not in (None, [0], [-1]) or op[0].known.ndim > 1:
            return None
        result = array(function(list(op[0].known.reshape(-1))))
        return (result.reshape(1) if op.attribute("keepdims", 1) and op[0].known.ndim else result), op[0].dtype

    return run


def _most(template: str, function: Callable) -> Callable:
    def pair(a, b):
        if not isinstance(a, Size) and not isinstance(b, Size):
            return function(a, b)
        return a if equal(a, b) else operation(template, function, a, b)

    def run(op: Op):
        result = op[0].known
        for each in op.inputs[1:]:
            result = np.frompyfunc(pair, 2, 1)(result, each.known)
        return array(result), op[0].dtype

    return run


def _split(op: Op):
    sizes = op.integers(1, "split")
    if sizes is None:
        count = len(op.outputs)
        length = -(-op[0].known.shape[op.axis(0)] // count)
        sizes = [length] * (count - 1) + [op[0].known.shape[op.axis(0)] - length * (count - 1)]
    parts = np.split(op[0].known, np.cumsum([int(size) for size in sizes])[:-1], axis=op.axis(0))
    return [(part, op[0].dtype) for part in parts]


def _transpose(op: Op):
    return np.transpose(op[0].known, op.attribute("perm")), op[0].dtype


def _flatten(op: Op):
    axis = op.axis(1)
    return op[0].known.reshape(math.prod(op[0].known.shape[:axis]), -1), op[0].dtype


def _one_hot(op: Op):
    depth, (off, on) = op[1].scalar, op[2].known.reshape(-1)
    if op.axis(-1) not in (-1, op[0].known.ndim) or isinstance(depth, Size):
        return None
    places, depth = op[0].known[..., None], int(depth)
    hot = (places == np.arange(depth)) | (places + depth == np.arange(depth))
    return array(np.where(hot.astype(bool), array(on), array(off))), op[2].dtype


READS_SHAPE = ("Shape", "Size", "CastLike")
"""Operators that need no content of what they read, or not of all of it."""

FUNCTIONS: dict[str, Callable] = {
    "Add": _binary(lambda a, b, _: a + b),
    "Sub": _binary(lambda a, b, _: a - b),
    "Mul": _binary(lambda a, b, _: a * b),
    "Div": _binary(_divide),
    "Mod": _mod,
    "Pow": _binary(_power),
    "Neg": lambda op: (array(np.frompyfunc(lambda a: -a, 1, 1)(op[0].known)), op[0].dtype),
    "Sqrt": _unary(lambda a: float(np.sqrt(np.float32(a)))),
    "Reciprocal": _unary(lambda a: float(1 / np.float32(a))),
    "Exp": _unary(lambda a: float(np.exp(np.float32(a)))),
    "Log": _unary(lambda a: float(np.log(np.float32(a)))),
    "Floor": _unary(math.floor),
    "Ceil": _unary(math.ceil),
    "Abs": _unary(abs),
    "Relu": _unary(lambda a: max(a, a * 0)),
    "Not": _unary(lambda a: not a),
    "And": _compare(lambda a, b: a and b),
    "Or": _compare(lambda a, b: a or b),
    "Equal": _compare(equal),
    "Greater": _compare(_greater),
    "Less": _compare(lambda a, b: _greater(b, a)),
    "GreaterOrEqual": _compare(lambda a, b: not _greater(b, a)),
    "LessOrEqual": _compare(lambda a, b: not _greater(a, b)),
    "Max": _most("max({}, {})", max),
    "Min": _most("min({}, {})", min),
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Where": _where,
    "Range": _range,
    "ReduceProd": _reduce(math.prod),
    "ReduceSum": _reduce(sum),
    "ReduceMax": _reduce(lambda values: max(values) if len(values) > 1 else values[0]),
    "ReduceMin": _reduce(lambda values: min(values) if len(values) > 1 else values[0]),
    "Split": _split,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "OneHot": _one_hot,
}


def known_constant(value: Value, data: np.ndarray, dtype: torch.dtype) -> None:
    """Let a stored tensor's numbers be known."""
    value.known = _settled(array(data.tolist()), dtype)
