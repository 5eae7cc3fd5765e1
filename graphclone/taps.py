"""Where the importance of each dimension is measured, and which weights read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find, is_static, leaves
from graphclone.axes.contractions import SECOND_OPERAND, Contraction, contraction_of, derives_from_constant
from graphclone.axes.typed import TypedNode
from graphclone.calibration.taps import Span, Tap
from graphclone.dimensions import Dimension, axis_key
from graphclone.resolution import half_names


@dataclass(frozen=True, slots=True)
class Reading:
    """A tap, the axis it runs over, and the initializer (with its axes) that reads the tapped tensor, if any."""

    tap: Tap
    axis: Axis
    weight: str | None = None
    weight_axes: tuple[Axis, ...] = ()


@dataclass(frozen=True, slots=True)
class NormInput:
    """A normalisation over a stack's width: the tap on its input, its axis, its scale initializer."""

    tap: Tap
    axis: Axis
    gain: str
    centred: bool


def readings(analysis: Analysis) -> dict[str, tuple[Reading, ...]]:
    """Return where each free dimension is measured, by its name.

    The residual stream is read at every point of its stacks; any other dimension where a weight contracts it (the
    context before the attention output, the hidden units before the FFN's second matrix), else where two activations
    do (queries and keys), else at the first activation that carries it. Source: arXiv 2312.09299, section 4.1.
    """
    finder = _Finder(analysis)
    return {d.name: finder.readings(d) for d in analysis.dimensions if d.locked is None and d.role != "vocab"}


def all_taps(analysis: Analysis) -> tuple[Tap, ...]:
    """Return every tap that ranking and rescaling may ask for, each once."""
    taps = [reading.tap for found in readings(analysis).values() for reading in found]
    return tuple(dict.fromkeys(taps + [norm.tap for norm in norm_inputs(analysis)]))


def spans(analysis: Analysis) -> tuple[Span, ...]:
    """Return the blocks, and half blocks of blocks that have several, as spans of the residual stream."""
    found = []
    for stack in analysis.stacks:
        for block in stack.blocks:
            found.append(Span(f"{stack.prefix}blocks.{block.index}", block.entry, block.exit))
            if len(block.halves) > 1:
                found += [Span(name, half.entry, half.exit) for name, half in half_names(stack, block)]
    return tuple(found)


def norm_inputs(analysis: Analysis) -> tuple[NormInput, ...]:
    """Return the normalisations over the width of a stack that have a scale initializer of their own."""
    widths = {axis_key(axis) for d in analysis.dimensions if d.role == "hidden" for axis in d.axes}
    found = []
    for node in analysis.typing.nodes:
        op = node.op
        slots = NORMS.get(op.type)
        if slots is None or not node.constrains or not op.axes or not op.axes[0] or not op.is_constant(slots):
            continue
        axis = op.axes[0][-1]
        if axis_key(axis) not in widths:
            continue
        position = len(op.axes[0]) - 1
        tensor = op.node.inputs[0].name
        if op.type.startswith("Skip") and len(node.outputs) > 3 and op.wants(3):
            tensor = op.node.outputs[3].name
        centred = op.type in ("LayerNormalization", "SkipLayerNormalization")
        found.append(NormInput(Tap(tensor, position), axis, op.node.inputs[slots].name, centred))
    return tuple(found) + _decomposed_norms(analysis, widths)


NORMS = {
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
}


def _decomposed_norms(analysis: Analysis, widths: set) -> tuple[NormInput, ...]:
    """Find norms written out: a mean over the width of a square of x, and a vector that scales what x becomes."""
    by_output = {t.name: n for n in analysis.typing.nodes for t in n.op.node.outputs}
    found = []
    for node in analysis.typing.nodes:
        op = node.op
        if op.type != "ReduceMean" or not op.axes[0] or axis_key(op.axes[0][-1]) not in widths:
            continue
        square = by_output.get(op.node.inputs[0].name)
        if square is None or square.op.type not in ("Pow", "Mul"):
            continue
        source, centred = square.op.node.inputs[0], False
        while (producer := by_output.get(source.name)) is not None and producer.op.type in ("Cast", "Sub"):
            centred |= producer.op.type == "Sub"
            source = producer.op.node.inputs[0]
        gain = _gain_after(op.node, analysis, widths)
        if gain is not None:
            found.append(NormInput(Tap(source.name, len(op.axes[0]) - 1), op.axes[0][-1], gain, centred))
    return tuple(found)


def _gain_after(node: gs.Node, analysis: Analysis, widths: set) -> str | None:
    """Return the vector along the width that multiplies what a statistic normalises, close behind it."""
    tensors = list(node.outputs)
    for _ in range(8):
        following = [consumer for tensor in tensors for consumer in tensor.outputs]
        for consumer in following:
            if consumer.op != "Mul":
                continue
            for tensor in consumer.inputs:
                if isinstance(tensor, gs.Constant):
                    uses = analysis.typing.uses[tensor.name]
                    axes = next((use.axes for use in uses if use.node is consumer), [])
                    if axes and axis_key(axes[-1]) in widths:
                        return tensor.name
        tensors = [tensor for consumer in following for tensor in consumer.outputs]
    return None


