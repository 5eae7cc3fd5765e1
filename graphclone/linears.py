"""Find the linear operators of a model that a least-squares fit can set: their input, output, weight and bias."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find, is_unit
from graphclone.axes.contractions import contracting_node, contraction_of
from graphclone.axes.typed import Axes, TypedNode
from graphclone.blocks import Half
from graphclone.dtypes import is_float
from graphclone.model import Model
from graphclone.weights import weight_of

ADDING = {"Add", "Identity", "Cast", "Dropout", "Reshape", "Sum"}
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv")
WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
TIED = "its weight is also looked up (a tied head); untie=true gives it its own"


@dataclass(frozen=True)
class Linear:
    """y = x W + b, of tensors x [..., K] and y [..., N].

    weight: its initializer; own: what that is called where tied heads have a copy of their own. order: how the
    initializer's axes come from [*K axes, *N axes]. inner, outer: those axes. bias: its initializer or None; y is named
    behind the bias. shared: a name common to all operators that multiply with one matrix. number: of the node.
    window: of a convolution, the attributes by which x [B, C, ...] is unfolded to rows of C x kernel.
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
    own: str = ""
    shared: str = ""
    window: Mapping[str, object] | None = field(default=None, compare=False)


def find_linears(analysis: Analysis, model: Model, untied: Mapping[str, str] | None = None) -> list[Linear]:
    """Return the linear operators whose weight only such operators read, in topological order.

    untied: {weight: name of the heads' own copy}, as `heads` finds them and a plan has them; other tied heads are left
    out.
    """
    return [found for found in _judged(analysis, model, untied or {}) if isinstance(found, Linear)]


