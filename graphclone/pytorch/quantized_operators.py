"""Operators that compute with whole numbers, as the float operators they stand for between two changes of scale."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import Result, Uses, new_op, new_value, rewrite
from graphclone.weights import Weight

OPSET = 21
"""Of the float operators that are made."""


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


def dequantize_operands(program: Program) -> None:
    """Put DequantizeLinear, the float operator and QuantizeLinear in the place of each operator on whole numbers."""

    def expand(op: Op, uses: Uses) -> Result:
        plain = PLAIN.get(op.type) if op.type.startswith("Q") and op.domain in ("", "com.microsoft") else None
        if plain is None or (op.type == "QLinearSoftmax" and int(op.attribute("opset", 13)) < 13):
            return None
        return list(_expanded(op, plain))

    rewrite(program, expand)


def _expanded(op: Op, plain: Plain) -> Iterator[Op]:
    given = plain.given or tuple(range(2, len(op.inputs), 3))
    operands = []
    for slot in given:
        operands.append(new_value(op[slot].name, (), None))
        inputs = [op[slot], op[slot + 1], op[slot + 2]]
        axis = _axis(op, slot)
        yield _made("DequantizeLinear", inputs, operands[-1], op, **({} if axis is None else {"axis": axis}))
    if plain.bias is not None and op[plain.bias] is not None:
        operands.append(_bias(op, plain, given))
    scale = op[plain.result]
    result = op.output if scale is None else new_value(op.output.name, (), None)
    attributes = {name: op.attributes[name] for name in plain.attributes if name in op.attributes}
    yield _made(plain.type, operands, result, op, **attributes)
    if scale is not None:
        yield _made("QuantizeLinear", [result, scale, op[plain.result + 1]], op.output, op)


def _axis(op: Op, slot: int) -> int | None:
    """Return the axis that an operand's scales lie along, if it may be another than the last."""
    if slot != 3:
        return None
    return 0 if op.type == "QLinearConv" or op.attribute("transB", 0) else -1


def _bias(op: Op, plain: Plain, given: tuple[int, ...]) -> Value:
    """Return a stored bias as the floats it stands for."""
    stored = [op[slot] for slot in (plain.bias, *(slot + 1 for slot in given))]
    if any(value.weight is None for value in stored):
        return stored[0]
    whole, first, second = (value.weight.load() for value in stored)
    scale = np.float32(op.attribute("alpha", 1.0)) * first.reshape(-1) * second.reshape(-1)
    return Value(stored[0].name, weight=Weight.of(whole.astype(np.float32) * scale.astype(np.float32)))


def _made(kind: str, inputs: list[Value | None], output: Value, like: Op, **attributes) -> Op:
    op = new_op(kind, inputs, output, like, domain="", **attributes)
    op.opset = OPSET
    return op
