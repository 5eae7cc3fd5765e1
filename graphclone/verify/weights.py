"""Copies of a model with other weights: perturbed, so that no permutation hides, and with slices zeroed."""

import zlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphclone.axes.contractions import REARRANGING, is_weight
from graphclone.axes.typed import AxisTyping
from graphclone.cut import Cut
from graphclone.dtypes import is_float, pack
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.precision import raised
from graphclone.sources import Source
from graphclone.weights import SENTINEL, Weight, repeated_axes, weight_of
from graphclone.whole_numbers import plain_of

SPREAD = 0.1
HELD_BYTES = 1 << 30
SIZES_AS_FLOATS = {"Resize": (1, 2), "Upsample": (1,)}


def perturbed(model: Model, seed: int = 0) -> Model:
    """Return a copy in fp32 whose float tensors are scattered around their values.

    Scalars, masks and counting tensors stay. Values are drawn when they are read, and kept up to 1 GB in all.
    """
    copy = raised(model)
    room = HELD_BYTES
    fixed = _sizes_as_floats(copy)
    for constant in _constants(copy):
        weight = weight_of(constant)
        if id(constant) in fixed or weight.size < 2 or weight.onnx_dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            continue
        room -= weight.nbytes
        constant._values = Weight(_Scattered(weight, (seed, zlib.crc32(constant.name.encode())), held=room > 0))
    return copy


def _sizes_as_floats(model: Model) -> set[int]:
    """Return the ids of constants that sizes are computed of: no weights, and not to be scattered."""
    nodes = [node for graph in walk(model.graph) for node in graph.nodes]
    waiting = [node.inputs[i] for node in nodes for i in SIZES_AS_FLOATS.get(node.op, ()) if i < len(node.inputs)]
    found: set[int] = set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in found:
            found.add(id(tensor))
            waiting += [read for node in tensor.inputs if node.op not in ("Shape", "Size") for read in node.inputs]
    return found


def zeroed(parent: Model, copy: Model, typing: AxisTyping, cut: Cut) -> Model:
    """Return the copy with what the cut drops set to zero in every float tensor; `typing` speaks of the parent."""
    copy = copy.copy()
    nodes = {
        id(old): new
        for one, other in zip(walk(parent.graph), walk(copy.graph), strict=True)
        for old, new in zip(one.nodes, other.nodes, strict=True)
    }
    names = {constant.name for constant in _constants(copy)}
    for name, uses in typing.uses.items():
        groups: dict[tuple, list] = defaultdict(list)
        for use in uses:
            picks = tuple(cut.picks(axis) for axis in use.axes)
            if use.node is not None and any(pick is not None for pick in picks):
                groups[tuple(None if pick is None else pick.tobytes() for pick in picks)].append((use, picks))
        for number, members in enumerate(groups.values()):
            first, picks = members[0]
            weight = weight_of(nodes[id(first.node)].inputs[first.slot])
            if not is_weight(first):
                continue
            fresh = f"{name}_zeroed_{number}"
            while fresh in names:
                fresh += "_"
            constant = gs.Constant(
                fresh, Weight(_Zeroed(weight, picks, _zero_point(nodes[id(first.node)], first.slot)))
            )
            for use, _ in members:
                nodes[id(use.node)].inputs[use.slot] = constant
    return copy


class _Scattered(Source):
    """A weight's values times 1 +- SPREAD, and up to SPREAD of their root mean square besides."""

    def __init__(self, weight: Weight, seed: tuple[int, int], held: bool):
        super().__init__(weight.shape, weight.onnx_dtype)
        self.weight, self.seed, self.held = weight, seed, held
        self.drawn: np.ndarray | None = None

    def array(self) -> np.ndarray:
        if self.drawn is not None:
            return self.drawn
        drawn = self._draw(self.weight.load())
        if self.held:
            self.drawn = drawn
        return drawn

    def _draw(self, values: np.ndarray) -> np.ndarray:
        largest = np.abs(values).max(initial=0)
        if not largest < SENTINEL or _counts(values):
            return values
        scale = float(np.sqrt(np.mean(np.square(values.reshape(-1)[: 1 << 16])))) or float(largest) or 1.0
        repeated = repeated_axes(self.weight)
        shape = [1 if axis in repeated else size for axis, size in enumerate(values.shape)]
        drawn = np.random.default_rng(self.seed).random(shape, np.float32)
        drawn -= 0.5
        drawn *= 2 * SPREAD
        drawn = drawn * (np.abs(values) + np.float32(scale))
        drawn = (drawn + values).astype(values.dtype)
        return np.abs(drawn) if values.min() >= 0 else drawn

    def packed(self) -> bytes:
        return self.array().tobytes()


