"""Which axis the values of integer tensors are positions on; what computes with them locks it.

Ids pick rows of a table. They may pass through nodes that rearrange values; a node that computes with them, or numbers
counted along an axis that pick from it, would after a cut still speak of the old positions.
"""

from collections.abc import Mapping, Set

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, Equations, lock
from graphclone.axes.registry import Typing
from graphclone.axes.typed import AxisTyping
from graphclone.axes.wrapping import WrappedIndices
from graphclone.graphs import holds_floats
from graphclone.op import Op

INDEXING = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterElements": 1, "ScatterND": 1}
ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
CONVOLUTIONS = ("Conv", "ConvInteger", "FusedConv", "QLinearConv")


class Positions:
    """Follow integer values node by node; `settle` then locks what computes with them."""

    def __init__(self, typing: AxisTyping, equations: Equations):
        self.typing = typing
        self.equations = equations
        self.origin: dict[str, str] = {}  # tensor -> graph input whose values it only rearranges, or rounds
        self.axes: dict[str, Axis] = {}  # integer tensor -> the axis its values are positions on
        self.wrapped = WrappedIndices(self.origin)
        self.compared: dict[str, str] = {}  # graph input -> the node that computes with its values

    def follow(self, op: Op, typing: Typing, bound: Mapping[str, Axis]) -> None:
        """Note what a node reads as positions, and what its first output holds."""
        for slot, name in typing.indexes.items():
            self.index(op, op.node.inputs[slot].name, bound[name])
        for output, name in typing.yields.items():
            if op.wants(output):
                self.axes[op.node.outputs[output].name] = bound[name]
        if not op.domain and self.wrapped.follow(op):
            return
        output = op.node.outputs[0].name
        first = op.node.inputs[0].name if op.node.inputs else ""
        if op.type in ROUNDING and first in self.origin:
            self.origin[output] = self.origin[first]
        if typing.moves and op.has(0):
            if first in self.origin:
                self.origin[output] = self.origin[first]
            if first in self.axes:
                self.axes[output] = self.axes[first]
            return
        self.compute(op, skip=typing.indexes.keys())

    def index(self, op: Op, tensor: str, axis: Axis) -> None:
        """Let the values of a tensor be positions on an axis; lock it where they are computed."""
        if tensor in self.axes:
            self.equations.equate(self.axes[tensor], axis)
        elif tensor in self.origin:
            if self.wrapped.limits.get(self.origin[tensor], axis.size[0]) < axis.size[0] - 1:
                self.compared.setdefault(self.origin[tensor], f"a clip before {op.where}")
            known = self.typing.index_axes.setdefault(self.origin[tensor], axis)
            if known is not axis:
                self.equations.equate(known, axis)
        else:
            if tensor in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor], op.where)
            lock(axis, f"{op.where} picks by computed positions")

    def compute(self, op: Op, skip: Set[int] = frozenset()) -> None:
        """Note that a node computes with the values of its inputs, those in the slots `skip` apart."""
        for slot, tensor in enumerate(op.node.inputs):
            if slot in skip or tensor.is_empty():
                continue
            if tensor.name in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor.name], op.where)
            if tensor.name in self.origin:
                self.compared.setdefault(self.origin[tensor.name], op.where)
                if op.type in CONVOLUTIONS and slot == 0:
                    self._lock_input(self.origin[tensor.name])
            if tensor.name in self.axes:
                lock(self.axes[tensor.name], f"{op.where} computes with positions on it")

    def _lock_input(self, name: str) -> None:
        """All axes of what a convolution reads directly (an image, a wave) or what picks rows (ids) are the data's."""
        for i, axis in enumerate(self.typing.types[name]):
            lock(axis, f"axis {i} of graph input '{name}'")

    def settle(self, graph: gs.Graph) -> None:
        """Note which graph outputs list positions, and lock the axes whose positions something computes with."""
        index_axes = self.typing.index_axes
        for tensor in graph.outputs:
            if tensor.name in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor.name], "a graph output")
            if tensor.name in self.axes:
                self.typing.position_outputs[tensor.name] = self.axes[tensor.name]
            elif self.origin.get(tensor.name) in index_axes:
                self.typing.position_outputs[tensor.name] = index_axes[self.origin[tensor.name]]
        _lock_ranges(self.typing)
        for name, axis in index_axes.items():
            self._lock_input(name)  # ids that a file declares as floats are no features
            if name in self.compared:
                lock(axis, f"{self.compared[name]} computes with the values of input '{name}'")


def _lock_ranges(typing: AxisTyping) -> None:
    """Forbid cutting counts whose numbers pick positions: a cut would leave numbers of the old positions."""
    by_output = {t.name: node for node in typing.nodes for t in node.op.node.outputs}
    seen: set[int] = set()
    for node in typing.nodes:
        slot = INDEXING.get(node.op.type)
        if slot is None or slot >= len(node.op.node.inputs):
            continue
        waiting = [node.op.node.inputs[slot].name]
        while waiting:
            producer = by_output.get(waiting.pop())
            if producer is None or id(producer) in seen:
                continue
            seen.add(id(producer))
            if producer.op.type == "Range":
                for axis in producer.outputs[0] or ():
                    lock(axis, f"{node.op.where} picks by numbers counted along it")
            waiting += [t.name for t in producer.op.node.inputs if not holds_floats(t)]
