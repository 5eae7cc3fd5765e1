"""Find sizes that hide in floats: divisors and multipliers of a statistic that equal the size of what it runs over.

A norm written as ReduceSum and a division by the constant 64.0 (Keras on JAX) or a product with 1/64 (jax2tf) gives
silently wrong outputs after a cut, and no permutation shows it. What counts is where the number stands - next to a
reduction over that axis, or as a uniform weight contracted with it - and only then its value. The scale of queries
times keys is none of these: it keeps the parent's value.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, Size, free_leaves, multiply
from graphclone.axes.notation import parse
from graphclone.axes.typed import AxisTyping, Site, TypedNode
from graphclone.dtypes import is_float
from graphclone.weights import weight_of

REDUCTIONS = {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceMean"}
PASSING = {"Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Expand", "Sqrt", "Abs"}
POWERS = (1.0, -1.0, 0.5, -0.5)
MAX_UNIFORM = 1 << 20
TOLERANCE = 1e-5


def find_denominators(typing: AxisTyping) -> list[Site]:
    """Return a site for every number that follows the size of the axes a statistic runs over."""
    by_input: dict[str, list[TypedNode]] = {}
    by_output: dict[str, TypedNode] = {}
    for node in typing.nodes:
        for tensor in node.op.node.inputs:
            if not isinstance(tensor, gs.Constant):
                by_input.setdefault(tensor.name, []).append(node)
        for tensor in node.op.node.outputs:
            by_output[tensor.name] = node
    sites: dict[tuple[int, int], Site] = {}
    for node in typing.nodes:
        if node.op.type in REDUCTIONS and (axes := _reduced(node)):
            size = multiply(axis.size for axis in axes)
            for other, slot in _neighbours(node, by_input, by_output):
                if (match := _matches(other.op.value(slot), size)) is not None:
                    sites[id(other.op.node), slot] = _site(other, slot, axes, *match)
        elif node.op.type in ("MatMul", "Gemm", "Einsum"):
            for site in _uniform(node):
                sites[id(node.op.node), site.slot] = site
    return list(sites.values())


def _site(node: TypedNode, slot: int, axes: Sequence[Axis], power: float, less: int) -> Site:
    kind = "denominator" if not less else "denominator_less_one"
    return Site(node.op, slot, kind, tuple(axes), value=power)


def _reduced(node: TypedNode) -> list[Axis]:
    """Return the axes a reduction runs over, where any of them may be cut."""
    if not node.text:
        return []
    patterns = parse(node.text).inputs[0]
    axes = [node.bound[p.name] for p in patterns if p.statistic and p.name in node.bound]
    return axes if any(free_leaves(axis) for axis in axes) else []


def _neighbours(node: TypedNode, by_input, by_output) -> Iterator[tuple[TypedNode, int]]:
    """Yield the (node, slot) pairs of scalars that multiply or divide what a reduction gives, or what it takes."""
    waiting, seen = [node.op.node.outputs[0].name], set()
    while waiting:
        name = waiting.pop()
        for consumer in by_input.get(name, ()):
            if consumer.op.type in PASSING and consumer.op.node.outputs[0].name not in seen:
                seen.add(consumer.op.node.outputs[0].name)
                waiting.append(consumer.op.node.outputs[0].name)
            elif consumer.op.type in ("Div", "Mul"):
                slot = 1 if consumer.op.node.inputs[0].name == name else 0
                if slot == 1 or consumer.op.type == "Mul":
                    yield consumer, slot
                    output = consumer.op.node.outputs[0].name
                    if consumer.op.value(slot) is not None and output not in seen:
                        seen.add(output)
                        waiting.append(output)
    before = by_output.get(node.op.node.inputs[0].name)
    if before is not None and before.op.type in ("Div", "Mul"):
        for slot in (0, 1):
            if slot == 1 or before.op.type == "Mul":
                yield before, slot


def _matches(value, size: Size) -> tuple[float, int] | None:
    """Return (power, less) such that the value is (size - less) ** power in every probe."""
    if value is None or any(np.size(entry) != 1 for entry in value) or value[0].dtype.kind not in "iuf":
        return None
    for less in (0, 1):
        for power in POWERS:
            wanted = [float(entry - less) ** power if entry > less else np.nan for entry in size]
            if all(abs(float(v.reshape(-1)[0]) - w) <= TOLERANCE * abs(w) for v, w in zip(value, wanted, strict=True)):
                return power, less
    return None


def _uniform(node: TypedNode) -> Iterator[Site]:
    """Yield the operands of a contraction that hold 1 / size everywhere: a mean written as a product."""
    signature = parse(node.text) if node.text else None
    for slot in (0, 1):
        if signature is None or not node.op.is_constant(slot):
            continue
        weight = weight_of(node.op.node.inputs[slot])
        if not is_float(weight.onnx_dtype) or weight.size > MAX_UNIFORM:
            continue
        names = {p.name for patterns in signature.inputs[:2] for p in patterns if p.kind == "name"}
        shared = [n for n in names if all(any(p.name == n for p in ps) for ps in signature.inputs[:2])]
        summed = [n for n in shared if not any(p.name == n for p in signature.outputs[0])]
        axes = [node.bound[n] for n in summed if n in node.bound]
        if not any(free_leaves(axis) for axis in axes):
            continue
        size = multiply(axis.size for axis in axes)
        sample = np.frombuffer(weight.sample(64)[: weight.dtype.itemsize * 4], weight.dtype)
        if sample.size and abs(float(sample[0]) * size[0] - 1) < TOLERANCE and np.ptp(weight.load()) == 0:
            yield Site(node.op, slot, "denominator", tuple(axes), value=-1.0)
