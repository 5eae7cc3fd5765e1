"""Description: a model's dimensions and blocks as JSON values, for programs."""

import json

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.blocks import Stack
from graphclone.cli.terminal import out
from graphclone.dimensions import Dimension
from graphclone.dtypes import holds_weights, numpy_dtype
from graphclone.model import Model


def describe(model: Model, analysis: Analysis) -> dict:
    """Return what `show --json` prints. Keys are only ever added.

    model: {path, fingerprint, opset, producer, parameters, bytes, inputs, outputs}; inputs and outputs are
        [{name, dtype, shape}] where a size is a number, a symbol or null.
    dimensions: [{name, size, role, aliases, locked, weights, blocks, stack, minimum, step}]; `locked` is the reason or
        null, `weights` counts the initializers that carry it, `blocks` lists the parent's blocks it spans, `stack` is a
        key of `stacks`, `minimum` is the least size the graph admits, and every size is a multiple of `step`.
    stacks: {name: [{index, entry, exit, halves: [{kind, entry, exit}]}]}; the name has no dot and is "" where there is
        one stack; `entry` and `exit` are tensors of the residual stream.
    ties: [[initializer, initializer]] that hold one matrix.
    unknown: the nodes without an axis rule.
    fixed: {symbol: {size, by}} of symbolic sizes that only one number fits, and the node that says so.
    """
    return {
        "model": {
            "path": str(model.path) if model.path else None,
            "fingerprint": model.fingerprint,
            "opset": model.opset,
            "producer": producer(model),
            "parameters": parameters(model),
            "bytes": sum(weight.nbytes for weight in model.weights.values()),
            "inputs": [_interface(tensor) for tensor in model.inputs],
            "outputs": [_interface(tensor) for tensor in model.outputs],
        },
        "dimensions": [_dimension(dimension) for dimension in analysis.dimensions],
        "stacks": {stack.prefix.rstrip("."): _blocks(stack) for stack in analysis.stacks},
        "ties": [[tie.first, tie.second] for tie in model.ties],
        "unknown": list(analysis.typing.unknown),
        "fixed": {symbol: {"size": n, "by": where} for symbol, (n, where) in analysis.typing.written.items()},
    }


def write_json(value: dict) -> None:
    """Print JSON as it is, in any terminal."""
    out().print(json.dumps(value, indent=1, ensure_ascii=False), soft_wrap=True)


def parameters(model: Model) -> int:
    """Count the values of initializers that hold weights; a matrix that is stored twice counts once."""
    repeated = {tie.second for tie in model.ties}
    counted = (weight for name, weight in model.weights.items() if name not in repeated)
    return sum(weight.size for weight in counted if holds_weights(weight.onnx_dtype))


def producer(model: Model) -> str:
    """Return the exporter's name and version, as far as the file says."""
    return " ".join(filter(None, (model.graph.producer_name, model.graph.producer_version)))


def type_name(tensor: gs.Tensor) -> str:
    """Return `float32`, or `?` where the file does not say."""
    if tensor.dtype is None:
        return "?"
    return (numpy_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)).name


def _interface(tensor: gs.Tensor) -> dict:
    shape = None if tensor.shape is None else [_size(size) for size in tensor.shape]
    return {"name": tensor.name, "dtype": type_name(tensor), "shape": shape}


def _size(size: object) -> int | str | None:
    if isinstance(size, (int, np.integer)):
        return int(size)
    return str(size) if size else None


def _dimension(dimension: Dimension) -> dict:
    return {
        "name": dimension.name,
        "size": dimension.size,
        "role": dimension.role,
        "aliases": list(dimension.aliases),
        "locked": dimension.locked,
        "weights": dimension.weights,
        "blocks": list(dimension.blocks),
        "stack": dimension.stack.rstrip("."),
        "minimum": dimension.minimum,
        "step": dimension.step,
    }


def _blocks(stack: Stack) -> list[dict]:
    return [
        {
            "index": block.index,
            "entry": block.entry,
            "exit": block.exit,
            "halves": [
                {"kind": half.kind, "entry": half.entry, "exit": half.exit} for half in block.parallel or block.halves
            ],
        }
        for block in stack.blocks
    ]