def left_alone(analysis: Analysis, model: Model, untied: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return (node, reason) for each operator that multiplies with a weight and is not among `find_linears`."""
    return [found for found in _judged(analysis, model, untied or {}) if not isinstance(found, Linear)]


def heads(analysis: Analysis, model: Model) -> dict[str, str]:
    """Return {weight: name for a copy} of the weights that operators multiply with and lookups read: tied heads.

    A weight that the file stores a second time keeps its name.
    """
    found: dict[str, str] = {}
    for names in _classes(analysis, model):
        reads = {name: [contracting_node(use.node) is not None for use in analysis.typing.uses[name]] for name in names}
        if all(all(each) for each in reads.values()) or not any(any(each) for each in reads.values()):
            continue
        found.update({name: name if all(each) else f"{name}_untied" for name, each in reads.items() if any(each)})
    return found


def _classes(analysis: Analysis, model: Model) -> list[list[str]]:
    """Return the initializers by the matrix they hold."""
    first = {tie.second: tie.first for tie in model.ties}
    classes: dict[str, list[str]] = defaultdict(list)
    for name in analysis.typing.uses:
        classes[first.get(name, name)].append(name)
    return list(classes.values())


def _judged(analysis: Analysis, model: Model, untied: Mapping[str, str]) -> list[Linear | tuple[str, str]]:
    by_input: dict[str, list[TypedNode]] = {}
    for node in analysis.typing.nodes:
        for tensor in node.op.node.inputs:
            by_input.setdefault(tensor.name, []).append(node)
    judged = [
        (node.op.where, found)
        for number, node in enumerate(analysis.typing.nodes)
        if (found := _linear(number, node, analysis, by_input)) is not None
    ]
    uses = analysis.typing.uses
    class_of = {name: names for names in _classes(analysis, model) for name in names}
    count = Counter(found.weight for _, found in judged if isinstance(found, Linear))
    result: list[Linear | tuple[str, str]] = []
    for where, found in judged:
        if isinstance(found, Linear):
            names = class_of[found.weight]
            free = [name for name in names if name not in untied]
            alone = all(count[name] == len(uses[name]) for name in (free if found.weight in free else ()))
            found = _named(found, names[0], untied) if alone else (where, TIED)
        result.append((where, found) if isinstance(found, str) else found)
    return _with_own_biases(result, analysis)


def _named(linear: Linear, shared: str, untied: Mapping[str, str]) -> Linear:
    own = untied.get(linear.weight, linear.weight)
    return replace(linear, own=own, shared=f"{shared} untied" if linear.weight in untied else shared)


def _with_own_biases(found: list, analysis: Analysis) -> list:
    """Leave a bias to the operators of one matrix alone that all read it, and nothing else does; else there is none."""
    groups: dict[str, list[Linear]] = defaultdict(list)
    for linear in found:
        if isinstance(linear, Linear):
            groups[linear.shared].append(linear)
    result = []
    for linear in found:
        if isinstance(linear, Linear) and linear.bias is not None:
            names = [other.bias for other in groups[linear.shared]]
            counted = Counter(names)
            if None in counted or any(len(analysis.typing.uses[name]) != times for name, times in counted.items()):
                linear = replace(linear, bias=None, y=analysis.typing.nodes[linear.number].op.node.outputs[0].name)
        result.append(linear)
    return result


def _linear(
    number: int, node: TypedNode, analysis: Analysis, by_input: Mapping[str, list[TypedNode]]
) -> Linear | str | None:
    """Return a node's linear operator, None where it multiplies with no weight, or why it is none of ours."""
    contraction = contraction_of(node)
    if contraction is None or contraction.weight is None:
        return None
    op, outputs = node.op, node.outputs[0]
    if op.type not in PRODUCTS:
        return f"{op.type} is none of {', '.join(PRODUCTS)}"
    if op.type == "Conv" and op.attribute("group", 1) != 1:
        return "a convolution in groups"
    scaled = op.attribute("alpha", 1.0) != 1.0 or (op.has(2) and op.attribute("beta", 1.0) != 1.0)
    if op.type == "Gemm" and (scaled or op.attribute("transA", 0)):
        return "a Gemm with alpha, beta or transA"
    tensor, turned = op.node.inputs[contraction.weight], bool(op.attribute("transB", 0))
    while not isinstance(tensor, gs.Constant):
        if tensor.inputs[0].op != "Transpose" or len(tensor.outputs) > 1:
            return f"its weight comes out of {tensor.inputs[0].op}"
        tensor, turned = tensor.inputs[0].inputs[0], not turned
    if not is_float(weight_of(tensor).onnx_dtype):
        return "its weight is no float"
    if contraction.activation != 0:
        return "its weight is the first factor"
    uses = [use for use in analysis.typing.uses[tensor.name] if contracting_node(use.node) is op.node]
    stored = [find(axis) for axis in uses[0].axes] if uses else []
    if {id(find(axis)) for axis in contraction.shared if not is_unit(axis)} & {id(axis) for axis in stored}:
        return "it has a matrix for each entry of an axis that its input has too"
    if op.type == "Conv":
        inner, outer = stored[1:], stored[:1]
        window = {key: op.node.attrs[key] for key in WINDOW if key in op.node.attrs}
        fits = outputs is not None and find(outputs[1]) is outer[0] and find(op.axes[0][1]) is inner[0]
    else:
        inner, window = [find(axis) for axis in contraction.contracted], None
        outer = [axis for axis in map(find, outputs) if any(axis is other for other in stored)]
        fits = bool(outer) and _ends_with(op.axes[0], inner) and _ends_with(outputs, outer)
    position = {id(axis): i for i, axis in enumerate((*inner, *outer))}
    if op.type in ("MatMul", "Gemm") and len(stored) == 2:  # both axes may be one, as from the stream to the stream
        order = (1, 0) if turned else (0, 1)
    else:
        order = tuple(position.get(id(axis), -1) for axis in stored)
    if not fits or sorted(order) != list(range(len(inner) + len(outer))):
        return "its axes come in another order"
    y, bias = _bias(node, outer, by_input)
    return Linear(
        number, op.where, op.node.inputs[0].name, y, tensor.name, order, tuple(inner), tuple(outer), bias, window=window
    )


def _ends_with(axes: Sequence[Axis], tail: Sequence[Axis]) -> bool:
    return len(axes) >= len(tail) and all(
        find(a) is b for a, b in zip(axes[len(axes) - len(tail) :], tail, strict=True)
    )


def _bias(node: TypedNode, outer: Axes, by_input: Mapping[str, list[TypedNode]]) -> tuple[str, str | None]:
    """Return the output's name behind the bias, and the bias, where it is an initializer of the output's size."""
    output = node.op.node.outputs[0].name
    size = int(np.prod([axis.size[0] for axis in outer]))

    def fits(tensor: gs.Tensor) -> bool:
        return isinstance(tensor, gs.Constant) and int(np.prod(tensor._values.shape)) == size

    if node.op.type in ("Gemm", "Conv") and node.op.has(2):
        bias = node.op.node.inputs[2]
        return output, bias.name if fits(bias) else None
    following = by_input.get(output, [])
    if len(following) == 1 and following[0].op.type == "Add":
        add = following[0].op.node
        other = add.inputs[1] if add.inputs[0].name == output else add.inputs[0]
        sizes = tuple(axis.size[0] for axis in outer)
        if fits(other) and (node.op.type == "Conv" or tuple(other._values.shape)[-len(sizes) :] == sizes):
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
