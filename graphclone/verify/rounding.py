"""Copies of a model whose activations are not rounded to few bits, so that a figure near zero means what it says.

Rounding turns a difference in the last bit of a sum, which another order of its terms makes, into a whole step of the
scale. Weights, and their scales and zero points, stay what they are. So does what a zero point at the least integer does:
it lets no negative number through, and quantizers drop the Relu before it.
"""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphclone.dtypes import integer_range, is_float
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.weights import Weight, weight_of
from graphclone.whole_numbers import plain_of, scales_axis

MOVING = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "Expand", "Tile", "Gather",
    "Identity", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
REAL = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
EXACT_PRODUCTS = {"MatMulNBits"}  # their `accuracy_level` lets onnxruntime round what they multiply


def rounds(model: Model) -> bool:
    """Tell whether a model rounds activations in a way that `unrounded` takes out."""
    nodes = [node for graph in walk(model.graph) for node in graph.nodes]
    return any(_is_rounding(node) or plain_of(node.op, node.domain, node.attrs) for node in nodes)


def unrounded(model: Model) -> Model:
    """Return a copy that computes with activations as they are where the model rounds them to few bits.

    QuantizeLinear up to the DequantizeLinear by the same scale behind it, DynamicQuantizeLinear before MatMulInteger
    and ConvInteger. Operators on whole numbers (QLinearMatMul) become DequantizeLinear, the float operator and
    QuantizeLinear first; what else computes with them (a scale per channel of activations) stays.
    """
    if not rounds(model):
        return model
    copy = model.copy()
    for graph in walk(copy.graph):
        names = _Names(graph)
        graph.nodes[:] = [new for node in graph.nodes for new in _expanded(node, names)]
        real: set[int] = set()  # ids of tensors that are not rounded any more
        rounding = [(node, _is_rounding(node)) for node in graph.nodes]
        graph.nodes[:] = [new for node, rounds in rounding for new in _rewritten(node, rounds, real, names)]
    return copy


def _is_rounding(node: gs.Node) -> bool:
    if node.op in EXACT_PRODUCTS:
        return node.attrs.get("accuracy_level", 0) != 1
    if node.op == "DynamicQuantizeLinear":
        return any(consumer.op in REAL for consumer in node.outputs[0].outputs)
    return node.op == "QuantizeLinear" and _can_stay_real(node)


def _can_stay_real(node: gs.Node) -> bool:
    """Tell whether all that is made of a quantized activation is moved and dequantized by the same scale."""
    step = _scale_and_zero(node)
    if step is None:
        return False
    waiting = list(node.outputs)
    while waiting:
        tensor = waiting.pop()
        if not tensor.outputs:
            return False  # a graph output
        for consumer in tensor.outputs:
            if consumer.op in MOVING and _moves_alone(consumer, tensor):
                waiting.extend(consumer.outputs)
            elif consumer.op != "DequantizeLinear" or _scale_and_zero(consumer) != step:
                return False
    return True


