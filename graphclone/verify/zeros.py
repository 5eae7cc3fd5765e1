"""Where setting weights to zero does not set to zero what is computed of them: exp(0), elu(0) + 1."""

from graphclone.axes.axis import Axis, free_leaves, leaves
from graphclone.axes.contractions import contraction_of
from graphclone.axes.typed import AxisTyping, TypedNode

MOVING = {
    "Acos", "Cos", "Cosh", "Equal", "Exp", "GreaterOrEqual", "HardSigmoid", "LessOrEqual", "Log", "LogSoftmax", "Not",
    "Reciprocal", "Sigmoid", "Softmax", "Softplus",
}  # fmt: skip
"""Operators that give something else than zero for zero."""
ADDING = {"Add", "Sub", "Sum", "Max", "Min", "Mean", "Where"}


def summed_beside_zero(typing: AxisTyping) -> list[Axis]:
    """Return axes over which two activations are contracted of which neither is zero where its weights are.

    Linear attention's feature maps are such: a dropped index would add nothing to the sum, a zeroed one adds a
    constant.

    Example:
        summed_beside_zero(graphclone.analyse(model).typing)
    """
    moved: set[str] = set()  # tensors that may be something else than zero where their weights are zero
    found: list[Axis] = []
    for node in typing.nodes:
        reads = [tensor.name for tensor in node.op.node.inputs]
        carried = [name in moved for name, axes in zip(reads, node.op.axes, strict=True) if _is_wide(axes)]
        contraction = contraction_of(node)
        if contraction is not None and contraction.weight is not None:
            continue
        if contraction is not None and all(name in moved for name in reads[:2]):
            found += contraction.contracted
        through = all(carried) if node.op.type == "Mul" else any(carried)
        if (through and carried) or node.op.type in MOVING or _adds_alike(node):
            moved.update(tensor.name for tensor in node.op.node.outputs)
    return found


def _is_wide(axes: list[Axis] | None) -> bool:
    return any(free_leaves(axis) for axis in axes or ())


def _adds_alike(node: TypedNode) -> bool:
    """Tell whether a node adds the same to each index of a width: a number, or a vector along other axes."""
    if node.op.type not in ADDING or not node.outputs[0]:
        return False
    widths = {id(leaf) for axis in node.outputs[0] for leaf in free_leaves(axis)}
    operands = node.op.axes[1:] if node.op.type == "Where" else node.op.axes
    return any(widths - {id(leaf) for axis in axes for leaf in leaves(axis)} for axes in operands if axes is not None)
