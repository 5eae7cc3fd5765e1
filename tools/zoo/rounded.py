"""Give a framework's model the weights that an export has rounded, so that both can be compared to the last digits.

What an export holds of a parameter is found by value: of all tensors of its shape, or of its shape turned round, the
nearest one, which is nearer by far than any other.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn

from graphclone.model import Model
from graphclone.precision import LOW
from graphclone.weights import weight_of
from zoo.layout import Layout

NEAR = 0.15  # of the largest entry: half a step of four bits is 1/14 of it


@torch.no_grad()
def round_like(module: nn.Module, model: Model, layout: Layout) -> Layout:
    """Set each parameter to what an export holds of it, in place; what it lacks stays.

    An export may round a matrix that looks words up otherwise than the same one that makes logits: where modules share
    a parameter, each takes its own, and the layout returned has rows for both.
    """
    found: dict[tuple[int, ...], list[tuple[np.ndarray, bool]]] = {}
    for values, looked_up in stored(model):
        for array in _forms(values):
            found.setdefault(array.shape, []).append((array, looked_up))
    names: dict[int, str] = {}
    rows = dict(layout.rows)
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        wanted = parameter.numpy()
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        near = [
            (looked_up != isinstance(owner, nn.Embedding), float(np.abs(array - wanted).max(initial=0)), number)
            for number, (array, looked_up) in enumerate(found.get(wanted.shape, []))
            if _is_near(array, wanted)
        ]
        if not near:
            continue
        values = torch.from_numpy(np.array(found[wanted.shape][min(near)[2]][0], order="C"))
        first = names.setdefault(id(parameter), name)
        shared = first != name and torch.equal(values, module.get_parameter(first))
        if first != name and not shared:
            rows[name] = next(row for glob, row in layout.rows.items() if fnmatch.fnmatchcase(first, glob))
        setattr(owner, leaf, module.get_parameter(first) if shared else nn.Parameter(values))
    return replace(layout, rows=rows)


def _forms(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the parameters that stored values may stand for.

    A matrix may be turned round, a norm may keep 1 + its scale, a table that is looked up whole has an axis of one
    entry in front, and of a scale in logits its exponential is stored.
    """
    yield values
    if values.ndim == 2:
        yield values.T
    else:
        yield values - 1
    if values.ndim > 2 and values.shape[0] == 1:
        yield values[0]
    if values.shape == (1,) and values > 0:
        yield np.log(values)


def places(module: nn.Module, model: Model) -> Iterator[tuple[str, str, bool]]:
    """Yield (parameter, initializer that holds it, whether turned round); what is packed in blocks is left out.

    An initializer may have axes of one entry more in front.
    """
    parameters = [(name, each.detach().numpy()) for name, each in module.named_parameters()]
    for name, weight in model.weights.items():
        if weight.onnx_dtype in LOW or weight.dtype.kind == "f":
            values = weight.load().astype(np.float32)
        elif name.endswith("_quantized") and f"{name[:-10]}_scale" in model.weights:
            ends = ("_quantized", "_scale", "_zero_point")
            values = next(_all_axes(*(model.weights[f"{name[:-10]}{end}"].load() for end in ends)), None)
        else:
            continue
        for parameter, wanted in parameters if values is not None and values.size > 1 else ():
            array = values.reshape(wanted.shape) if values.size == wanted.size == values.shape[-1] else values
            for turned in (False, True) if array.ndim == 2 else (False,):
                if _is_near(array.T if turned else array, wanted):
                    yield parameter, name, turned


def _is_near(array: np.ndarray, wanted: np.ndarray) -> bool:
    return array.shape == wanted.shape and np.abs(array - wanted).max(initial=0) <= NEAR * np.abs(wanted).max(initial=0)


def stored(model: Model) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the real numbers that a model's initializers stand for, fp32, and whether rows of them are looked up."""
    weights = model.weights
    constants = {t.name: t for node in model.graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    for name, weight in weights.items():
        if weight.dtype.kind == "f" or "float" in weight.dtype.name:
            yield weight.load().astype(np.float32), _is_looked_up(constants[name])
        elif name.endswith("_quantized") and f"{name[:-10]}_scale" in weights:
            base = name[:-10]
            parts = (weights[f"{base}{end}"].load() for end in ("_quantized", "_scale", "_zero_point"))
            yield from ((array, _is_looked_up(constants[name])) for array in _all_axes(*parts))
    for node in model.graph.nodes:
        inputs = [weight_of(t).load() if isinstance(t, gs.Constant) else None for t in node.inputs]
        if node.op == "DequantizeLinear" and inputs[0] is not None:
            yield _dequantized(node, inputs), _is_looked_up(node.outputs[0])
        if node.op == "MatMulNBits":
            yield _unpacked(node, inputs[1:4]), False


def _is_looked_up(tensor: gs.Tensor) -> bool:
    through = [consumer.outputs[0] for consumer in tensor.outputs if consumer.op == "DequantizeLinear"]
    return any(consumer.op == "Gather" for consumer in tensor.outputs) or any(map(_is_looked_up, through))


def _all_axes(values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the values scaled along each axis that fits; only one of them is near a parameter."""
    if scale.size == 1:
        yield (values.astype(np.float32) - zero.reshape(-1)[0]) * scale.reshape(-1)[0]
        return
    for axis in (axis for axis, size in enumerate(values.shape) if size == scale.size):
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        yield (values.astype(np.float32) - zero.reshape(shape).astype(np.float32)) * scale.reshape(shape)


def _dequantized(node: gs.Node, inputs: list[np.ndarray | None]) -> np.ndarray:
    values, scale = inputs[0].astype(np.float32), inputs[1].astype(np.float32)
    zero = inputs[2].astype(np.float32) if len(inputs) > 2 and inputs[2] is not None else np.zeros_like(scale)
    axis = int(node.attrs.get("axis", 1)) % max(values.ndim, 1)
    if scale.ndim == values.ndim and scale.ndim and node.attrs.get("block_size"):
        scale, zero = (
            np.repeat(part, node.attrs["block_size"], axis).take(range(values.shape[axis]), axis)
            for part in (scale, zero)
        )
    elif scale.size > 1:
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (values - zero) * scale


def _unpacked(node: gs.Node, inputs: list[np.ndarray | None]) -> np.ndarray:
    """Return the K x N matrix of a MatMulNBits of four bits."""
    packed, scales, zeros = inputs if len(inputs) == 3 else (*inputs, None)
    rows, blocks, _ = packed.shape
    pairs = np.stack([packed & 15, packed >> 4], -1).reshape(rows, blocks, -1).astype(np.float32)
    zero = np.full((rows, blocks, 1), 8, np.float32)
    if zeros is not None:
        each = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, :blocks]
        zero = each.astype(np.float32)[..., None]
    whole = (pairs - zero) * scales.reshape(rows, blocks, 1)
    return whole.reshape(rows, -1)[:, : node.attrs["K"]].T
