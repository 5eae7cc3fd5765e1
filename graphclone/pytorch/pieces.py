"""Pieces: graph weights that are several of the checkpoint's tensors side by side, or a part of one."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import known_value, new_op, new_value, reshape, transpose
from graphclone.weights import Weight

Key = TypeVar("Key")
Pieces = tuple[int, list[tuple[Key, bool]]]
"""The axis along which pieces make up a whole, and each piece with whether it is transposed first."""


def pieces(
    whole: np.ndarray, parts: Mapping[Key, np.ndarray], near: Mapping[Key, object] | None = None
) -> Pieces | None:
    """Return at least two of the parts that make up the whole side by side, or None.

    near: groups of parts; where several parts have the same values, the one in the group of the piece before counts.
        Without it, equal parts leave the whole as it is.

    Example:
        >>> pieces(np.arange(6.0), {"q": np.arange(2.0), "k": np.array([2.0, 3, 4, 5])})
        (0, [('q', False), ('k', False)])
    """
    for axis in range(whole.ndim):
        found: list[tuple[Key, bool]] = []
        offset = 0
        while offset < whole.shape[axis]:
            rest = whole.take(range(offset, whole.shape[axis]), axis)
            fitting = [
                (key, turned)
                for key, part in parts.items()
                for turned in ((False, True) if part.ndim == 2 else (False,))
                if key not in {key for key, _ in found} and _begins(rest, part.T if turned else part, axis, whole)
            ]
            if len(fitting) > 1 and near is not None:
                fitting = [each for each in fitting if not found or near[each[0]] == near[found[-1][0]]][:1]
            if len(fitting) != 1:
                break
            found += fitting
            key, turned = fitting[0]
            offset += (parts[key].T if turned else parts[key]).shape[axis]
        if offset == whole.shape[axis] and len(found) > 1:
            return axis, found
    return None


def _begins(rest: np.ndarray, part: np.ndarray, axis: int, whole: np.ndarray) -> bool:
    """Tell whether a piece is the beginning of what is left, and not all of the whole."""
    if part.ndim != rest.ndim or not 0 < part.shape[axis] <= rest.shape[axis] or part.shape[axis] == whole.shape[axis]:
        return False
    start = rest.take(range(part.shape[axis]), axis)
    return start.shape == part.shape and np.array_equal(start, part.astype(start.dtype))


def join(program: Program, value: Value, found: Pieces[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Store the checkpoint's tensors in the place of the graph's, and join them where they are read."""
    axis, parts = found
    reader = next(op for op in program.ops if value in op.inputs)
    ops: list[Op] = []
    inputs = []
    for name, turned in parts:
        given = stored(name, tensors[name], value)
        if turned:
            output = new_value(name, given.dims[::-1], value.dtype)
            ops.append(new_op("Transpose", [given], output, reader, domain="", perm=[1, 0]))
            given = output
        inputs.append(given)
    joined = new_value(value.name, value.dims, value.dtype)
    ops.append(new_op("Concat", inputs, joined, reader, domain="", axis=axis))
    insert(program, ops, value, joined)


def rows(image: np.ndarray) -> np.ndarray | None:
    """Return the channels of each place of an image (1, channels, height, width), as learned positions are stored.

    Example:
        >>> rows(np.array([[[[1, 2]], [[3, 4]], [[5, 6]]]]))
        array([[1, 3, 5],
               [2, 4, 6]])
    """
    if image.ndim != 4 or len(image) != 1:
        return None
    return np.moveaxis(image[0], 0, -1).reshape(-1, image.shape[1])


def of_rank(given: np.ndarray, rank: int) -> np.ndarray | None:
    """Return a tensor as it is, or the rows of an image with axes of one before them; None where neither fits."""
    if given.ndim == rank:
        return given
    found = rows(given) if 2 <= rank < given.ndim else None
    return None if found is None else found.reshape((1,) * (rank - 2) + found.shape)


def _image(given: Value, dims: tuple[int, ...], reader: Op) -> list[Op]:
    """Make an image (1, channels, height, width) of rows of channels."""
    _, channels, height, width = dims
    apart = reshape(given, (1, height, width, channels), reader)
    return [apart, transpose(apart.output, (0, 3, 1, 2), reader)]


def cut(program: Program, name: str, tensor: np.ndarray, found: Pieces[Value]) -> None:
    """Store the checkpoint's tensor in the place of several of the graph's, and cut it where they are read."""
    axis, parts = found
    whole, offset = None, 0
    for value, turned in parts:
        reader = next(op for op in program.ops if value in op.inputs)
        whole = whole or stored(name, tensor, value)
        image = value.rank != tensor.ndim
        dims = value.dims[::-1] if turned else value.dims
        if image:
            dims = (*(1,) * (tensor.ndim - 2), value.dims[2] * value.dims[3], value.dims[1])
        end = offset + dims[axis]
        piece = new_value(value.name, dims, value.dtype)
        bounds = [known_value([offset]), known_value([end]), known_value([axis])]
        ops = [new_op("Slice", [whole, *bounds], piece, reader, domain="")]
        if turned:
            output = new_value(value.name, value.dims, value.dtype)
            ops.append(new_op("Transpose", [piece], output, reader, domain="", perm=[1, 0]))
        if image:
            ops += _image(piece, value.dims, reader)
        insert(program, ops, value, ops[-1].output)
        offset = end


def spread(program: Program, value: Value, name: str, tensor: np.ndarray) -> None:
    """Store the checkpoint's tensor in the place of the graph's: the same under other axes, or an image."""
    reader = next(op for op in program.ops if value in op.inputs)
    given = stored(name, tensor, value)
    same = np.array_equal(np.squeeze(tensor), np.squeeze(value.weight.load()))
    ops = [reshape(given, value.dims, reader)] if same else _image(given, value.dims, reader)
    insert(program, ops, value, ops[-1].output)


def stored(name: str, tensor: np.ndarray, like: Value) -> Value:
    """Return a trainable tensor of the checkpoint as a value of the program."""
    weight = Weight.of(np.asarray(tensor.astype(numpy_type(like.dtype)), order="C"))
    parameter = Stored(name, weight, like.dtype, True)
    return Value(name, None, weight, dims=tensor.shape, dtype=like.dtype, parameter=parameter)


def numpy_type(kind: torch.dtype) -> np.dtype:
    """Return numpy's type of a torch one; those that numpy lacks are of ml_dtypes."""
    return np.dtype(str(kind).removeprefix("torch."))


def insert(program: Program, ops: list[Op], old: Value, new: Value, reader: Op | None = None) -> None:
    """Let what reads `old`, or one reader of it, read `new`, which the operators compute before it."""
    readers = [op for op in program.ops if old in op.inputs and reader in (None, op)]
    first = program.ops.index(readers[0])
    for op in readers:
        op.inputs = [new if each is old else each for each in op.inputs]
    program.ops[first:first] = ops