class _Zeroed(Source):
    """A weight with the dropped entries set to `zero`, which broadcasts."""

    def __init__(self, weight: Weight, picks: Iterable[np.ndarray | None], zero: np.ndarray):
        super().__init__(weight.shape, weight.onnx_dtype)
        self.weight, self.picks, self.zero = weight, tuple(picks), zero

    def array(self) -> np.ndarray:
        values = self.weight.load()
        for axis, pick in enumerate(self.picks):
            if pick is not None:
                mask = np.zeros(values.shape[axis], bool)
                mask[pick] = True
                zero = self.zero.astype(values.dtype)
                values = np.where(mask.reshape((-1,) + (1,) * (values.ndim - axis - 1)), values, zero)
        return values

    def packed(self) -> bytes:
        return pack(self.array())


ZERO_POINTS = {
    "DequantizeLinear": {0: 2}, "MatMulInteger": {1: 3}, "ConvInteger": {1: 3}, "MatMulIntegerToFloat": {1: 5},
    "DynamicQuantizeMatMul": {1: 3}, "QAttention": {1: 7},
}  # fmt: skip
"""Where a quantized operand's zero point is, if not behind its scale: {operator: {slot: slot of the zero point}}."""


def _zero_point(node: gs.Node, slot: int) -> np.ndarray:
    """Return what stands for zero in an operand, to broadcast against it; what is looked up is dequantized behind."""
    weight, moved = weight_of(node.inputs[slot]), False
    if is_float(weight.onnx_dtype):
        return np.zeros(())  # also where it is quantized behind, as what is looked up
    rank = len(weight.shape)
    while node.op in REARRANGING and node.op != "DequantizeLinear" and node.outputs[0].outputs:
        tensor, moved = node.outputs[0], True
        node = tensor.outputs[0]
        slot = next(i for i, each in enumerate(node.inputs) if each is tensor)
    plain = plain_of(node.op, node.domain, node.attrs)
    beside = plain is not None and slot in plain.operands(len(node.inputs))
    at = slot + 2 if beside else ZERO_POINTS.get(node.op, {}).get(slot)
    if at is None or at >= len(node.inputs) or not isinstance(node.inputs[at], gs.Constant):
        return np.zeros(())
    zero = weight_of(node.inputs[at]).load()
    if (zero == zero.reshape(-1)[0]).all():
        return zero.reshape(-1)[0]
    if zero.ndim > 1 or moved:
        return zero if not moved else np.zeros(())
    axis = int(node.attrs.get("axis", 1)) % rank if node.op == "DequantizeLinear" else rank - 1
    if "Conv" in node.op or node.attrs.get("transB", 0):
        axis = 0
    return zero.reshape((-1,) + (1,) * (rank - axis - 1))


def _counts(values: np.ndarray) -> bool:
    """Tell whether a tensor counts (positions, buckets): whole numbers, more than two different ones."""
    flat = values.reshape(-1)
    whole = all((part == np.round(part)).all() for part in (flat[:64], flat))  # most stop at the first 64
    return whole and len(np.unique(flat[: 1 << 12])) > 2


def _constants(model: Model) -> list[gs.Constant]:
    found = {}
    for graph in walk(model.graph):
        for tensors in (*(node.inputs for node in graph.nodes), graph.outputs):
            found.update({id(tensor): tensor for tensor in tensors if isinstance(tensor, gs.Constant)})
    return list(found.values())
