"""Find the residual streams of a graph: their points, half blocks (attention, FFN) and blocks.

A point is a tensor every path from an embedding to the output crosses (path counts modulo a prime find them in linear
time) with the type of the stream. Between two points lies a half block if a path passes without a contraction (the
residual connection) and another with one (the branch). Masks, tables and encoder states are side inputs by
construction: they do not descend from the embedding.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, free_leaves, is_static, is_unit, leaves
from graphclone.axes.contractions import CONTRACTING
from graphclone.axes.typed import AxisTyping
from graphclone.flow import ATTENTION_OPS, Flow, attention_nodes, is_fused_sum
from graphclone.graphs import walk

MOST_SINKS = 4


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
    flow = Flow(graph, typing)
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
    return tuple(Stack(prefix, p, b) for prefix, (_, p, b) in zip(_prefixes(flow, found), found, strict=True))


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
    """Join the stacks in different branches of one If: what one branch does with a cache, the other does without."""
    merged: list = []
    for root, points, blocks in found:
        here = branches.get(points[-1])
        for i, (other, states, theirs) in enumerate(merged):
            there = branches.get(states[-1])
            if here and there and here[0] == there[0] and here[1] != there[1] and len(blocks) == len(theirs):
                joined = tuple(replace(a, twins=(*a.twins, b)) for a, b in zip(theirs, blocks, strict=True))
                merged[i] = (other, states, joined)
                break
        else:
            merged.append((root, points, blocks))
    return merged


def _numbered(blocks: Sequence[Block], flow: Flow) -> tuple[Block, ...]:
    """Count blocks through, and let their halves speak of nodes instead of steps."""

    def of_nodes(half: Half) -> Half:
        return Half(half.kind, half.entry, half.exit, tuple(sorted({flow.number[i] for i in half.nodes})))

    numbered = []
    for i, block in enumerate(blocks):
        branches = _side_by_side(flow, block.halves[0]) if len(block.halves) == 1 else ()
        halves, parallel = (tuple(map(of_nodes, group)) for group in (block.halves, branches))
        numbered.append(Block(i, block.entry, block.exit, halves, parallel=parallel))
    return tuple(numbered)


def _side_by_side(flow: Flow, half: Half) -> tuple[Half, ...]:
    """Return attention and feed-forward of a half block that runs both on the same input (GPT-J, GPT-NeoX, Falcon)."""
    if half.kind != "attention":
        return ()
    clean = {half.entry}
    for i in half.nodes:
        if flow.contractions[i] is None and all(name in clean for name in flow.inputs_of(i)) and flow.inputs_of(i):
            clean.update(flow.outputs_of(i))
    found: list[Half] = []
    waiting = [half.exit]
    while waiting:
        name = waiting.pop()
        step = _sum_behind(flow, half, name)
        if step is None:
            continue
        first, second = _summands(flow, half, step)
        for branch, other in ((first, second), (second, first)):
            if _sum_behind(flow, half, branch) is not None:
                waiting.append(branch)
            elif branch not in clean:
                if is_fused_sum(flow.nodes[step].op.node):  # its norm reads the sum without giving it a name
                    return ()
                nodes = tuple(sorted(flow.between(half.entry, branch)))
                mixes = attention_nodes(flow.nodes, flow.contractions, nodes)
                found.append(Half("attention" if mixes else "ffn", other, name, nodes))
    found.sort(key=lambda branch: branch.kind)
    return tuple(found) if [branch.kind for branch in found] == ["attention", "ffn"] else ()


def _sum_behind(flow: Flow, half: Half, name: str) -> int | None:
    """Return the step of a half block that adds two activations up to a tensor, rounded since or not; no bias."""
    step = flow.order.get(name)
    while step in half.nodes and flow.nodes[step].op.type in ("QuantizeLinear", "DequantizeLinear"):
        step = flow.order.get(flow.inputs_of(step)[0])
    return step if step in half.nodes and _is_sum(flow, half, step) else None


def _is_sum(flow: Flow, half: Half, step: int) -> bool:
    """Tell whether a step of a half block adds two activations: a place where branches join, no bias."""
    op = flow.nodes[step].op
    adds = op.real_type == "Add" or (is_fused_sum(op.node) and flow.outputs_of(step) == [op.node.outputs[3].name])
    return adds and len(_summands(flow, half, step)) == 2


def _summands(flow: Flow, half: Half, step: int) -> list[str]:
    """Return the activations that a step adds up, as real numbers: whole ones have scales of their own."""
    found = [name for name in flow.inputs_of(step) if name == half.entry or flow.order.get(name) in half.nodes]
    real = {name: flow.inputs_of(flow.order[name])[0] for name in found if flow.is_quantized(name)}
    found = [real.get(name, name) for name in found]
    return [] if any(name in flow.rounded for name in found) else found


def _all_halves(flow: Flow, root: str) -> list[Half]:
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
        found = _through(flow, root, missed[-1], inner)
        if not found:
            break
        halves += [half for half in found if half.entry not in {h.entry for h in halves}]
        halves.sort(key=lambda half: flow.order[half.exit])
    return [inner for half in halves for inner in _opened(flow, half)]


def _opened(flow: Flow, half: Half) -> list[Half]:
    """Return the half blocks of the stream that a branch is of its own (groups of a Swin2SR), else the half block."""
    mixes = set(attention_nodes(flow.nodes, flow.contractions, half.nodes))
    if len(mixes) < 2:
        return [half]
    for step in reversed(half.nodes):
        if not _is_sum(flow, half, step):
            continue
        for branch in _summands(flow, half, step):
            inner = _halves(flow, half.entry, branch) if branch != half.entry else []
            if len(inner) > 1 and mixes <= {i for found in inner for i in found.nodes}:
                return [deeper for found in inner for deeper in _opened(flow, found)]
    return [half]


def _through(flow: Flow, root: str, attention: int, inner: str) -> list[Half]:
    """Return the half blocks on the way to the last state of the stream that runs through an attention, or none.

    inner: what that attention gives. Which of the tensors before it are the stream shows when one of them is tried.
    """
    kinds = [flow.stream_type(point) for point in _points(flow, root, inner)]
    after = flow.descendants(inner)
    for kind in dict.fromkeys(kind for kind in reversed(kinds) if kinds.count(kind) > 1):
        sink = max((t for t in after if flow.stream_type(t) == kind), key=lambda t: flow.order[t], default=inner)
        found = _halves(flow, root, sink)
        if any(attention in half.nodes for half in found):
            return found
    return []


def _points(flow: Flow, root: str, sink: str) -> list[str]:
    """Return the articulation tensors of a chain: of those that only flatten or turn the stream, its usual form."""
    points = [p for p in flow.articulation(root, sink) if flow.stream_type(p) is not None]
    counts = Counter(flow.stream_type(p) for p in points)
    usual: dict[tuple, tuple] = {}
    for point in points:
        form = flow.stream_type(point)
        widths = tuple(sorted(form[1]))
        most = max(count for other, count in counts.items() if tuple(sorted(other[1])) == widths)
        if widths not in usual and counts[form] * 2 >= most:
            usual[widths] = form
    return [p for p in points if usual.get(tuple(sorted(flow.stream_type(p)[1]))) == flow.stream_type(p)]


def _halves(flow: Flow, root: str, sink: str) -> list[Half]:
    """Return the half blocks of the chain between a root and a sink."""
    points = [point for point in _points(flow, root, sink) if not flow.is_renamed(point)]
    below = flow.descendants(root)
    regions: list[tuple[str, str, str, tuple[int, ...]]] = []
    for entry, exit in itertools.pairwise(points):
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
    """Return half blocks with the norms behind them that their kind usually has; others of the last are the final norm.

    A norm that is written out crosses several points, each a region; so does a bias added to the stream.
    """
    behind: list[tuple[int, list[int]]] = []
    for i, (kind, *_) in enumerate(regions):
        if kind not in ("norm", "break"):
            behind.append((i, []))
        elif kind == "norm" and behind and behind[-1][0] + len(behind[-1][1]) == i - 1:
            behind[-1][1].append(i)
    expected = _usual_norms([(regions[i][0], len(norms)) for i, norms in behind])
    halves: list[Half] = []
    for (i, norms), count in zip(behind, expected, strict=True):
        kind, entry, exit, nodes = regions[i]
        for norm in norms[:count]:
            exit, nodes = regions[norm][2], nodes + regions[norm][3]
        halves.append(Half(kind, entry, exit, nodes))
    return halves


def _usual_norms(seen: Sequence[tuple[str, int]]) -> list[int]:
    """Return how many of the norms behind each half block are its own, given its kind and how many there are.

    Where all but the last repeat after a period (a Conformer has a norm behind each fourth), the last is as the one a
    period before it; else each has what its kind usually has.
    """
    kinds = [kind for kind, _ in seen]
    for period in range(1, len(seen) // 2 + 1):
        if kinds[period:] == kinds[:-period] and seen[period:-1] == seen[: -period - 1]:
            return [count for _, count in seen[:-1]] + [seen[-1 - period][1]]
    lengths: dict[str, Counter] = defaultdict(Counter)
    for kind, count in seen[:-1]:
        for group in (kind, ""):
            lengths[group][count] += 1
    usual = [lengths.get(kind) or lengths.get("") for kind in kinds]
    return [counts.most_common(1)[0][0] if counts else 0 for counts in usual]


def _passes(flow: Flow, entry: str, exit: str, nodes: tuple[int, ...]) -> bool:
    """Tell whether a path leads from entry to exit without a contraction: the residual connection."""
    inside, reached = set(nodes), {entry}
    for i in nodes:
        mixes = flow.nodes[i].op.type in ATTENTION_OPS or flow.nodes[i].op.type in CONTRACTING
        if i in inside and not mixes:
            if any(name in reached for name in flow.inputs_of(i)):
                reached.update(flow.outputs_of(i))
    return exit in reached


def _kind(flow: Flow, below: set[str], nodes: tuple[int, ...]) -> str:
    """Name a branch: attention where a contraction sums over an axis that a softmax over scores normalised."""
    mixes = attention_nodes(flow.nodes, flow.contractions, nodes)
    if not mixes:
        return "ffn"
    crossed = [_operands(flow, i, below) for i in mixes]
    return "attention" if any(crossed) else "cross_attention"


def _operands(flow: Flow, index: int, below: set[str]) -> bool:
    """Tell whether the values an attention mixes descend from the stream itself."""
    op = flow.nodes[index].op
    if op.type not in ATTENTION_OPS:
        return all(name in below for name in flow.inputs_of(index))
    packed = op.type == "Attention" and op.domain  # its second and third inputs are a weight and a bias
    slot = 0 if packed else next((slot for slot in (2, 1) if op.has(slot)), 0)
    return op.node.inputs[slot].name in below


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
    first = next((kind for kind in ("attention", "cross_attention") if kind in kinds), None)
    if first is None:
        groups = [[half] for half in halves]
    else:
        period = next(
            p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))
        )
        if (len(kinds) % period == 0 and period < len(kinds)) or (kinds[0] == first and kinds.count(first) == 1):
            starts = range(0, len(kinds), period)
        else:
            starts = [i for i, kind in enumerate(kinds) if kind == first]
        starts = list(starts)
        groups = [halves[a:b] for a, b in zip(starts, [*starts[1:], len(halves)], strict=True)]
    return tuple(Block(i, g[0].entry, g[-1].exit, tuple(g)) for i, g in enumerate(groups))


def _prefixes(flow: Flow, found: list) -> list[str]:
    """Name stacks: encoder and decoder where one attends to another, vision and text, else by number."""
    if len(found) < 2:
        return [""] * len(found)
    crosses = [any(h.kind == "cross_attention" for b in blocks for h in b.halves) for _, _, blocks in found]
    sources = [flow.raw_of.get(root) or flow.raw_of.get(states[-1], set()) for root, states, _ in found]
    images = [bool(source & flow.images) for source in sources]
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
