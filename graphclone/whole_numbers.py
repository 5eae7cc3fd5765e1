"""Which float operator an operator on whole numbers stands for, between two changes of scale, and what they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Plain:
    """A float operator: `given` lists where each operand stands, followed by its scale and zero point.

    `result` is where the scale and zero point of the result stand; `bias` is in units of both operands' scales.
    """

    type: str
    given: tuple[int, ...]
    result: int
    bias: int | None = None
    attributes: tuple[str, ...] = ()

    def operands(self, count: int) -> tuple[int, ...]:
        """Return where the operands of a node with `count` inputs stand; any number of them where none are listed."""
        return self.given or tuple(range(2, count, 3))


PLAIN = {
    "QLinearAdd": Plain("Add", (0, 3), 6),
    "QLinearMul": Plain("Mul", (0, 3), 6),
    "QLinearSigmoid": Plain("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": Plain("LeakyRelu", (0,), 3, attributes=("alpha",)),
    "QLinearSoftmax": Plain("Softmax", (0,), 3, attributes=("axis",)),
    "QLinearMatMul": Plain("MatMul", (0, 3), 6),
    "QLinearConv": Plain(
        "Conv", (0, 3), 6, 8, ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    ),
    "QGemm": Plain("Gemm", (0, 3), 7, 6, ("alpha", "transA", "transB")),
    "QLinearConcat": Plain("Concat", (), 0, attributes=("axis",)),
}  # fmt: skip


def plain_of(kind: str, domain: str | None, attributes: dict) -> Plain | None:
    """Return the float operator behind an operator on whole numbers, or None where it is none that is known.

    A Softmax as it was before opset 13, over several axes at once, is no Softmax of today.

    Example:
        >>> plain_of("QLinearAdd", "com.microsoft", {}).type
        'Add'
    """
    if domain not in (None, "", "com.microsoft") or (
        kind == "QLinearSoftmax" and int(attributes.get("opset", 13)) < 13
    ):
        return None
    return PLAIN.get(kind)


@dataclass(frozen=True)
class Step:
    """What one whole number is worth: a scale, a zero point (or none), and the axis they lie along, if any."""

    scale: gs.Tensor
    zero: gs.Tensor | None
    axis: int | None = None


def step_of(tensor: gs.Tensor) -> Step | None:
    """Return the step of a tensor of whole numbers, as what reads or makes it names it; None where nothing does.

    Example:
        step_of(dequantize.inputs[0]).scale is dequantize.inputs[1]
    """
    for reader in tensor.outputs:
        if reader.op == "DequantizeLinear" and reader.inputs[0] is tensor:
            return _step(reader.inputs[1:3], reader.attrs.get("axis"))
        plain = plain_of(reader.op, reader.domain, reader.attrs)
        for slot in plain.operands(len(reader.inputs)) if plain else ():
            if reader.inputs[slot] is tensor:
                return _step(reader.inputs[slot + 1 : slot + 3], scales_axis(reader.op, slot, reader.attrs))
    for producer in tensor.inputs:
        plain = plain_of(producer.op, producer.domain, producer.attrs)
        if plain and plain.result < len(producer.inputs) and not producer.inputs[plain.result].is_empty():
            return _step(producer.inputs[plain.result : plain.result + 2], None)
        if producer.op == "QuantizeLinear":
            return _step(producer.inputs[1:3], producer.attrs.get("axis"))
        if producer.op == "DynamicQuantizeLinear" and producer.outputs[0] is tensor:
            return _step(producer.outputs[1:3], None)
    return None


def _step(parts: Sequence[gs.Tensor], axis: int | None) -> Step:
    scale, zero = (*parts, None)[:2]
    return Step(scale, None if zero is None or zero.is_empty() else zero, axis)


def scales_axis(kind: str, slot: int, attributes: dict) -> int | None:
    """Return the axis that an operand's scales lie along, if it may have several: the second operand, a weight."""
    if slot != 3:
        return None
    return 0 if kind == "QLinearConv" or attributes.get("transB", 0) else -1
