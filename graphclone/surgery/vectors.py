"""Make a vector of sizes hold others, whether it is stored or computed.

A vector is a list of entries; an entry has a size for each probe, so one that differs between probes is dynamic.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Size
from graphclone.errors import CutError
from graphclone.surgery.child import Child
from graphclone.weights import weight_of


def patched(
    child: Child,
    node: gs.Node,
    tensor: gs.Tensor,
    stored: Sequence[Size],
    wanted: Sequence[Size],
    shape: Sequence[int],
    slot: int | str,
) -> gs.Tensor:
    """Return a tensor that holds `wanted` where this one holds `stored`: a constant, or new entries of a Concat.

    node: what reads it, in `slot`; new nodes go before it. shape: the tensor's.
    """
    if stored == wanted:
        return tensor
    if all(len(set(entry)) == 1 for entry in (*stored, *wanted)):
        dtype = weight_of(tensor).dtype if isinstance(tensor, gs.Constant) else np.int64
        return child.constant(node, slot, np.array([entry[0] for entry in wanted], dtype).reshape(shape))
    producer = tensor.inputs[0]
    if producer.op == "Concat":
        return _patched_concat(child, node, producer, stored, wanted)
    return rescaled(child, node, tensor, wanted, stored, shape)


def _patched_concat(child: Child, node: gs.Node, producer: gs.Node, stored, wanted) -> gs.Tensor:
    """Copy the Concat with the changed entries exchanged, so that the rest stays computed."""
    parts, position = [], 0
    for i, part in enumerate(producer.inputs):
        count = _length(child, part)
        here = slice(position, position + count)
        slot = f"{producer.op.lower()}_{i}"
        parts.append(patched(child, node, part, stored[here], wanted[here], (count,), slot))
        position += count
    output = gs.Variable(child.fresh(f"{producer.outputs[0].name}_cut"), np.int64)
    name = child.fresh_node(f"{producer.name}_cut")
    child.before[id(node)].append(gs.Node("Concat", name, dict(producer.attrs), parts, [output]))
    return output


def _length(child: Child, tensor: gs.Tensor) -> int:
    if isinstance(tensor, gs.Constant):
        return int(np.prod(weight_of(tensor).shape))
    return child.typing.types[tensor.name][0].size[0]


def rescaled(
    child: Child,
    node: gs.Node,
    tensor: gs.Tensor,
    wanted: Sequence[Size],
    stored: Sequence[Size],
    shape: Sequence[int],
) -> gs.Tensor:
    """Return tensor // d * m + n: exact, because dynamic sizes are never cut and static ones divide.

    node: new nodes go before it. wanted, stored: the entries after and before. shape: the tensor's.
    Raises: CutError where neither a ratio nor a difference makes the one of the other, whatever the dynamic sizes are.
    """
    lines = [_line(after, before, node) for after, before in zip(wanted, stored, strict=True)]
    steps = (
        ("Div", 1, [ratio.denominator for ratio, _ in lines]),
        ("Mul", 1, [ratio.numerator for ratio, _ in lines]),
        ("Add", 0, [more for _, more in lines]),
    )
    for op, neutral, numbers in steps:
        if set(numbers) == {neutral}:
            continue
        constant = child.constant(node, op.lower(), np.array(numbers, np.int64).reshape(shape))
        output = gs.Variable(child.fresh(f"{tensor.name}_{op.lower()}"), np.int64)
        name = child.fresh_node(f"{node.name}_{op.lower()}")
        child.before[id(node)].append(gs.Node(op, name, {}, [tensor, constant], [output]))
        tensor = output
    return tensor


def _line(wanted: Size, stored: Size, node: gs.Node) -> tuple[Fraction, int]:
    """Return (ratio, difference) that make a wanted entry of a stored one: one of the two suffices.

    A ratio where static factors were cut (batch x heads), a difference where a static part beside a dynamic one was
    (learned tokens in front of a sequence).
    """
    ratios = {Fraction(after, before) for after, before in zip(wanted, stored, strict=True) if before}
    if len(ratios) <= 1:
        return (ratios.pop() if ratios else Fraction(1)), 0
    differences = {after - before for after, before in zip(wanted, stored, strict=True)}
    if len(differences) == 1:
        return Fraction(1), differences.pop()
    raise CutError(
        f"cannot cut: {node.op} node '{node.name}' reads a size of which a part that is cut and a dynamic one cannot "
        f"be told apart ({stored[0]} and {stored[1]} in two runs would be {wanted[0]} and {wanted[1]}); "
        f"leave that part whole"
    )
