"""Which float operator an operator on whole numbers stands for, between two changes of scale."""

from dataclasses import dataclass


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


def scales_axis(kind: str, slot: int, attributes: dict) -> int | None:
    """Return the axis that an operand's scales lie along, if it may have several: the second operand, a weight."""
    if slot != 3:
        return None
    return 0 if kind == "QLinearConv" or attributes.get("transB", 0) else -1
