"""Find the residual streams of a graph: their points, half blocks (attention, FFN) and blocks.

A point is a tensor every path from an embedding to the output crosses (path counts modulo a prime find them in linear
time) with the type of the stream. Between two points lies a half block if a path passes without a contraction (the
residual connection) and another with one (the branch). Masks, tables and encoder states are side inputs by
construction: they do not descend from the embedding.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, free_leaves, is_static, is_unit, leaves
from graphclone.axes.contractions import CONTRACTING, Contraction, contraction_of
from graphclone.axes.notation import parse
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.graphs import walk

PRIME = (1 << 61) - 1
MOST_SINKS = 4
RENAMING = {"Identity", "Cast"}
ATTENTION_OPS = {"Attention", "MultiHeadAttention", "GroupQueryAttention"}


@dataclass(frozen=True, slots=True)
class Half:
    """A residual branch: `kind` is attention, cross_attention or ffn; `entry` and `exit` are tensors of the stream;
    `nodes` are the numbers of its nodes in the axis typing."""

    kind: str
    entry: str
    exit: str
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One period of a stack; `index` counts the parent's blocks; `twins` are the same block in other branches of an If;
    `parallel` are the branches of a half block that runs several side by side (a branch's `entry` is what it joins)."""

    index: int
    entry: str
    exit: str
    halves: tuple[Half, ...]
    twins: tuple["Block", ...] = ()
    parallel: tuple[Half, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """A residual stream with repeated blocks; `prefix` is '' or such as 'encoder.'; `points` are its states."""

    prefix: str
    points: tuple[str, ...]
    blocks: tuple[Block, ...]


def find_stacks(graph: gs.Graph, typing: AxisTyping) -> tuple[Stack, ...]:
    """Return the stacks of a graph in topological order.

    Example:
        [len(stack.blocks) for stack in find_stacks(model.graph, type_axes(model))]
    """
    flow = _Flow(graph, typing)
    candidates = []
    for root in flow.roots:
        candidates += [(root, run) for run in _runs(_all_halves(flow, root))]
    chosen: dict[str, list[list[Half]]] = defaultdict(list)
    crossed: set[str] = set()
    for root, run in sorted(candidates, key=lambda item: -len(item[1])):
        states = {run[0].entry, *(half.exit for half in run)}
        if not states & crossed and (len(run) > 1 or not chosen):
            chosen[root].append(run)
            crossed |= states
    found = []
    for root, runs in chosen.items():
        runs.sort(key=lambda run: flow.order.get(run[0].exit, -1))
        blocks = _numbered([block for run in runs for block in _group(run)], flow)
        states = [state for run in runs for state in (run[0].entry, *(half.exit for half in run))]
        if blocks:
            found.append((root, tuple(states), blocks))
    found.sort(key=lambda item: flow.order.get(item[1][-1], -1))
    found = _merge_branches(found, _branches(graph))
    return tuple(Stack(prefix, p, b) for prefix, (_, p, b) in zip(_prefixes(flow, found), found))


def _branches(graph: gs.Graph) -> dict[str, tuple[int, int]]:
    """Return, per tensor computed in a branch of an If, the node and the branch."""
    found: dict[str, tuple[int, int]] = {}
    for scope in walk(graph):
        for node in scope.nodes:
            bodies = [node.attrs.get(name) for name in ("then_branch", "else_branch")] if node.op == "If" else []
            for number, body in enumerate(bodies):
                for inner in body.nodes:
                    found.update((tensor.name, (id(node), number)) for tensor in inner.outputs)
    return found


def _merge_branches(found: list, branches: dict[str, tuple[int, int]]) -> list:
    """Make stacks in different branches of one If a single stack: what one branch does with a cache, the other without."""
    merged: list = []
    for root, points, blocks in found:
        here = branches.get(points[-1])
        for i, (other, states, theirs) in enumerate(merged):
            there = branches.get(states[-1])
            if here and there and here[0] == there[0] and here[1] != there[1] and len(blocks) == len(theirs):
                joined = tuple(
                    replace(a, twins=(*a.twins, b)) for a, b in zip(theirs, blocks)
                )
                merged[i] = (other, states, joined)
                break
        else:
            merged.append((root, points, blocks))
    return merged


def _numbered(blocks: Sequence[Block], flow: "_Flow") -> tuple[Block, ...]:
    """Count blocks through, and let their halves speak of nodes instead of steps."""

    def of_nodes(half: Half) -> Half:
        return Half(half.kind, half.entry, half.exit, tuple(sorted({flow.number[i] for i in half.nodes})))

    numbered = []
    for i, block in enumerate(blocks):
        branches = _side_by_side(flow, block.halves[0]) if len(block.halves) == 1 else ()
        halves, parallel = (tuple(map(of_nodes, group)) for group in (block.halves, branches))
        numbered.append(Block(i, block.entry, block.exit, halves, parallel=parallel))
    return tuple(numbered)


def _side_by_side(flow: "_Flow", half: Half) -> tuple[Half, ...]:
    """Return attention and feed-forward of a half block that runs both on the same input (GPT-J, GPT-NeoX, Falcon)."""
    if half.kind != "attention":
        return ()
    inside, clean = set(half.nodes), {half.entry}
    for i in half.nodes:
        if flow.contractions[i] is None and all(name in clean for name in flow.inputs_of(i)) and flow.inputs_of(i):
            clean.update(flow.outputs_of(i))
    found: list[Half] = []
    waiting = [half.exit]
    while waiting:
        name = waiting.pop()
        step = flow.order.get(name)
        if step not in inside or not _is_sum(flow, step, inside):
            continue
        first, second = flow.inputs_of(step)
        for branch, other in ((first, second), (second, first)):
            producer = flow.order.get(branch)
            if producer in inside and _is_sum(flow, producer, inside):
                waiting.append(branch)
            elif branch not in clean:
                if flow.nodes[step].op.type != "Add":  # its norm reads the sum without giving it a name
                    return ()
                nodes = tuple(sorted(flow.between(half.entry, branch)))
                mixes = attention_nodes(flow.nodes, flow.contractions, nodes)
                found.append(Half("attention" if mixes else "ffn", other, name, nodes))
    found.sort(key=lambda branch: branch.kind)
    return tuple(found) if [branch.kind for branch in found] == ["attention", "ffn"] else ()


def _is_sum(flow: "_Flow", step: int, inside: set[int]) -> bool:
    """Tell whether a step adds two activations: a place where branches join, no bias."""
    node = flow.nodes[step].op
    adds = node.type == "Add" or is_fused_sum(node.node) and flow.outputs_of(step) == [node.node.outputs[3].name]
    return adds and len(flow.inputs_of(step)) == 2


class _Flow:
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
        """Return what points of one stream share: the rank and the static axes."""
        axes = self.typing.types.get(name)
        if not axes or len(axes) < 2:
            return None
        static = [find(axis) for axis in axes if is_static(axis) and not is_unit(axis)]
        return (len(axes), tuple(id(a) if free_leaves(a) else a.size[0] for a in static)) if static else None

    def is_renamed(self, name: str) -> bool:
        """Tell whether a tensor is another one under a new name, or of another type."""
        return name in self.order and self.nodes[self.order[name]].op.type in RENAMING

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


def _has_matrix(node: TypedNode) -> bool:
    for slot, tensor in enumerate(node.op.node.inputs):
        if isinstance(tensor, gs.Constant) and tensor._values.dtype.kind not in "iub":
            if sum(n > 1 for n in tensor._values.shape) >= 2:
                return node.op.type not in ("Add", "Sub", "Mul", "Where", "Div")
    return False


def _all_halves(flow: _Flow, root: str) -> list[Half]:
    """Return the half blocks below a root: on the way to its output, and to attention that lies beside that way.

    Where features are read at several depths (a pyramid, hooks), no tensor is on every path to the output; the way to
    the last attention not found so far then leads through the rest.
    """
    sink = flow.last_output(root)
    if sink is None:
        return []
    halves = _halves(flow, root, sink)
    below = flow.descendants(root)
    for _ in range(MOST_SINKS):
        covered = {i for half in halves for i in half.nodes}
        missed = [i for i in flow.attention if i not in covered and flow.outputs_of(i)[0] in below]
        if not missed:
            break
        inner = flow.outputs_of(missed[-1])[0]
        kinds = [flow.stream_type(point) for point in _points(flow, root, inner)]
        kind = next((kind for kind in reversed(kinds) if kinds.count(kind) > 1), None)
        after = flow.descendants(inner)
        sink = max((t for t in after if flow.stream_type(t) == kind), key=lambda t: flow.order[t], default=inner)
        found = _halves(flow, root, sink)
        if not any(missed[-1] in half.nodes for half in found):
            break
        halves += [half for half in found if half.entry not in {h.entry for h in halves}]
        halves.sort(key=lambda half: flow.order[half.exit])
    return halves


def _points(flow: _Flow, root: str, sink: str) -> list[str]:
    """Return the articulation tensors of a chain; where some only flatten the stream, those of its usual rank."""
    points = [p for p in flow.articulation(root, sink) if flow.stream_type(p) is not None]
    counts = Counter(flow.stream_type(p) for p in points)
    usual: dict[tuple, int] = {}
    for point in points:
        rank, widths = flow.stream_type(point)
        most = max(count for (_, other), count in counts.items() if other == widths)
        if widths not in usual and counts[rank, widths] * 2 >= most:
            usual[widths] = rank
    return [p for p in points if usual.get(flow.stream_type(p)[1]) == flow.stream_type(p)[0]]


def _halves(flow: _Flow, root: str, sink: str) -> list[Half]:
    """Return the half blocks of the chain between a root and a sink."""
    points = [point for point in _points(flow, root, sink) if not flow.is_renamed(point)]
    below = flow.descendants(root)
    regions: list[tuple[str, str, str, tuple[int, ...]]] = []
    for entry, exit in zip(points, points[1:]):
        if flow.stream_type(entry) != flow.stream_type(exit):
            regions.append(("break", entry, exit, ()))
            continue
        nodes = flow.between(entry, exit)
        if not any(flow.contractions[i] is not None and flow.contractions[i].weight is not None for i in nodes):
            regions.append(("norm", entry, exit, nodes))
        elif _passes(flow, entry, exit, nodes):
            regions.append((_kind(flow, below, nodes), entry, exit, nodes))
        else:
            regions.append(("break", entry, exit, nodes))
    return _with_norms(regions)


def _with_norms(regions: Sequence[tuple[str, str, str, tuple[int, ...]]]) -> list[Half]:
    """Return half blocks with the norms behind them that their kind usually has; the last one's others are the final norm.

    A norm that is written out crosses several points, each a region; so does a bias added to the stream.
    """
    behind: list[tuple[int, list[int]]] = []
    for i, (kind, *_) in enumerate(regions):
        if kind not in ("norm", "break"):
            behind.append((i, []))
        elif kind == "norm" and behind and behind[-1][0] + len(behind[-1][1]) == i - 1:
            behind[-1][1].append(i)
    lengths: dict[str, Counter] = defaultdict(Counter)
    for i, norms in behind[:-1]:
        for kind in (regions[i][0], ""):
            lengths[kind][len(norms)] += 1
    halves: list[Half] = []
    for i, norms in behind:
        kind, entry, exit, nodes = regions[i]
        seen = lengths.get(kind) or lengths.get("")
        for norm in norms[: seen.most_common(1)[0][0] if seen else 0]:
            exit, nodes = regions[norm][2], nodes + regions[norm][3]
        halves.append(Half(kind, entry, exit, nodes))
    return halves


def _passes(flow: _Flow, entry: str, exit: str, nodes: tuple[int, ...]) -> bool:
    """Tell whether a path leads from entry to exit without a contraction: the residual connection."""
    inside, reached = set(nodes), {entry}
    for i in nodes:
        mixes = flow.nodes[i].op.type in ATTENTION_OPS or flow.nodes[i].op.type in CONTRACTING
        if i in inside and not mixes:
            if any(name in reached for name in flow.inputs_of(i)):
                reached.update(flow.outputs_of(i))
    return exit in reached


def _kind(flow: _Flow, below: set[str], nodes: tuple[int, ...]) -> str:
    """Name a branch: attention where a contraction sums over an axis that a softmax over scores normalised."""
    mixes = attention_nodes(flow.nodes, flow.contractions, nodes)
    if not mixes:
        return "ffn"
    crossed = [_operands(flow, i, below) for i in mixes]
    return "attention" if any(crossed) else "cross_attention"


def _operands(flow: _Flow, index: int, below: set[str]) -> bool:
    """Tell whether the values an attention mixes descend from the stream itself."""
    op = flow.nodes[index].op
    if op.type not in ATTENTION_OPS:
        return all(name in below for name in flow.inputs_of(index))
    packed = op.type == "Attention" and op.domain  # its second and third inputs are a weight and a bias
    slot = 0 if packed else next((slot for slot in (2, 1) if op.has(slot)), 0)
    return op.node.inputs[slot].name in below


def attention_nodes(
    nodes: Sequence[TypedNode], contractions: Sequence[Contraction | None], within: Sequence[int]
) -> list[int]:
    """Return the nodes that mix values by attention: fused operators, and contractions over a softmax's axis."""
    scores: set[int] = set()  # axes that contractions of two activations produce
    normalised: set[int] = set()
    found = []
    for i in within:
        node, contraction = nodes[i], contractions[i]
        if node.op.type in ATTENTION_OPS:
            found.append(i)
        elif contraction is not None and contraction.weight is None:
            if any(id(find(axis)) in normalised for axis in contraction.contracted):
                found.append(i)
            scores.update(id(find(axis)) for axis in node.outputs[0] or ())
        elif node.op.type == "Softmax" and node.outputs[0]:
            axis = node.outputs[0][node.op.axis(len(node.outputs[0]), -1)]
            if id(find(axis)) in scores:
                normalised.add(id(find(axis)))
        elif node.op.type == "ReduceSum" and node.text:
            summed = [node.bound[p.name] for p in parse(node.text).inputs[0] if p.statistic and p.name in node.bound]
            normalised.update(id(find(axis)) for axis in summed if id(find(axis)) in scores)
    return found


def _runs(halves: list[Half]) -> list[list[Half]]:
    """Split the half blocks where the stream is interrupted."""
    runs: list[list[Half]] = []
    for half in halves:
        if runs and runs[-1][-1].exit == half.entry:
            runs[-1].append(half)
        else:
            runs.append([half])
    return runs


def _group(halves: list[Half]) -> tuple[Block, ...]:
    """Group half blocks into blocks: one period, beginning with attention unless the whole run is periodic as it is."""
    kinds = [half.kind for half in halves]
    if "attention" not in kinds:
        groups = [[half] for half in halves]
    else:
        period = next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:])))
        if len(kinds) % period == 0 and period < len(kinds) or kinds[0] == "attention" and kinds.count("attention") == 1:
            starts = range(0, len(kinds), period)
        else:
            starts = [i for i, kind in enumerate(kinds) if kind == "attention"]
        starts = list(starts)
        groups = [halves[a:b] for a, b in zip(starts, [*starts[1:], len(halves)])]
    return tuple(Block(i, g[0].entry, g[-1].exit, tuple(g)) for i, g in enumerate(groups))


