"""Which nodes contract: the axes they sum over, and the weight they do it with."""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis
from graphclone.axes.notation import Pattern, names_in, parse
from graphclone.axes.typed import TypedNode, Use
from graphclone.dtypes import holds_weights
from graphclone.weights import weight_of

CONTRACTING = {
    "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "FusedMatMul", "FusedGemm", "MatMulInteger", "QLinearMatMul",
    "FusedConv", "MatMulNBits", "QGemm", "QLinearConv", "ConvInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}  # fmt: skip
BLOCKWISE = {"MatMulNBits"}
SECOND_OPERAND = {"QLinearMatMul": 3, "QGemm": 3, "QLinearConv": 3}
REARRANGING = {
    "Cast", "DequantizeLinear", "Gather", "GatherND", "Identity", "QuantizeLinear", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contraction:
    """contracted: axes summed over. shared: axes of both operands and the output (batch, heads).
    activation, weight: slots of the operands; weight is None where both are activations."""

    contracted: tuple[Axis, ...]
    shared: tuple[Axis, ...]
    activation: int
    weight: int | None


def contraction_of(node: TypedNode) -> Contraction | None:
    """Return how a node contracts, or None; com.microsoft.Attention contracts its input with its weight."""
    op = node.op
    packed = op.type in ("Attention", "QAttention") and op.domain == "com.microsoft"
    if not node.text or not node.constrains or (op.type not in CONTRACTING and not packed):
        return None
    signature = parse(node.text)
    if len(signature.inputs) < 2:
        return None
    second = SECOND_OPERAND.get(op.type, 1)
    first_names, second_names = (list(names_in(*signature.inputs[slot])) for slot in (0, second))
    output_names = list(names_in(*signature.outputs[0]))
    contracted = [n for n in first_names if n in second_names and n not in output_names]
    shared = [n for n in first_names if n in second_names and n in output_names]
    spread = []
    if any(p.kind == "broadcast" for p in signature.outputs[0]) and node.outputs[0]:
        spread = node.outputs[0][: len(node.outputs[0]) - len(signature.outputs[0]) + 1]
    weights = [slot for slot in (0, second) if derives_from_constant(op.node.inputs[slot])]
    weight = weights[-1] if len(weights) < 2 and weights else (second if weights else None)
    activation = 0 if weight != 0 else second
    bound = node.bound
    axes = tuple(bound[n] for n in contracted if n in bound)
    return Contraction(
        _whole(node, signature.inputs[0], output_names) if op.type in BLOCKWISE else axes,
        (*spread, *(bound[n] for n in shared if n in bound)),
        activation,
        weight,
    )


def _whole(node: TypedNode, patterns: tuple[Pattern, ...], kept: list[str]) -> tuple[Axis, ...]:
    """Return the axes of the first input that do not reach the output, whole, whatever blocks they consist of."""
    places = [i - len(patterns) for i, pattern in enumerate(patterns) if pattern.kind != "broadcast"]
    return tuple(node.op.axes[0][i] for i in places if not set(names_in(patterns[i])) & set(kept))


def derives_from_constant(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is an initializer, or rearranged, picked, dequantized or cast from one."""
    return constant_behind(tensor) is not None


def constant_behind(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the initializer that a tensor is, or is rearranged, picked, dequantized or cast from."""
    for _ in range(16):
        if isinstance(tensor, gs.Constant):
            return tensor
        if not tensor.inputs:
            return None
        producer = tensor.inputs[0]
        if producer.op not in REARRANGING:
            return None
        tensor = producer.inputs[0]
    return None


def is_weight(use: Use) -> bool:
    """Tell whether a use of an initializer reads numbers that were learned, not indices: also those of few bits."""
    if use.node is None:
        return False
    weight = weight_of(use.node.inputs[use.slot])
    return holds_weights(weight.onnx_dtype) or (use.node.op == "DequantizeLinear" and use.slot == 0)


def contracting_node(node: gs.Node | None) -> gs.Node | None:
    """Return what contracts an initializer that a node reads: the node, or what reads its Transpose; else None."""
    while node is not None and node.op == "Transpose":
        readers = node.outputs[0].outputs
        node = readers[0] if len(readers) == 1 else None
    return node if node is not None and node.op in CONTRACTING else None
