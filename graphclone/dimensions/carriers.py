"""Which initializers carry an axis: a width that none carries cannot be cut, and needs no name."""

from collections import defaultdict
from collections.abc import Iterable

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, is_fill, leaves, outer_parts
from graphclone.axes.contractions import is_weight
from graphclone.axes.typed import AxisTyping
from graphclone.graphs import holds_floats


class Carriers:
    """The names of the float initializers (or float inputs) that carry each atom.

    fed: ids of the locked atoms of graph inputs: their batch and length, where the export fixed them. counted: ids of
    the atoms of ids, masks and other inputs that hold no floats, which have no channels.
    """

    def __init__(self, typing: AxisTyping, graph: gs.Graph):
        self._names: dict[int, set[str]] = defaultdict(set)
        for name, uses in typing.uses.items():
            for use in uses:
                if use.node is not None and not is_weight(use):
                    continue
                for axis in use.axes:
                    for leaf in leaves(axis):
                        if not is_fill(leaf):
                            self._names[id(leaf)].add(name)
        inputs = (axis for tensor in graph.inputs for axis in typing.types.get(tensor.name) or ())
        self.fed = {id(leaf) for axis in inputs for leaf in leaves(axis) if leaf.lock is not None}
        whole = (axis for t in graph.inputs if not holds_floats(t) for axis in typing.types.get(t.name) or ())
        self.counted = {id(leaf) for axis in whole for leaf in leaves(axis)}

    def of(self, leaf: Axis) -> set[str]:
        """Return the names of what carries an atom."""
        return self._names.get(id(leaf), set())

    def count(self, axes: Iterable[Axis]) -> int:
        """Return how many initializers carry an atom of these axes."""
        return len(set().union(*(self.of(leaf) for axis in axes for leaf in leaves(axis))))

    def carried(self, axes: list[Axis]) -> list[Axis]:
        """Leave out axes that are an input's, or that no initializer carries: a static batch is no head."""
        mixed = [any(id(leaf) in self.fed for leaf in leaves(axis)) for axis in axes]
        parts = [p for axis, split in zip(axes, mixed, strict=True) for p in (outer_parts(axis) if split else (axis,))]
        parts = [axis for axis in parts if not {id(leaf) for leaf in leaves(axis)} <= self.fed]
        return [axis for axis in parts if any(self.of(leaf) for leaf in leaves(axis))] or parts or axes
