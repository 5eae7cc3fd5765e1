"""The data flow among typed nodes: what descends from what, what every path crosses, where attention is."""

import random
from collections import defaultdict
from collections.abc import Sequence

import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphclone.axes.axis import find, free_leaves, is_static, is_unit, outer_parts
from graphclone.axes.contractions import REARRANGING, Contraction, constant_behind, contraction_of
from graphclone.axes.notation import parse
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.dtypes import holds_weights, is_float
from graphclone.graphs import walk
from graphclone.weights import weight_of
from graphclone.whole_numbers import plain_of

PRIME = (1 << 61) - 1
RENAMING = {"Identity", "Cast"}
ROUNDING = {"QuantizeLinear", "DynamicQuantizeLinear"}
REAL_AGAIN = {
    "DequantizeLinear", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "QAttention", "Shape", "Size",
}  # fmt: skip
"""Operators that read whole numbers and give what needs no zero point."""
REPEATING = {"Expand", "Tile", "ConstantOfShape"}
ATTENTION_OPS = {"Attention", "MultiHeadAttention", "GroupQueryAttention"}


class Flow:
    """The data flow among typed nodes: what each step reads and gives, and what descends from which root.

    A step is a node, but for one that adds and normalises at once (SkipLayerNormalization): that is two, so that the
    sum it gives on is a point of the stream.
    """

    def __init__(self, graph: gs.Graph, typing: AxisTyping):
        self.typing = typing
        self.nodes: list[TypedNode] = []
        self.number: list[int] = []  # of each step's node among all nodes
        self.reads: list[list[str]] = []
        self.gives: list[list[str]] = []
        for number, node in enumerate(typing.nodes):
            if node.constrains and (node.text or node.op.type != "If"):
                self._add_steps(number, node)
        self.order: dict[str, int] = {}
        self.rounded, self.real_before = self._find_rounded()
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for i, names in enumerate(self.gives):
            self.order.update((name, i) for name in names)
        for i, names in enumerate(self.reads):
            for name in names:
                self.consumers[name].append(i)
        self.outputs = [t.name for scope in walk(graph) for t in scope.outputs]
        self.contractions = [contraction_of(node) for node in self.nodes]
        self.attention = attention_nodes(self.nodes, self.contractions, range(len(self.nodes)))
        self.images = {t.name for t in graph.inputs if t.shape is not None and len(t.shape) == 4}
        self.roots, self.raw_of = self._find_roots(graph)
        self.roots += self._find_latents()

    def _add_steps(self, number: int, node: TypedNode) -> None:
        reads = [t.name for t in node.op.node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        gives = [t.name for t in node.op.node.outputs if t.name]
        steps = [(list(dict.fromkeys(reads)), gives)]
        if is_fused_sum(node.op.node):
            total = node.op.node.outputs[3].name
            steps = [(steps[0][0], [total]), ([total], [name for name in gives if name != total])]
        for inputs, outputs in steps:
            self.nodes.append(node)
            self.number.append(number)
            self.reads.append(inputs)
            self.gives.append(outputs)

    def _find_rounded(self) -> tuple[set[str], dict[str, str]]:
        """Return the activations that hold whole numbers to a scale of their own (none can stand in for another), and
        what those of them that were real before were then."""
        found: set[str] = set()
        before: dict[str, str] = {}
        for i, node in enumerate(self.nodes):
            given = self.gives[i][:1] if node.op.type == "DynamicQuantizeLinear" else self.gives[i]
            if node.op.type in ROUNDING:
                found.update(given)
                before.update((name, self.reads[i][0]) for name in given if self.reads[i])
            elif plain_of(node.op.type, node.op.domain, node.op.node.attrs):
                found.update(given)
            elif node.op.type in REAL_AGAIN:
                continue
            elif any(name in found for name in self.reads[i]):
                found.update(given)
                before.update((name, before[read]) for name in given for read in self.reads[i] if read in before)
            elif node.op.type in REARRANGING and _reads_few_bits(node):
                found.update(given)
        return found, before

    def outputs_of(self, index: int) -> list[str]:
        return self.gives[index]

    def inputs_of(self, index: int) -> list[str]:
        return self.reads[index]

    def _find_roots(self, graph: gs.Graph) -> tuple[list[str], dict[str, set[str]]]:
        """Return the first tensors that mix data with a matrix, and float inputs that carry a free width."""
        roots: list[str] = []
        raw: dict[str, set[str]] = {t.name: {t.name} for t in graph.inputs}
        rooted: set[str] = set()
        for tensor in graph.inputs:
            axes = self.typing.types.get(tensor.name)
            if axes and len(axes) == 3 and is_static(axes[2]) and axes[2].lock is None:
                roots.append(tensor.name)
                rooted.add(tensor.name)
        for i, node in enumerate(self.nodes):
            names = self.inputs_of(i)
            sources = set().union(*(raw.get(name, set()) for name in names)) if names else set()
            if not sources:
                continue
            descends = any(name in rooted for name in names)
            for name in self.outputs_of(i):
                raw[name] = sources
                if descends:
                    rooted.add(name)
                elif _has_matrix(node):
                    roots.append(name)
                    rooted.add(name)
        return roots, raw

    def _find_latents(self) -> list[str]:
        """Return what no input gives: learned queries, class tokens or zeros, repeated over the batch."""
        found = []
        for i, node in enumerate(self.nodes):
            if node.op.type not in REPEATING or any(name in self.raw_of for name in self.inputs_of(i)):
                continue
            axes = node.outputs[0] or ()
            if len(axes) > 2 and any(free_leaves(axis) for axis in axes):
                found += self.outputs_of(i)
        return found

    def descendants(self, start: str, stop: str | None = None) -> set[str]:
        """Return the tensors that descend from one, itself included; `stop` is reached but not passed."""
        seen, waiting = {start}, [start]
        while waiting:
            name = waiting.pop()
            if name == stop:
                continue
            for i in self.consumers[name]:
                for output in self.outputs_of(i):
                    if output not in seen:
                        seen.add(output)
                        waiting.append(output)
        return seen

    def last_output(self, root: str) -> str | None:
        """Return the last graph output that descends from a root."""
        below = self.descendants(root)
        sinks = [name for name in self.outputs if name in below and name in self.order]
        return max(sinks, key=lambda name: self.order[name], default=None)

    def articulation(self, root: str, sink: str) -> list[str]:
        """Return the tensors every path from a root to a sink crosses, in order."""
        below = self.descendants(root)
        dice = random.Random(0)
        weight = {i: dice.randrange(1, PRIME) for i in range(len(self.nodes))}
        nodes = sorted({self.order[name] for name in below if name in self.order})
        forward, backward = {root: 1}, {sink: 1}
        for i in nodes:
            inflow = sum(forward.get(name, 0) for name in self.inputs_of(i)) * weight[i] % PRIME
            for name in self.outputs_of(i):
                if name != root:
                    forward[name] = inflow
        for i in reversed(nodes):
            outflow = sum(backward.get(name, 0) for name in self.outputs_of(i)) * weight[i] % PRIME
            if outflow:
                for name in self.inputs_of(i):
                    if name in below:
                        backward[name] = (backward.get(name, 0) + outflow) % PRIME
        whole = forward[sink]
        crossed = [n for n in below if forward.get(n, 0) * backward.get(n, 0) % PRIME == whole]
        return sorted(crossed, key=lambda name: self.order.get(name, -1))

    def stream_type(self, name: str) -> tuple | None:
        """Return what points of one stream share, or one could not stand in for another: the shape, the static axes."""
        axes = self.typing.types.get(name)
        if not axes or len(axes) < 2 or name in self.rounded:
            return None
        static = [find(axis) for axis in axes if is_static(axis) and not is_unit(axis)]
        shape = tuple(axis.size for axis in axes)
        return (shape, tuple(id(a) if free_leaves(a) else a.size[0] for a in static)) if static else None

    def is_quantized(self, name: str) -> bool:
        """Tell whether a tensor is another one in whole numbers."""
        return name in self.order and self.nodes[self.order[name]].op.type == "QuantizeLinear"

    def is_renamed(self, name: str) -> bool:
        """Tell whether a tensor is another one under a new name, or of another type."""
        if name not in self.order:
            return False
        step = self.order[name]
        if self.nodes[step].op.type == "DequantizeLinear":
            sources = [self.real_before[read] for read in self.reads[step] if read in self.real_before]
            return any(self.stream_type(source) == self.stream_type(name) for source in sources)
        return self.nodes[step].op.type in RENAMING

    def between(self, entry: str, exit: str) -> tuple[int, ...]:
        """Return the nodes on paths from one tensor to another."""
        below = self.descendants(entry, exit)
        return tuple(sorted(self._above(exit, below, entry)))

    def _above(self, exit: str, within: set[str], stop: str) -> set[int]:
        seen: set[int] = set()
        waiting = [exit]
        while waiting:
            name = waiting.pop()
            if name == stop or name not in within:
                continue
            i = self.order[name]
            if i not in seen:
                seen.add(i)
                waiting.extend(self.inputs_of(i))
        return seen


def is_fused_sum(node: gs.Node) -> bool:
    """Tell whether a node adds to the stream, gives the sum on and normalises it, all at once."""
    fused = node.op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
    return fused and len(node.outputs) > 3 and bool(node.outputs[3].name)


def _reads_few_bits(node: TypedNode) -> bool:
    first = node.op.node.inputs[0]
    dtype = weight_of(first).onnx_dtype if isinstance(first, gs.Constant) else TensorProto.FLOAT
    return holds_weights(dtype) and not is_float(dtype)


def _has_matrix(node: TypedNode) -> bool:
    for tensor in node.op.node.inputs:
        constant = constant_behind(tensor)
        if constant is not None and holds_weights(weight_of(constant).onnx_dtype):
            if sum(n > 1 for n in weight_of(constant).shape) >= 2:
                return node.op.type not in ("Add", "Sub", "Mul", "Where", "Div")
    return False


def attention_nodes(
    nodes: Sequence[TypedNode], contractions: Sequence[Contraction | None], within: Sequence[int]
) -> list[int]:
    """Return the nodes that mix values by attention: fused operators, and contractions over a softmax's axis.

    Where values went through the output projection before, heads are summed up with the positions, in one axis or two.
    Where there is none, linear attention and retention: two activations contracted over the sequence, for each head.
    """
    scores: set[int] = set()  # axes that contractions of two activations produce
    normalised: set[int] = set()
    found, linear = [], []
    for i in within:
        node, contraction = nodes[i], contractions[i]
        if node.op.type in ATTENTION_OPS:
            found.append(i)
        elif contraction is not None and contraction.weight is None:
            mixed = [part for axis in contraction.contracted for part in (find(axis), *outer_parts(axis))]
            if any(id(part) in normalised for part in mixed):
                found.append(i)
            elif _mixes_positions(contraction):
                linear.append(i)
            scores.update(id(find(axis)) for axis in node.outputs[0] or ())
        elif node.op.real_type == "Softmax" and node.outputs[0]:
            axis = find(node.outputs[0][node.op.axis(len(node.outputs[0]), -1)])
            parts = (axis, *axis.parts) if axis.kind == "sum" else (axis,)  # a sink stands beside the scores
            normalised.update(id(find(part)) for part in parts if id(find(part)) in scores)
        elif node.op.type == "ReduceSum" and node.text:
            summed = [node.bound[p.name] for p in parse(node.text).inputs[0] if p.statistic and p.name in node.bound]
            normalised.update(id(find(axis)) for axis in summed if id(find(axis)) in scores)
    return found or linear


def _mixes_positions(contraction: Contraction) -> bool:
    """Tell whether two activations are contracted over what is no width, for each index of a width that both have."""
    over = [axis for axis in contraction.contracted if not is_unit(axis)]
    heads = any(is_static(axis) and free_leaves(axis) for axis in contraction.shared)
    return bool(over) and heads and not any(free_leaves(axis) for axis in over)