class _Finder:
    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        self.nodes: Sequence[TypedNode] = [n for n in analysis.typing.nodes if n.constrains and n.text]
        self.contractions: list[Contraction | None] = [contraction_of(node) for node in self.nodes]
        self.points = {point: stack for stack in analysis.stacks for point in stack.points}
        self.by_leaf: dict[int, list[int]] = {}
        for i, contraction in enumerate(self.contractions):
            for axis in contraction.contracted if contraction else ():
                for leaf in leaves(axis):
                    self.by_leaf.setdefault(id(leaf), []).append(i)

    def readings(self, dimension: Dimension) -> tuple[Reading, ...]:
        keys = {axis_key(axis) for axis in dimension.axes}
        if dimension.role == "hidden":
            return tuple(found for point in self.points for found in self._stream(point, keys))
        atoms = {id(leaf) for axis in dimension.axes for leaf in leaves(axis)}
        hits = sorted({i for atom in atoms for i in self.by_leaf.get(atom, ())})
        with_weight = [i for i in hits if self.contractions[i].weight is not None]
        found = [reading for i in with_weight or hits for reading in self._contracted(i, atoms)]
        return tuple(dict.fromkeys(found)) or self._anywhere(atoms)

    def _stream(self, point: str, keys: set) -> list[Reading]:
        axes = self.analysis.typing.types[point]
        return [Reading(Tap(point, i), axis) for i, axis in enumerate(axes) if axis_key(axis) in keys]

    def _contracted(self, index: int, atoms: set[int]) -> list[Reading]:
        node, contraction = self.nodes[index], self.contractions[index]
        slots = [contraction.activation]
        if contraction.weight is None:
            slots = [0, SECOND_OPERAND.get(node.op.type, 1)]
        found = []
        for slot in slots:
            tensor, axes = node.op.node.inputs[slot], node.op.axes[slot]
            if isinstance(tensor, gs.Constant) or axes is None or derives_from_constant(tensor):
                continue
            for i, axis in enumerate(axes):
                if is_static(axis) and atoms & {id(leaf) for leaf in leaves(axis)}:
                    weight, weight_axes = self._reader(node, contraction)
                    found.append(Reading(Tap(tensor.name, i), axis, weight, weight_axes))
        return found

    def _reader(self, node: TypedNode, contraction: Contraction) -> tuple[str | None, tuple[Axis, ...]]:
        """Return the initializer a contraction reads with, where it is one directly or through a Transpose."""
        if contraction.weight is None:
            return None, ()
        tensor = node.op.node.inputs[contraction.weight]
        while not isinstance(tensor, gs.Constant):
            tensor = tensor.inputs[0].inputs[0]
        use = self.analysis.typing.uses[tensor.name][0]
        return tensor.name, tuple(use.axes)

    def _anywhere(self, atoms: set[int]) -> tuple[Reading, ...]:
        """Return the first activation that carries the atoms, a softmax's output if there is one."""
        carriers = []
        for node in self.nodes:
            for tensor, axes in zip(node.op.node.outputs, node.outputs, strict=False):
                for i, axis in enumerate(axes or ()):
                    if is_static(axis) and atoms & {id(leaf) for leaf in leaves(axis)} and node.op.type not in INTEGER:
                        carriers.append((node.op.real_type != "Softmax", Reading(Tap(tensor.name, i), axis)))
        return (min(carriers, key=lambda item: item[0])[1],) if carriers else ()


INTEGER = {"TopK", "ArgMax", "ArgMin", "Equal", "Less", "Greater", "Not", "And", "Or", "OneHot", "NonZero", "IsNaN"}


def onto_leaf(vector: np.ndarray, axis: Axis, leaf: Axis) -> np.ndarray:
    """Average a vector over an axis onto one of its atoms: heads from heads x head_dim, pairs from both halves.

    vector: one entry per position on the axis. Returns one entry per index of the atom.
    """
    positions = positions_of(axis, leaf)
    total = np.zeros(find(leaf).size[0])
    count = np.zeros(find(leaf).size[0])
    mask = positions >= 0
    np.add.at(total, positions[mask], np.asarray(vector, np.float64)[mask])
    np.add.at(count, positions[mask], 1)
    return total / np.maximum(count, 1)


def positions_of(axis: Axis, leaf: Axis) -> np.ndarray:
    """Return, per position on an axis, the index of an atom it belongs to; -1 where it does not."""
    axis, leaf = find(axis), find(leaf)
    size = axis.size[0]
    if axis is leaf:
        return np.arange(size)
    if axis.kind == "atom":
        return np.full(size, -1)
    parts = [positions_of(part, leaf) for part in axis.parts]
    if axis.kind == "sum":
        return np.concatenate(parts)
    result = np.full(size, -1)
    sizes = [len(part) for part in parts]
    coordinates = np.unravel_index(np.arange(size), sizes)
    for part, column in zip(parts, coordinates, strict=True):
        here = part[column]
        result = np.where(here >= 0, here, result)
    return result
