"""The axes that initializers have at each of their uses, and the values of those that hold sizes.

Matrices are one tensor wherever they are read. Vectors are private to each use, since exporters share equal ones between
unrelated layers, but for those that slices take different parts of: the parts are of one.
"""

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, Equations
from graphclone.axes.elementwise import BROADCASTING, UNARY
from graphclone.axes.typed import Axes, AxisTyping, Use
from graphclone.dtypes import holds_weights
from graphclone.graphs import constants, walk
from graphclone.model import Model
from graphclone.op import Values
from graphclone.weights import repeated_axes, weight_of

MAX_CONSTANT = 1 << 20
ELEMENTWISE = {*BROADCASTING, *UNARY, "Cast", "Identity"}


class Initializers:
    """Hand out axes use by use; they are noted in the typing's `types`, `uses` and `values`."""

    def __init__(self, typing: AxisTyping):
        self._typing = typing
        self._repeated: dict[str, tuple[int, ...]] = {}  # constant -> the axes along which it repeats itself
        self._sliced: Counter[tuple] = Counter()  # how often a part of a vector was taken
        self._vectors: dict[tuple[str, int], Axes] = {}  # vectors whose parts slices take

    def tie(self, model: Model, equations: Equations) -> None:
        """Equate the axes of initializers that hold one matrix."""
        ties = model.ties
        tensors = {c.name: c for graph in walk(model.graph) for c in constants(graph)} if ties else {}
        for tie in ties:
            first, second = self._shared(tensors[tie.first]), self._shared(tensors[tie.second])
            equations.why = f"initializers '{tie.first}' and '{tie.second}' are tied"
            for a, b in zip(first, reversed(second) if tie.transposed else second, strict=True):
                equations.equate(a, b)

    def axes(self, constant: gs.Constant, node: gs.Node | None, slot: int) -> Axes:
        """Return the axes a constant has in a node's slot; node None: as a graph output."""
        weight = weight_of(constant)
        if sum(n > 1 for n in weight.shape) <= 1 or not holds_weights(weight.onnx_dtype):
            axes = self._vector(constant, node, slot)
        else:
            axes = self._shared(constant)
        if node is not None and node.op in ELEMENTWISE:
            axes = self._with_fills(constant, axes)
        self._typing.uses[constant.name].append(Use(node, slot, axes))
        return axes

    def values(self, constant: gs.Constant) -> Values | None:
        """Return what a small constant holds, the same in both probes; None for others."""
        known = self._typing.values
        if constant.name not in known:
            weight = weight_of(constant)
            count = int(np.prod(weight.shape))
            small = count <= (16 if holds_weights(weight.onnx_dtype) else MAX_CONSTANT)
            value = weight.load() if small and weight.dtype.kind in "iubf" else None
            known[constant.name] = None if value is None else (value, value)
        return known[constant.name]

    def _vector(self, constant: gs.Constant, node: gs.Node | None, slot: int) -> Axes:
        """Return axes of a use of its own, or those of the slices before that take other parts of the vector."""
        axes = [Axis((n, n)) for n in weight_of(constant).shape]
        if node is None or node.op != "Slice" or slot != 0:
            return axes
        known = self._typing.values
        bounds = [self.values(t) if isinstance(t, gs.Constant) else known.get(t.name) for t in node.inputs[1:]]
        if any(value is None for value in bounds):
            return axes
        part = (constant.name, *(tuple(value[0].tolist()) for value in bounds))
        self._sliced[part] += 1
        return self._vectors.setdefault((constant.name, self._sliced[part]), axes)

    def _shared(self, constant: gs.Constant) -> Axes:
        types = self._typing.types
        if constant.name not in types:
            types[constant.name] = [Axis((n, n)) for n in weight_of(constant).shape]
        return types[constant.name]

    def _with_fills(self, constant: gs.Constant, axes: Axes) -> Axes:
        """Let axes along which a stored mask repeats itself be fills of this use, as those of a generated one are."""
        if constant.name not in self._repeated:
            self._repeated[constant.name] = repeated_axes(weight_of(constant))
        axes = list(axes)
        for i in self._repeated[constant.name]:
            axes[i] = Axis(axes[i].size)
            axes[i].fill = True
        return axes
