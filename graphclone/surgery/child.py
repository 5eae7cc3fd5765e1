"""The child while it is cut: the node for each of the parent's, names that are free, nodes to be placed."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.typed import AxisTyping, Site
from graphclone.cut import Cut
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.weights import Weight


class Child:
    """A copy of the parent under the knife.

    graph: the copy's. typing: of the parent. cut: what stays. nodes: {id of a parent's node: the copy's}.
    before, behind: {id of a copy's node: the nodes that `place` puts there}.
    """

    def __init__(self, parent: Model, copy: Model, typing: AxisTyping, cut: Cut):
        self.graph = copy.graph
        self.typing = typing
        self.cut = cut
        self.nodes: dict[int, gs.Node] = {}
        for old, new in zip(walk(parent.graph), walk(copy.graph), strict=True):
            self.nodes.update((id(a), b) for a, b in zip(old.nodes, new.nodes, strict=True))
        nodes = [node for graph in walk(copy.graph) for node in graph.nodes]
        self._names = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        self._node_names = {node.name for node in nodes}
        self.before: dict[int, list[gs.Node]] = defaultdict(list)
        self.behind: dict[int, list[gs.Node]] = defaultdict(list)

    def fresh(self, name: str) -> str:
        """Return a name that no tensor has: the one asked for, or that with underscores."""
        return _free(name, self._names)

    def fresh_node(self, name: str) -> str:
        """Return a name that no node has, likewise: a child that is cut again has those of the first cut."""
        return _free(name, self._node_names)

    def constant(self, node: gs.Node, slot: int | str, values: np.ndarray) -> gs.Constant:
        """Return a new constant for a slot of a node."""
        return gs.Constant(self.fresh(f"{node.name}_{slot}"), Weight.of(np.asarray(values, order="C")))

    def place(self) -> None:
        """Put the nodes that edits made before and behind others where they belong."""
        if self.before or self.behind:
            for graph in walk(self.graph):
                graph.nodes[:] = [placed for node in graph.nodes for placed in self._placed(node)]

    def _placed(self, node: gs.Node) -> list[gs.Node]:
        """Return a node with what edits put before and behind it, theirs included."""
        before = [placed for other in self.before.get(id(node), ()) for placed in self._placed(other)]
        return [*before, node, *self.behind.get(id(node), ())]


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


Editor = Callable[[Child, Site, gs.Node], None]
"""Edits a node of the child at a site of the parent."""
