"""Unfolding: weights that the exporter computed from the checkpoint's tensors, and that the module computes anew.

A normed weight g * v / |v|, a convolution with the batch norm behind it, a function of each entry as -exp(x), also of a
lone number, a table's rows where they are looked up: each is found by value, and the checkpoint's tensors take its
place. Running statistics are buffers that stay what they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graphclone.folds import norm_axes, norm_pairs, normed
from graphclone.pytorch.known import array
from graphclone.pytorch.naming import Names
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.pieces import insert, numpy_type, stored
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import new_op, new_value, reshape, transpose
from graphclone.pytorch.sizes import Integer
from graphclone.weights import Weight

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Exp": np.exp,
    "Log": np.log,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softplus": lambda x: np.logaddexp(0, x),
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}
"""Operators that exporters compute at export where a model only ever uses their result."""
CHAINS = [*((kind,) for kind in FUNCTIONS), *((kind, "Neg") for kind in FUNCTIONS if kind != "Neg")]
EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-12)
"""What frameworks and models add to the variance in batch norms."""
STATISTICS = ("running_mean", "running_var", "weight", "bias")
WRITTEN = 3
"""A number of no more digits may have been written by hand, and mean something else elsewhere."""
ULPS = 16
"""Steps of its type, at the size of its largest entry, by which a weight may differ from what is computed anew."""


class Writer:
    """Operators that compute a weight, in order."""

    def __init__(self, like: Op):
        self.like = like
        self.ops: list[Op] = []

    def add(self, op: Op) -> Value:
        self.ops.append(op)
        return op.output

    def op(self, kind: str, inputs: Sequence[Value], dims: Sequence[Integer], **attributes) -> Value:
        output = new_value(inputs[0].name, dims, inputs[0].dtype)
        return self.add(new_op(kind, inputs, output, self.like, domain="", **attributes))


@dataclass(frozen=True)
class Fold:
    """The checkpoint's tensors that a weight is computed from, and how the operators for it are written."""

    names: tuple[str, ...]
    write: Callable[..., Value]


def unfold(
    program: Program,
    unknown: Sequence[tuple[Value, np.ndarray]],
    tensors: Mapping[str, np.ndarray],
    free: set[str],
    names: Names,
) -> None:
    """Compute the `unknown` weights from `free` tensors of the checkpoint, which become parameters, where one can.

    Layers whose tensors are equal get one each: of several that fit, an operator takes that of its own module.
    """
    sources: dict[str, Value] = {}
    candidates = set(free)
    for value, own in unknown:
        found = list(_folds(own, {name: tensors[name] for name in sorted(candidates)}))
        for reader in [op for op in program.ops if value in op.inputs] if found else ():
            fold = max(found, key=lambda each: (_nearness(each.names[0], reader), each.names[0] in free))
            writer = Writer(reader)
            for name in fold.names:
                source = sources.setdefault(name, stored(name, tensors[name], value))
                source.is_table = names.is_buffer(name)
                source.parameter.trainable = not source.is_table
            output = fold.write(writer, *(sources[name] for name in fold.names))
            if tuple(output.dims) != tuple(value.dims):
                output = writer.add(reshape(output, value.dims, reader))
            insert(program, writer.ops, value, output, reader)
            free -= set(fold.names)


def unfold_numbers(program: Program, tensors: Mapping[str, np.ndarray], free: set[str], names: Names) -> None:
    """Compute lone numbers, as exp(logit_scale), from `free` tensors of one entry.

    Only where one number of the program follows from the tensor, and the tensor is none that anybody may have written.
    """
    numbers = [value for value in program.values() if isinstance(value.scalar, float) and math.isfinite(value.scalar)]
    held = {value: np.asarray(value.scalar, numpy_type(value.dtype)) for value in numbers}
    for name in sorted(name for name in free if tensors[name].size == 1 and tensors[name].dtype.kind == "f"):
        tensor = np.squeeze(tensors[name]).astype(np.float64)
        found = [(v, chain) for v, own in held.items() for chain in ((), *CHAINS) if _is(own, tensor, chain)]
        if len(found) != 1 or len(f"{tensor:.6g}".strip("-0.")) <= WRITTEN:
            continue
        value, chain = found[0]
        source = stored(name, tensors[name], value)
        source.is_table = names.is_buffer(name)
        source.parameter.trainable = not source.is_table
        for reader in [op for op in program.ops if value in op.inputs]:
            writer = Writer(reader)
            output = _chain_writer(chain, turned=False)(writer, source)
            if tuple(output.dims) != tuple(value.dims):
                output = writer.add(reshape(output, value.dims, reader))
            insert(program, writer.ops, value, output, reader)
        free.discard(name)