def _prefixes(flow: _Flow, found: list) -> list[str]:
    """Name stacks: encoder and decoder where one attends to another, vision and text, else by number."""
    if len(found) < 2:
        return [""] * len(found)
    crosses = [any(h.kind == "cross_attention" for b in blocks for h in b.halves) for _, _, blocks in found]
    images = [bool(flow.raw_of.get(root, set()) & flow.images) for root, _, _ in found]
    names = []
    for i in range(len(found)):
        if any(crosses):
            names.append("decoder" if crosses[i] else "encoder")
        elif any(images) and not all(images):
            names.append("vision" if images[i] else "text")
        else:
            names.append("stack")
    counts = Counter(names)
    seen: Counter = Counter()
    result = []
    for name in names:
        number = f"_{seen[name]}" if counts[name] > 1 else ""
        seen[name] += 1
        result.append(f"{name}{number}.")
    return result


def stream_axes(stack: Stack, typing: AxisTyping) -> list[Axis]:
    """Return the axes that are the widths of a stack's stream: one, or one per stage."""
    carried = Counter(
        id(leaf) for uses in typing.uses.values() for use in uses for axis in use.axes for leaf in leaves(axis)
    )
    found: dict[int, Axis] = {}
    for block in stack.blocks:
        axes = [axis for axis in typing.types[block.entry] if is_static(axis) and not is_unit(axis)]
        width = max(axes, key=lambda axis: (bool(free_leaves(axis)), sum(carried[id(leaf)] for leaf in leaves(axis))))
        found.setdefault(id(find(width)), width)
    return list(found.values())
