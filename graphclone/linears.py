"""Find the linear operators of a model that a least-squares fit can set: their input, output, weight and bias."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find
from graphclone.axes.contractions import contraction_of
from graphclone.axes.typed import TypedNode
from graphclone.blocks import Half
from graphclone.dimensions import axis_key
from graphclone.model import Model

ADDING = {"Add", "Identity", "Cast", "Dropout", "Reshape", "Sum"}


@dataclass(frozen=True)
class Linear:
    """y = x W + b, of tensors x [..., K] and y [..., N].

    weight: its initializer; order: how the initializer's axes come from [*K axes, *N axes]. inner, outer: those axes.
    bias: its initializer or None; bias_axes: that one's axes. y is named behind the bias. number: of the node.
    """

    number: int
    where: str
    x: str
    y: str
    weight: str
    order: tuple[int, ...]
    inner: tuple[Axis, ...]
    outer: tuple[Axis, ...]
    bias: str | None


def find_linears(analysis: Analysis, model: Model) -> list[Linear]:
    """Return the linear operators with a weight of their own, in topological order.

    A weight that several nodes share (a tied head, ALBERT's layers) is left out: it cannot suit each of them.
    """
    tied = {name for tie in model.ties for name in (tie.first, tie.second)}
    by_input: dict[str, list[TypedNode]] = {}
    for node in analysis.typing.nodes:
        for tensor in node.op.node.inputs:
            by_input.setdefault(tensor.name, []).append(node)
    found = []
    for number, node in enumerate(analysis.typing.nodes):
        linear = _linear(number, node, analysis, by_input)
        if linear is not None and linear.weight not in tied:
            found.append(linear)
    return found


def _linear(number: int, node: TypedNode, analysis: Analysis, by_input: Mapping[str, list[TypedNode]]) -> Linear | None:
    contraction = contraction_of(node)
    if contraction is None or contraction.weight is None or node.op.type not in ("MatMul", "Gemm", "Einsum"):
        return None
    op, outputs = node.op, node.outputs[0]
    if op.type == "Gemm" and (op.attribute("alpha", 1.0) != 1.0 or op.attribute("beta", 1.0) != 1.0 or op.attribute("transA", 0)):
        return None
    tensor = op.node.inputs[contraction.weight]
    while not isinstance(tensor, gs.Constant):
        if tensor.inputs[0].op != "Transpose" or len(tensor.outputs) > 1:
            return None
        tensor = tensor.inputs[0].inputs[0]
    uses = analysis.typing.uses[tensor.name]
    if len(uses) != 1 or tensor._values.dtype.kind != "f" or contraction.activation != 0:
        return None
    stored = [find(axis) for axis in uses[0].axes]
    inner = [find(axis) for axis in contraction.contracted]
    outer = [axis for axis in map(find, outputs) if any(axis is other for other in stored)]
    x_axes = [find(axis) for axis in op.axes[contraction.activation]]
    if len(inner) + len(outer) != len(stored) or not outer:
        return None
    if not _ends_with(x_axes, inner) or not _ends_with([find(a) for a in outputs], outer):
        return None
    position = {id(axis): i for i, axis in enumerate((*inner, *outer))}
    if len(position) != len(stored) or any(id(axis) not in position for axis in stored):
        return None
    y, bias = _bias(node, outer, analysis, by_input)
    return Linear(
        number,
        op.where,
        op.node.inputs[contraction.activation].name,
        y,
        tensor.name,
        tuple(position[id(axis)] for axis in stored),
        tuple(inner),
        tuple(outer),
        bias,
    )


def _ends_with(axes: Sequence[Axis], tail: Sequence[Axis]) -> bool:
    return len(axes) >= len(tail) and all(a is b for a, b in zip(axes[len(axes) - len(tail) :], tail))


def _bias(node: TypedNode, outer, analysis: Analysis, by_input) -> tuple[str, str | None]:
    """Return the output's name behind the bias, and the bias, where it is an initializer of this node alone."""
    output = node.op.node.outputs[0].name
    size = int(np.prod([axis.size[0] for axis in outer]))

    def own(tensor: gs.Tensor) -> bool:
        constant = isinstance(tensor, gs.Constant)
        return constant and len(analysis.typing.uses[tensor.name]) == 1 and int(np.prod(tensor._values.shape)) == size

    if node.op.type == "Gemm":
        bias = node.op.node.inputs[2] if node.op.has(2) else None
        return output, bias.name if bias is not None and own(bias) else None
    following = by_input.get(output, [])
    if len(following) == 1 and following[0].op.type == "Add":
        add = following[0].op.node
        other = add.inputs[1] if add.inputs[0].name == output else add.inputs[0]
        if own(other):
            return add.outputs[0].name, other.name
    return output, None


def sum_of(half: Half, analysis: Analysis) -> str | None:
    """Return the tensor in which a half block's branch joins the stream: its exit, or what a norm behind it reads."""
    clean = {half.entry}
    for number in half.nodes:
        node = analysis.typing.nodes[number]
        names = [t.name for t in node.op.node.inputs if not isinstance(t, gs.Constant)]
        passing = contraction_of(node) is None and any(name in clean for name in names)
        if passing and node.op.type in ("Add", "Sum") and not all(name in clean for name in names):
            return node.op.node.outputs[0].name
        if passing and node.op.type in ADDING:
            clean.update(t.name for t in node.op.node.outputs)
    return None


def last_writer(half: Half, joined: str, linears: Sequence[Linear], analysis: Analysis) -> Linear | None:
    """Return the last linear operator whose output is added, and nothing else, into the sum of a half block."""
    inside = set(half.nodes)
    nodes = [analysis.typing.nodes[number].op.node for number in half.nodes]
    reaches = {joined}
    for node in reversed(nodes):
        if node.op in ADDING and any(t.name in reaches for t in node.outputs):
            reaches.update(t.name for t in node.inputs if not isinstance(t, gs.Constant))
    writers = [linear for linear in linears if linear.number in inside and linear.y in reaches]
    return writers[-1] if writers else None


def same_axes(first: Sequence[Axis], second: Sequence[Axis]) -> bool:
    """Tell whether two lists of axes are made of the same atoms."""
    return [axis_key(axis) for axis in first] == [axis_key(axis) for axis in second]