def _nearness(name: str, reader: Op) -> int:
    """Return how long a module path the tensor and the operator share."""
    parts, scope = name.split("."), reader.scope.split(".")
    return next((n for n, (a, b) in enumerate(zip(parts, scope, strict=False)) if a != b), min(len(parts), len(scope)))


def _folds(own: np.ndarray, tensors: Mapping[str, np.ndarray]) -> Iterator[Fold]:
    if own.size < 2 or own.dtype.kind in "iub" or not np.ptp(np.asarray(own, np.float64)):
        return
    for direction, length in norm_pairs(tensors):
        v, g = tensors[direction], tensors[length]
        if v.shape == own.shape and g.ndim == v.ndim and _same(own, normed(v, g)):
            yield Fold((direction, length), _norm_writer(v, g))
    yield from _batch_norms(own, tensors)
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            continue
        for turned in (False, True) if tensor.ndim == 2 else (False,):
            given = tensor.T if turned else tensor
            if np.squeeze(given).shape == np.squeeze(own).shape:
                wide = np.squeeze(given).astype(np.float64)
                yield from (Fold((name,), _chain_writer(chain, turned)) for chain in CHAINS if _is(own, wide, chain))
            looked_up = _lookup(own, given) if tensor.ndim == 2 else None
            if looked_up is not None:
                yield Fold((name,), _lookup_writer(*looked_up, turned))


def _batch_norms(own: np.ndarray, tensors: Mapping[str, np.ndarray]) -> Iterator[Fold]:
    """Find w * f, or b - mean * f + c * f, where f is the factor of the norm with bias b, and w and c the layer's."""
    for stem in [name.removesuffix(STATISTICS[1]) for name in tensors if name.endswith(STATISTICS[1])]:
        norm = [stem + leaf for leaf in STATISTICS]
        if not all(name in tensors and tensors[name].shape == own.shape[:1] for name in norm):
            continue
        mean, variance, gamma, beta = (tensors[name].astype(np.float64) for name in norm)
        layers = {name: each for name, each in tensors.items() if each.shape == own.shape and name not in norm}
        for epsilon in EPSILONS:
            factor = gamma / np.sqrt(variance + epsilon)
            if own.ndim > 1:
                column = factor.reshape(-1, *(1,) * (own.ndim - 1))
                for name, weight in layers.items():
                    if _same(own[:, :1], weight[:, :1] * column) and _same(own, weight * column):
                        yield Fold((name, *norm[1:3]), _scale_writer(epsilon))
            elif _same(own, beta - mean * factor):
                yield Fold(tuple(norm), _shift_writer(epsilon))
            else:
                found = (name for name, bias in layers.items() if _same(own, beta + (bias - mean) * factor))
                yield from (Fold((*norm, name), _shift_writer(epsilon)) for name in found)


def _factor(writer: Writer, variance: Value, gamma: Value, epsilon: float) -> Value:
    small = new_value("epsilon", (), variance.dtype)
    small.known, small.is_table = array(epsilon), True
    above = writer.op("Add", [variance, small], variance.dims)
    return writer.op("Div", [gamma, writer.op("Sqrt", [above], variance.dims)], gamma.dims)


