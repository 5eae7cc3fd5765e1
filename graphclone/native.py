"""Give a child the constants that the framework's own smaller class computes; weights take the ratio, outputs stay."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.linear import Gain
from graphclone.axes.scales import ESCAPE, Exchange, Scale, find_scales
from graphclone.axes.solver import type_axes
from graphclone.axes.tables import Table, find_tables
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.computed import computed
from graphclone.cut import Cut
from graphclone.errors import CutError
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.weights import Weight, weight_of

MARK = "graphclone.constants"


def check_tables(typing: AxisTyping, cut: Cut, stored: Sequence[str] = ()) -> None:
    """Refuse a cut of a table that its framework computes anew and differently.

    typing: of the parent. stored: initializers that the checkpoint holds, which nothing computes anew.
    Raises: CutError that names the table and the node.
    """
    for table in refused_tables(typing, cut, stored):
        raise CutError(
            f"'{table.name}' at {table.where} is a table of {table.kind} that the framework computes from the size; "
            f"its formula for {cut.size(table.axis)[0]} entries does not give the kept ones; keep evenly spaced "
            f"entries{ESCAPE}"
        )


def refused_tables(typing: AxisTyping, cut: Cut, stored: Sequence[str] = ()) -> Iterator[Table]:
    """Yield the tables whose formula does not give what a cut keeps of them; arguments as in `check_tables`."""
    for table in find_tables(typing):
        picks = cut.picks(table.axis)
        if picks is not None and table.name not in stored and not table.reproduces(picks):
            yield table


def use_native_constants(child: Model, parents: Mapping[int, TypedNode]) -> list[Scale]:
    """Exchange the scalars of a child in place and fold the ratios into its weights; return what was done.

    parents: {id of the child's node: the same node of the parent, typed}.
    Raises: CutError where no weight can take a ratio.
    """
    ties = [(tie.first, tie.second) for tie in child.ties]
    scales = find_scales(type_axes(child), parents, [t.name for t in child.graph.outputs], ties)
    _Folder(child).run(scales)
    child.__dict__.pop("ties", None)  # found before, and scaled since
    child.metadata[MARK] = "native"
    return scales


def has_native_constants(child: Model) -> bool:
    """Tell whether a child was made with native constants: its outputs, not its weights, are those of the plain cut."""
    return child.metadata.get(MARK) == "native"


class _Folder:
    def __init__(self, child: Model):
        self.child = child
        self.names = {
            t.name for graph in walk(child.graph) for node in graph.nodes for t in (*node.inputs, *node.outputs)
        }
        self.made: dict[tuple, gs.Constant] = {}

    def run(self, scales: Sequence[Scale]) -> None:
        gains: dict[tuple[int, int], dict[tuple, tuple[Gain, float]]] = {}
        for scale in scales:
            for exchange in scale.exchanges:
                self._exchange(exchange)
            for gain in scale.gains:
                tag = (scale.kind, round(scale.ratio, 12)) if scale.kind == "attention" else (scale.kind, scale.where)
                gains.setdefault((id(gain.node), gain.slot), {})[tag] = (gain, scale.ratio)
        self.scale_weights([list(each.values()) for each in gains.values()])

    def _exchange(self, exchange: Exchange) -> None:
        node, slot = exchange.node, exchange.slot
        if isinstance(slot, str):
            if exchange.value is None:
                node.attrs.pop(slot, None)
            else:
                node.attrs[slot] = float(exchange.value)
            return
        old = node.inputs[slot]
        shape, dtype = self._form(old)
        key = (old.name, exchange.value)
        if key not in self.made:
            self.made[key] = gs.Constant(
                self._fresh(f"{old.name}_native"), Weight.of(np.full(shape, exchange.value, dtype))
            )
        node.inputs[slot] = self.made[key]

    def _form(self, tensor: gs.Tensor) -> tuple[tuple[int, ...], np.dtype]:
        if isinstance(tensor, gs.Constant):
            weight = weight_of(tensor)
            return weight.shape, weight.dtype
        rank = len(tensor.shape) if tensor.shape is not None else 0
        return (1,) * rank, np.dtype(tensor.dtype or np.float32)

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def scale_weights(self, requests: Sequence[Sequence[tuple[Gain, float]]]) -> None:
        """Give the uses of one initializer that are scaled alike one new constant; it keeps the name if it can."""
        groups: dict[tuple[str, tuple], list[tuple[Gain, float]]] = {}
        for request in requests:
            gain = request[0][0]
            name = gain.node.inputs[gain.slot].name
            form = tuple(sorted((round(ratio, 12), g.plus, g.mask.tobytes()) for g, ratio in request))
            groups.setdefault((name, form), []).append(request)
        uses = _uses(self.child)
        for (name, _), members in groups.items():
            gain = members[0][0][0]
            weight = weight_of(gain.node.inputs[gain.slot])
            for part, ratio in members[0]:
                weight = scaled(weight, part, ratio)
            whole = uses.get(name, 0) == len(members)
            constant = gs.Constant(name if whole else self._fresh(f"{name}_scaled"), weight)
            for member in members:
                member[0][0].node.inputs[member[0][0].slot] = constant


def _uses(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for graph in walk(model.graph):
        for tensor in [*(t for node in graph.nodes for t in node.inputs), *graph.outputs]:
            if isinstance(tensor, gs.Constant):
                counts[tensor.name] = counts.get(tensor.name, 0) + 1
    return counts


def scaled(weight: Weight, gain: Gain, ratio: float) -> Weight:
    """Return (weight + plus) * ratio - plus where the gain's mask holds; nothing is read before the result is."""
    if gain.mask.all() and not gain.plus:
        return weight.scaled(ratio)

    def make() -> np.ndarray:
        values = weight.load()
        wide = values.astype(np.promote_types(values.dtype, np.float32))
        changed = (wide + gain.plus) * ratio - gain.plus
        return np.where(gain.mask.reshape(values.shape), changed, wide).astype(values.dtype)

    return computed(weight.shape, weight.dtype, make)


def nodes_in_pairs(typing: AxisTyping, nodes: Mapping[int, gs.Node]) -> dict[int, TypedNode]:
    """Return {id of the child's node: the parent's typed node} from {id of the parent's node: the child's node}."""
    typed = {id(each.op.node): each for each in typing.nodes}
    return {id(node): typed[key] for key, node in nodes.items() if key in typed}
