"""Where nodes stand in what the graph computes, whatever their order in the file."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, leaves
from graphclone.axes.contractions import Contraction
from graphclone.axes.typed import TypedNode
from graphclone.blocks import Stack

Contractions = Sequence[Contraction | None]


class Places:
    """What sorts the widths that nodes use, and where they lie.

    blocks: per node, the (stack prefix, block) that it is inside of, or None.
    """

    def __init__(
        self, nodes: Sequence[TypedNode], contractions: Contractions, stacks: Sequence[Stack], graph: gs.Graph
    ):
        self.contractions = contractions
        self.blocks: list[tuple[str, int] | None] = [None] * len(nodes)
        for stack in stacks:
            for block in stack.blocks:
                for i in (i for twin in (block, *block.twins) for half in twin.halves for i in half.nodes):
                    self.blocks[i] = self.blocks[i] or (stack.prefix, block.index)
        reads = [[t.name for t in node.op.node.inputs if not isinstance(t, gs.Constant)] for node in nodes]
        gives = [[t.name for t in node.op.node.outputs if t.name] for node in nodes]
        self.depth = _depths(reads, gives, [c is not None and c.weight is not None for c in contractions])
        self.first_input = _firsts(reads, gives, [tensor.name for tensor in graph.inputs])
        self.gives, self.inputs = gives, len(graph.inputs)
        self.readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, node in enumerate(nodes):
            for slot, tensor in enumerate(node.op.node.inputs):
                self.readers[tensor.name].append((i, slot))
        self._adopt(reads, gives, len(graph.inputs))
        self.first_output = _firsts(gives[::-1], reads[::-1], [tensor.name for tensor in graph.outputs])[::-1]
        ends = {stack.points[-1] for stack in stacks}
        self.feeds = [first < len(ends) for first in _firsts(gives[::-1], reads[::-1], sorted(ends))[::-1]]
        self.follows = [first < len(ends) for first in _firsts(reads, gives, sorted(ends))]

    def _adopt(self, reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], inputs: int) -> None:
        """Count what is computed of weights alone to the block that reads it."""
        readers: dict[str, set] = defaultdict(set)
        for i in reversed(range(len(reads))):
            if self.first_input[i] == inputs and self.blocks[i] is None:
                found = set().union(*(readers[name] for name in gives[i]))
                self.blocks[i] = next(iter(found)) if len(found) == 1 else None
            for name in reads[i]:
                readers[name].add(self.blocks[i])

    def key(self, node: int, leaf: Axis) -> tuple:
        """Return what sorts a width used by a node: how many linear operators are before it, inputs and outputs."""
        contraction = self.contractions[node]
        contracted = () if contraction is None else contraction.contracted
        read = any(leaf is other for axis in contracted for other in leaves(axis))
        return (self.depth[node] - read, self.first_input[node], self.first_output[node])

    def uses(self, node: int, slot: int) -> Iterator[tuple[int, int]]:
        """Yield the (node, slot) that a weight is for: behind what is computed of weights alone."""
        readers = [reader for name in self.gives[node] for reader in self.readers[name]]
        if self.first_input[node] < self.inputs or not readers:
            yield node, slot
        else:
            for reader in readers:
                yield from self.uses(*reader)

    def kind(self, nodes: Iterable[int]) -> str:
        """Return `stem` for what some of the nodes contribute to a stack, else `head`."""
        return "stem" if any(self.feeds[i] and not self.follows[i] for i in nodes) else "head"


def _depths(reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], counts: Sequence[bool]) -> list[int]:
    """Return how many of the counted nodes the longest way to each node crosses, itself included."""
    depth: dict[str, int] = {}
    found = []
    for names, outputs, counted in zip(reads, gives, counts, strict=True):
        found.append(max((depth.get(name, 0) for name in names), default=0) + counted)
        depth.update(dict.fromkeys(outputs, found[-1]))
    return found


def _firsts(reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], starts: Sequence[str]) -> list[int]:
    """Return the number of the first start that each node descends from, or how many there are."""
    first = {name: number for number, name in enumerate(starts)}
    found = []
    for names, outputs in zip(reads, gives, strict=True):
        found.append(min((first.get(name, len(starts)) for name in names), default=len(starts)))
        for name in outputs:
            first[name] = min(found[-1], first.get(name, len(starts)))
    return found