def _moves_alone(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Tell whether a node moves the entries of one tensor: where to, other inputs may say."""
    moved = node.inputs if node.op == "Concat" else node.inputs[:1]
    return all(source is tensor for source in moved)


def _scale_and_zero(node: gs.Node) -> tuple[float, float] | None:
    """Return the one scale and zero point of a node, or None where they are computed or lie along an axis."""
    found = []
    for slot, default in ((1, 1.0), (2, 0.0)):
        tensor = node.inputs[slot] if slot < len(node.inputs) and not node.inputs[slot].is_empty() else None
        if tensor is not None and (not isinstance(tensor, gs.Constant) or weight_of(tensor).size != 1):
            return None
        found.append(default if tensor is None else float(weight_of(tensor).load().reshape(-1)[0]))
    return found[0], found[1]


def _rewritten(node: gs.Node, rounds: bool, real: set[int], names: "_Names") -> Iterator[gs.Node]:
    if node.op == "QuantizeLinear" and rounds:
        _become_real(node, real)
        yield _positive(node, names) or _passing(node, names)
    elif node.op == "DequantizeLinear" and id(node.inputs[0]) in real:
        yield _passing(node, names)
    elif node.op in REAL and (source := _dynamic(node.inputs[0])) is not None:
        yield from _real_product(node, source, names)
    else:
        if node.op in MOVING and any(id(tensor) in real for tensor in node.inputs):
            _become_real(node, real)
        if node.op in EXACT_PRODUCTS:
            node.attrs["accuracy_level"] = 1
        yield node


def _expanded(node: gs.Node, names: "_Names") -> Iterator[gs.Node]:
    """Yield DequantizeLinear, the float operator and QuantizeLinear in the place of an operator on whole numbers."""
    plain = plain_of(node.op, node.domain, node.attrs)
    if plain is None:
        yield node
        return
    inputs, output = list(node.inputs), node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    given = plain.operands(len(inputs))
    operands = []
    for slot in given:
        axis = scales_axis(node.op, slot, node.attrs)
        operands.append(gs.Variable(names.new(inputs[slot].name), np.float32))
        attributes = {} if axis is None else {"axis": axis}
        name = names.new(f"{node.name}_DequantizeLinear")
        yield gs.Node("DequantizeLinear", name, attributes, inputs[slot : slot + 3], [operands[-1]])
    if plain.bias is not None and plain.bias < len(inputs) and not inputs[plain.bias].is_empty():
        scales = [inputs[slot + 1] for slot in given]
        operands.append(_real_bias(inputs[plain.bias], scales, node.attrs.get("alpha", 1.0), names))
    attributes = {name: node.attrs[name] for name in plain.attributes if name in node.attrs}
    rounds = plain.result < len(inputs) and not inputs[plain.result].is_empty()
    result = gs.Variable(names.new(output.name), np.float32) if rounds else output
    yield gs.Node(plain.type, names.new(node.name), attributes, operands, [result])
    if rounds:
        step = inputs[plain.result : plain.result + 2]
        yield gs.Node("QuantizeLinear", names.new(f"{node.name}_QuantizeLinear"), {}, [result, *step], [output])


def _real_bias(bias: gs.Tensor, scales: list[gs.Tensor], alpha: float, names: "_Names") -> gs.Tensor:
    """Return a stored bias, in units of both operands' scales, as the floats it stands for."""
    whole, first, second = (weight_of(tensor).load() for tensor in (bias, *scales))
    scale = np.float32(alpha) * first.reshape(-1) * second.reshape(-1)
    values = whole.astype(np.float32) * scale.astype(np.float32)
    return gs.Constant(names.new(bias.name), Weight.of(values))


def _become_real(node: gs.Node, real: set[int]) -> None:
    for tensor in node.outputs:
        tensor.dtype = np.float32
        real.add(id(tensor))


def _dynamic(tensor: gs.Tensor) -> gs.Node | None:
    producer = tensor.inputs[0] if tensor.inputs else None
    return producer if producer is not None and producer.op == "DynamicQuantizeLinear" else None


def _passing(node: gs.Node, names: "_Names") -> gs.Node:
    """Return a node that gives its first input on, in a node's place."""
    source, output = node.inputs[0], node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    return gs.Node("Identity", names.new(node.name), {}, [source], [output])


def _positive(node: gs.Node, names: "_Names") -> gs.Node | None:
    """Return the Relu that a QuantizeLinear is besides rounding, if its zero point is the least integer, or None."""
    zero = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    kind = weight_of(zero).onnx_dtype if zero is not None else node.attrs.get("output_dtype") or TensorProto.UINT8
    scale, place = _scale_and_zero(node)
    if is_float(kind) or place != integer_range(kind)[0] or not np.isfinite(scale):
        return None
    relu = _passing(node, names)
    relu.op = "Relu"
    return relu


def _real_product(node: gs.Node, source: gs.Node, names: "_Names") -> list[gs.Node]:
    """Return the nodes of (x / s) (W - z): what a product of integers with a dynamic scale is without the rounding."""
    output, weight = node.outputs[0], node.inputs[1]
    zero = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
    made: list[gs.Node] = []

    def step(op: str, inputs: list[gs.Tensor], attributes: dict | None = None) -> gs.Variable:
        made.append(gs.Node(op, names.new(f"{node.name}_{op}"), attributes or {}, inputs))
        made[-1].outputs.append(gs.Variable(names.new(output.name), np.float32))
        return made[-1].outputs[0]

    as_float = {"to": TensorProto.FLOAT}
    left = step("Div", [source.inputs[0], source.outputs[1]])
    right = step("Cast", [weight], as_float)
    if zero is not None:
        offset = step("Cast", [zero], as_float)
        right = step("Sub", [right, offset])
    node.inputs.clear()
    node.outputs.clear()
    output.dtype = np.float32
    made.append(gs.Node(REAL[node.op], names.new(node.name), dict(node.attrs), [left, right], [output]))
    return made


class _Names:
    """Names that a graph does not have yet."""

    def __init__(self, graph: gs.Graph):
        self.taken = {tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
        self.taken |= {node.name for node in graph.nodes}

    def new(self, wanted: str) -> str:
        number = len(self.taken)
        while f"{wanted}_{number}" in self.taken:
            number += 1
        self.taken.add(f"{wanted}_{number}")
        return f"{wanted}_{number}"
