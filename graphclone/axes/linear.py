"""Follow a tensor back along what it depends on linearly: the weights that could scale it, the scalars that do.

Only static axes matter here: a mask has one entry where an axis is dynamic, so tracing which part of a fused projection
reaches the queries moves a few thousand booleans, whatever Reshape, Split and Transpose lie between.
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, is_static
from graphclone.axes.contractions import contraction_of
from graphclone.axes.notation import Pattern, parse
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.errors import CutError

SAME = {"Cast", "CastLike", "Identity", "Neg", "Dropout", "Expand", "RotaryEmbedding"}
RESHAPING = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
SUMS = {"Add", "Sub", "Sum"}
AFFINE = {
    "LayerNormalization": (1, 2), "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3), "SkipSimplifiedLayerNormalization": (2,),
}  # fmt: skip
"""Slots of a norm's weight and bias."""


@dataclass(frozen=True)
class Gain:
    """An initializer's use that scales a tensor where `mask` holds; what is used is the stored value + `plus`."""

    node: gs.Node
    slot: int
    mask: np.ndarray
    plus: float = 0.0


@dataclass(frozen=True)
class Scalar:
    """A known number that a node multiplies (`effect` 1) or divides (-1) by; `slot` is an input or an attribute."""

    node: TypedNode
    slot: int | str
    effect: int
    value: float


@dataclass
class Trace:
    """What a walk found: weights to scale, scalars on the way, names of the tensors it passed, and why it failed."""

    gains: dict[tuple[int, int], Gain] = field(default_factory=dict)
    scalars: dict[tuple[int, int | str], Scalar] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    failure: CutError | None = None


def static_size(axis: Axis) -> int:
    """Return the size of an axis with one entry for everything dynamic in it.

    Example:
        >>> static_size(Axis((3, 5))), static_size(Axis((12, 12)))
        (1, 12)
    """
    axis = find(axis)
    if is_static(axis):
        return axis.size[0]
    return math.prod(static_size(part) for part in axis.parts) if axis.kind == "product" else 1


def scalar_at(node: TypedNode, slot: int) -> float | None:
    """Return the number that an input holds in every probe, or None."""
    value = node.op.value(slot)
    if value is None or any(np.size(v) != 1 for v in value) or value[0].dtype.kind not in "iuf":
        return None
    numbers = {float(np.ravel(v)[0]) for v in value}
    return numbers.pop() if len(numbers) == 1 else None


class Linear:
    """The producers of a typed graph, and what descends from a matrix or from initializers alone."""

    def __init__(self, typing: AxisTyping):
        self.typing = typing
        self.order: dict[str, int] = {}
        self.signal: set[str] = set()  # tensors that descend from a contraction with a matrix
        self.constant: set[str] = set()  # tensors that descend from initializers alone
        self.reduced: set[str] = set()  # tensors that a reduction has been part of
        for i, node in enumerate(typing.nodes):
            inputs = [t for t in node.op.node.inputs if not t.is_empty()]
            signal = any(t.name in self.signal for t in inputs) or _has_matrix(node)
            constant = all(isinstance(t, gs.Constant) or t.name in self.constant for t in inputs) and bool(inputs)
            reduced = node.op.type.startswith("Reduce") or any(t.name in self.reduced for t in inputs)
            for tensor in node.op.node.outputs:
                self.order[tensor.name] = i
                if signal:
                    self.signal.add(tensor.name)
                if constant:
                    self.constant.add(tensor.name)
                if reduced and not _has_matrix(node):
                    self.reduced.add(tensor.name)

    def producer(self, tensor: gs.Tensor) -> TypedNode | None:
        number = self.order.get(tensor.name)
        return None if number is None else self.typing.nodes[number]

    def shape(self, axes: Iterable[Axis] | None) -> tuple[int, ...]:
        if axes is None:
            raise CutError("the axes are not known")
        return tuple(static_size(axis) for axis in axes)

    def trace(self, node: TypedNode, slot: int, mask: np.ndarray | None = None) -> Trace:
        """Return what scales an input of a node, where `mask` holds (default: everywhere).

        Raises: CutError where no weight does (a norm without one, a graph input, a product of activations).
        """
        found = self.attempt(node, slot, mask)
        if found.failure is not None:
            raise found.failure
        return found

    def attempt(self, node: TypedNode, slot: int, mask: np.ndarray | None = None) -> Trace:
        """Return the same, as far as it goes; `failure` says why it ended."""
        walk = _Walk(self)
        try:
            walk.push(node, slot, np.ones(self.shape(node.op.axes[slot]), bool) if mask is None else mask)
            walk.run()
        except CutError as error:
            walk.trace.failure = error
        return walk.trace


def _has_matrix(node: TypedNode) -> bool:
    contraction = contraction_of(node) if node.text else None
    if contraction is None or contraction.weight is None or node.op.axes[contraction.weight] is None:
        return False
    return sum(static_size(axis) > 1 for axis in node.op.axes[contraction.weight]) >= 2