def _scale_writer(epsilon: float) -> Callable[..., Value]:
    def write(writer: Writer, weight: Value, variance: Value, gamma: Value) -> Value:
        factor = _factor(writer, variance, gamma, epsilon)
        column = writer.add(reshape(factor, (*factor.dims, *(1,) * (weight.rank - 1)), writer.like))
        return writer.op("Mul", [weight, column], weight.dims)

    return write


def _shift_writer(epsilon: float) -> Callable[..., Value]:
    def write(writer: Writer, mean: Value, variance: Value, gamma: Value, beta: Value, *before: Value) -> Value:
        factor = _factor(writer, variance, gamma, epsilon)
        shift = writer.op("Sub", [*before, mean], mean.dims) if before else writer.op("Neg", [mean], mean.dims)
        return writer.op("Add", [beta, writer.op("Mul", [shift, factor], mean.dims)], beta.dims)

    return write


def _is(own: np.ndarray, values: np.ndarray, chain: Sequence[str]) -> bool:
    with np.errstate(all="ignore"):
        for kind in chain:
            values = FUNCTIONS[kind](values)
    return _same(np.squeeze(own), values)


def _same(own: np.ndarray, wanted: np.ndarray) -> bool:
    """Tell whether a weight is what was computed, but for rounding."""
    wide = np.asarray(own, np.float64)
    step = float(torch.finfo(getattr(torch, str(own.dtype))).eps) * ULPS
    return bool(np.all(np.abs(wide - wanted) <= step * np.abs(wide).max()))


def _chain_writer(chain: Sequence[str], turned: bool) -> Callable[..., Value]:
    def write(writer: Writer, tensor: Value) -> Value:
        for kind in chain:
            tensor = writer.op(kind, [tensor], tensor.dims)
        return writer.add(transpose(tensor, (1, 0), writer.like)) if turned else tensor

    return write


def _norm_writer(v: np.ndarray, g: np.ndarray) -> Callable[..., Value]:
    axes = norm_axes(v, g)

    def write(writer: Writer, direction: Value, length: Value) -> Value:
        dims = tuple(1 if axis in axes else size for axis, size in enumerate(direction.dims))
        norm = writer.op("ReduceL2", [direction], dims, axes=list(axes), keepdims=1)
        factor = writer.op("Div", [length, norm], dims)
        return writer.op("Mul", [direction, factor], direction.dims)

    return write


def _lookup(own: np.ndarray, table: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Return the axis of `own` along which rows of the table stand, and their numbers; some row stands there twice.

    What holds each row once at most is a cut of the table, and stays what it is.
    """
    rows = np.ascontiguousarray(table.astype(own.dtype)) + np.float32(0)
    numbers = {row.tobytes(): number for number, row in enumerate(rows)}
    if rows.shape[1] < 2 or len(numbers) < len(rows):
        return None
    for axis, size in enumerate(own.shape):
        if size != rows.shape[1]:
            continue
        lines = np.ascontiguousarray(np.moveaxis(own, axis, -1)) + np.float32(0)
        found = []
        for line in lines.reshape(-1, size):
            found.append(numbers.get(line.tobytes()))
            if found[-1] is None:
                break
        else:
            if 1 < len(set(found)) < len(found):
                return axis, np.array(found, np.int64).reshape(lines.shape[:-1])
    return None


def _lookup_writer(axis: int, numbers: np.ndarray, turned: bool) -> Callable[..., Value]:
    def write(writer: Writer, table: Value) -> Value:
        path, weight = f"{table.parameter.path}_index", Weight.of(numbers)
        held = Stored(path, weight, torch.int64, False, persistent=False)
        index = Value(path, None, weight, dims=numbers.shape, dtype=torch.int64, is_table=True, parameter=held)
        rows = writer.add(transpose(table, (1, 0), writer.like)) if turned else table
        looked_up = writer.op("Gather", [rows, index], (*numbers.shape, rows.dims[1]), axis=0)
        order = [*range(axis), numbers.ndim, *range(axis, numbers.ndim)]
        return writer.add(transpose(looked_up, order, writer.like))

    return write
