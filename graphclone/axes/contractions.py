"""Which nodes contract: the axes they sum over, and the weight they do it with."""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis
from graphclone.axes.notation import Pattern, parse
from graphclone.axes.typed import TypedNode

CONTRACTING = {
    "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "FusedMatMul", "FusedGemm", "MatMulInteger", "QLinearMatMul",
    "FusedConv", "NhwcFusedConv",
}  # fmt: skip
REARRANGING = {
    "Transpose", "Reshape", "Cast", "DequantizeLinear", "Squeeze", "Unsqueeze", "Identity", "Gather", "GatherND", "Slice",
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
    packed = op.type == "Attention" and op.domain == "com.microsoft"
    if not node.text or not node.constrains or (op.type not in CONTRACTING and not packed):
        return None
    signature = parse(node.text)
    if len(signature.inputs) < 2:
        return None
    second = 3 if op.type == "QLinearMatMul" else 1
    first_names, second_names = (_names(signature.inputs[slot]) for slot in (0, second))
    output_names = _names(signature.outputs[0])
    contracted = [n for n in first_names if n in second_names and n not in output_names]
    shared = [n for n in first_names if n in second_names and n in output_names]
    spread = []
    if any(p.kind == "broadcast" for p in signature.outputs[0]) and node.outputs[0]:
        spread = node.outputs[0][: len(node.outputs[0]) - len(signature.outputs[0]) + 1]
    weights = [slot for slot in (0, second) if derives_from_constant(op.node.inputs[slot])]
    weight = weights[-1] if len(weights) < 2 and weights else (second if weights else None)
    activation = 0 if weight != 0 else second
    bound = node.bound
    return Contraction(
        tuple(bound[n] for n in contracted if n in bound),
        (*spread, *(bound[n] for n in shared if n in bound)),
        activation,
        weight,
    )


def derives_from_constant(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is an initializer, or rearranged, picked, dequantized or cast from one."""
    for _ in range(8):
        if isinstance(tensor, gs.Constant):
            return True
        if not tensor.inputs:
            return False
        producer = tensor.inputs[0]
        if producer.op not in REARRANGING:
            return False
        tensor = producer.inputs[0]
    return False


def _names(patterns: tuple[Pattern, ...]) -> list[str]:
    names = []
    for pattern in patterns:
        if pattern.kind == "name":
            names.append(pattern.name)
        else:
            names.extend(_names(pattern.parts))
    return names
