"""Operators that compute with whole numbers, as the float operators they stand for between two changes of scale."""

from collections.abc import Iterator

import numpy as np

from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import Result, Uses, new_op, new_value, rewrite
from graphclone.weights import Weight
from graphclone.whole_numbers import Plain, plain_of, scales_axis

OPSET = 21
"""Of the float operators that are made."""


def dequantize_operands(program: Program) -> None:
    """Put DequantizeLinear, the float operator and QuantizeLinear in the place of each operator on whole numbers."""

    def expand(op: Op, uses: Uses) -> Result:
        plain = plain_of(op.type, op.domain, op.attributes)
        return None if plain is None else list(_expanded(op, plain))

    rewrite(program, expand)


def _expanded(op: Op, plain: Plain) -> Iterator[Op]:
    given = plain.operands(len(op.inputs))
    operands = []
    for slot in given:
        operands.append(new_value(op[slot].name, (), None))
        inputs = [op[slot], op[slot + 1], op[slot + 2]]
        axis = scales_axis(op.type, slot, op.attributes)
        yield _made("DequantizeLinear", inputs, operands[-1], op, **({} if axis is None else {"axis": axis}))
    if plain.bias is not None and op[plain.bias] is not None:
        operands.append(_bias(op, plain, given))
    scale = op[plain.result]
    result = op.output if scale is None else new_value(op.output.name, (), None)
    attributes = {name: op.attributes[name] for name in plain.attributes if name in op.attributes}
    yield _made(plain.type, operands, result, op, **attributes)
    if scale is not None:
        yield _made("QuantizeLinear", [result, scale, op[plain.result + 1]], op.output, op)


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