class _Walk:
    def __init__(self, linear: Linear):
        self.linear = linear
        self.trace = Trace()
        self.masks: dict[str, np.ndarray] = {}
        self.waiting: list[tuple[int, str]] = []

    def push(self, node: TypedNode, slot: int, mask: np.ndarray, plus: float = 0.0) -> None:
        """Go on behind an input; a mask that arrives twice (both members of a pair) is united."""
        tensor = node.op.node.inputs[slot]
        shape = self.linear.shape(node.op.axes[slot])
        if mask.shape != shape:
            raise CutError(f"{node.op.where} rearranges it in a way that is not followed")
        if isinstance(tensor, gs.Constant):
            key = (id(node.op.node), slot)
            before = self.trace.gains.get(key)
            mask = mask if before is None else mask | before.mask
            self.trace.gains[key] = Gain(node.op.node, slot, mask, plus)
            return
        self.trace.passed.add(tensor.name)
        if tensor.name not in self.linear.order:
            raise CutError(f"it comes from '{tensor.name}', which is not a weight")
        if tensor.name in self.masks:
            self.masks[tensor.name] = self.masks[tensor.name] | mask
        else:
            self.masks[tensor.name] = mask
            heapq.heappush(self.waiting, (-self.linear.order[tensor.name], tensor.name))

    def run(self) -> None:
        while self.waiting:
            order, name = heapq.heappop(self.waiting)
            self.step(self.linear.typing.nodes[-order], name, self.masks.pop(name))

    def step(self, node: TypedNode, name: str, mask: np.ndarray) -> None:
        op, type = node.op, node.op.type
        if type in SAME:
            self.spread(node, 0, mask)
        elif type == "Tile":
            self._tile(node, mask)
        elif type in RESHAPING:
            self.push(node, 0, self._fitted(node, mask.reshape(-1), self.linear.shape(op.axes[0])))
        elif type in SUMS:
            self._sum(node, mask)
        elif type == "Where":
            for slot in (1, 2):
                if scalar_at(node, slot) not in (0.0, -math.inf):
                    self.spread(node, slot, mask)
        elif type in ("Mul", "Div"):
            self._product(node, mask)
        elif type in AFFINE:
            for slot in AFFINE[type]:
                if op.has(slot):
                    self.spread(node, slot, mask)
        elif type == "Concat":
            self._concat(node, mask)
        elif type in ("Transpose", "Slice", "Split") or (type in ("Gather", "GatherND") and op.is_constant(1)):
            self.push(node, 0, self._moved_back(node, name, mask))
        elif type == "Gather":
            self.push(node, 0, np.ones(self.linear.shape(op.axes[0]), bool))
        elif type == "DequantizeLinear" and mask.all():
            self.push(node, 1, np.ones(self.linear.shape(op.axes[1]), bool))
        else:
            self._contraction(node, mask)

    def spread(self, node: TypedNode, slot: int, mask: np.ndarray, plus: float = 0.0) -> None:
        """Undo a broadcast."""
        shape = self.linear.shape(node.op.axes[slot])
        mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
        while mask.ndim > len(shape):
            mask = mask.any(0)
        for axis, size in enumerate(shape):
            if size == 1 and mask.shape[axis] > 1:
                mask = mask.any(axis, keepdims=True)
        self.push(node, slot, np.broadcast_to(mask, shape), plus)

    def _tile(self, node: TypedNode, mask: np.ndarray) -> None:
        shape = self.linear.shape(node.op.axes[0])
        if mask.ndim != len(shape) or any(whole % size for whole, size in zip(mask.shape, shape, strict=False)):
            raise CutError(f"{node.op.where} repeats it in a way that is not followed")
        for axis, size in enumerate(shape):
            mask = mask.reshape(*mask.shape[:axis], -1, size, *mask.shape[axis + 1 :]).any(axis)
        self.push(node, 0, mask)

    def _fitted(self, node: TypedNode, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if flat.size != math.prod(shape):
            raise CutError(f"{node.op.where} groups axes in a way that is not followed")
        return flat.reshape(shape)

    def _sum(self, node: TypedNode, mask: np.ndarray) -> None:
        slots = range(len(node.op.node.inputs))
        if node.op.node.outputs[0].name in self.linear.constant:
            for slot in slots:
                if (added := scalar_at(node, slot)) is not None and len(slots) == 2 and node.op.type == "Add":
                    return self.spread(node, 1 - slot, mask, plus=added)
        for slot in slots:
            self.spread(node, slot, mask)
        return None

    def _product(self, node: TypedNode, mask: np.ndarray) -> None:
        """Pass a scalar, stop at a vector of weights, pass a table; a normaliser undoes every scale above it."""
        divides = node.op.type == "Div"
        for slot in (1,) if divides else (1, 0):
            value = scalar_at(node, slot)
            if value is not None:
                key = (id(node.op.node), slot)
                self.trace.scalars[key] = Scalar(node, slot, -1 if divides else 1, value)
                return self.spread(node, 1 - slot, mask)
        names = [t.name for t in node.op.node.inputs]
        fixed = [isinstance(t, gs.Constant) or t.name in self.linear.constant for t in node.op.node.inputs]
        for slot in () if divides else (0, 1):
            if fixed[slot] and sum(size > 1 for size in self.linear.shape(node.op.axes[slot])) <= 1:
                return self.spread(node, slot, mask)
        signal = [not fixed[slot] and names[slot] in self.linear.signal for slot in (0, 1)]
        if signal[0] != signal[1] and (signal[0] or not divides):
            return self.spread(node, signal.index(True), mask)
        if any(name in self.linear.reduced for name in names):
            raise CutError(f"{node.op.where} normalises it, and no weight follows")
        raise CutError(f"{node.op.where} multiplies two activations")

    def _concat(self, node: TypedNode, mask: np.ndarray) -> None:
        axis, offset = node.op.axis(mask.ndim), 0
        for slot in range(len(node.op.node.inputs)):
            shape = self.linear.shape(node.op.axes[slot])
            if mask.shape[axis] == 1 or not is_static(node.outputs[0][axis]):
                part = mask
            else:
                part = np.take(mask, range(offset, offset + shape[axis]), axis)
                offset += shape[axis]
            if part.any():
                self.spread(node, slot, part)

    def _moved_back(self, node: TypedNode, name: str, mask: np.ndarray) -> np.ndarray:
        """Return the mask of the input, by moving the input's positions forward."""
        shape = self.linear.shape(node.op.axes[0])
        positions = np.arange(math.prod(shape)).reshape(shape)
        moved = self._move(node, name, positions)
        found = np.zeros(positions.size, bool)
        found[self._fitted(node, moved.reshape(-1), mask.shape)[mask]] = True
        return found.reshape(shape)

    def _move(self, node: TypedNode, name: str, positions: np.ndarray) -> np.ndarray:
        op, axes = node.op, node.op.axes[0]
        if op.type == "Transpose":
            return np.transpose(positions, op.attribute("perm", None))
        if op.type == "Gather":
            axis = op.axis(len(axes))
            return np.take(positions, op.value(1)[0], axis) if is_static(axes[axis]) else positions
        if op.type == "GatherND" and not op.attribute("batch_dims", 0):
            return positions[tuple(np.moveaxis(op.value(1)[0], -1, 0))]
        if op.type == "Split":
            axis, offset = op.axis(len(axes)), 0
            for output, tensor in zip(node.outputs, op.node.outputs, strict=False):
                size = static_size(output[axis])
                if tensor.name == name:
                    return np.take(positions, range(offset, offset + size), axis)
                offset += size
        starts, ends = op.integers("starts", 1), op.integers("ends", 2)
        which = op.integers("axes", 3) if op.has(3) or "axes" in op.node.attrs else range(len(starts or ()))
        steps = op.integers("steps", 4) if op.has(4) else [1] * len(starts or ())
        if starts is None or ends is None or which is None or steps is None:
            raise CutError(f"{op.where} has bounds that depend on data")
        index = [slice(None)] * len(axes)
        for start, end, axis, step in zip(starts, ends, which, steps, strict=False):
            if is_static(axes[axis]):
                index[axis] = slice(start, end if step > 0 or end >= -axes[axis].size[0] else None, step)
        return positions[tuple(index)]

    def _contraction(self, node: TypedNode, mask: np.ndarray) -> None:
        """Stop at a projection: scale what of its weight and bias makes the masked part."""
        contraction = contraction_of(node) if node.text else None
        if contraction is None or contraction.weight is None:
            raise CutError(f"{node.op.where} is not linear in a weight")
        signature = parse(node.text)
        outputs = _from_the_end(signature.outputs[0])
        for slot in range(len(node.op.node.inputs)):
            if slot == contraction.activation or not node.op.has(slot):
                continue
            shape = self.linear.shape(node.op.axes[slot])
            part, met = np.ones(shape, bool), False
            for place, pattern in _from_the_end(signature.inputs[slot]).items():
                axis = next((o for o, other in outputs.items() if _same(pattern, other)), None)
                if axis is None or shape[place] == 1:
                    continue
                line = mask.any(tuple(i for i in range(mask.ndim) if i != axis % mask.ndim))
                part = part & line.reshape([-1 if i == place % len(shape) else 1 for i in range(len(shape))])
                met = True
            if not met and not mask.all():
                raise CutError(f"{node.op.where} mixes it with something else")
            self.push(node, slot, part)


def _from_the_end(patterns: tuple[Pattern, ...]) -> dict[int, Pattern]:
    """Return patterns by position, counted from the end behind a broadcast."""
    spread = any(pattern.kind == "broadcast" for pattern in patterns)
    kept = [(i - len(patterns) if spread else i, p) for i, p in enumerate(patterns) if p.kind != "broadcast"]
    return {i: p for i, p in kept if not spread or all(q.kind != "broadcast" for q in patterns[i:])}


def _same(one: Pattern, other: Pattern) -> bool:
    if one.kind == other.kind == "name":
        return one.name == other.name
    return one.kind in ("product", "sum") and one == other
