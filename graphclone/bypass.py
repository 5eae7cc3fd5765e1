"""Drop blocks: rewire each exit to its entry, remove what died, renumber what stays."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.blocks import Block, Stack
from graphclone.cut import Cut
from graphclone.flow import is_fused_sum
from graphclone.graphs import walk
from graphclone.model import Model


def bypass(child: Model, analysis: Analysis, cut: Cut, renumber: bool = True) -> None:
    """Remove the dropped blocks and half blocks of a cut from the child's graph, and number the others anew."""
    dropped = [
        same
        for stack in analysis.stacks
        for block in stack.blocks
        if block.index not in cut.blocks[stack.prefix]
        for same in (block, *block.twins)
    ]
    spans = [(part.entry, part.exit) for part in (*dropped, *cut.dropped)]
    if spans:
        numbering = {stack.prefix: _numbering(child, stack) for stack in analysis.stacks}
        _remove_spans(child, analysis, spans)
    if spans or cut.indices:
        for graph in walk(child.graph):
            remove_dead(graph)
    for stack in analysis.stacks:
        kept = cut.blocks[stack.prefix]
        if renumber and len(kept) < len(stack.blocks):
            _renumber(child, numbering[stack.prefix], kept)
            child.metadata[f"graphclone.blocks.{stack.prefix}".rstrip(".")] = ",".join(map(str, kept))


def _remove_spans(child: Model, analysis: Analysis, spans: Sequence[tuple[str, str]]) -> None:
    """Let what reads an exit read its entry; remove the inputs and outputs that only the spans had."""
    scopes = {t.name: graph for graph in walk(child.graph) for node in graph.nodes for t in node.outputs}
    tensors = _tensors(child.graph)
    lost = _outputs_inside(child, tensors, spans) | _states_of(child, analysis, spans)
    read = {t.name for t in child.graph.inputs if _is_read(t, child.graph)}
    entry_of = {exit: entry for entry, exit in spans}
    _remove_outputs(child.graph, lost)
    for exit in entry_of:
        entry = exit
        while entry in entry_of:
            entry = entry_of[entry]
        _rewire(scopes[exit], tensors[exit], tensors[entry])
    for graph in walk(child.graph):
        remove_dead(graph)
    child.graph.inputs[:] = [t for t in child.graph.inputs if t.name not in read or _is_read(t, child.graph)]


def _tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    found = {t.name: t for t in graph.inputs}
    found.update((t.name, t) for scope in walk(graph) for node in scope.nodes for t in (*node.inputs, *node.outputs))
    return found


def _is_read(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    """Tell whether a node reads a tensor, or a branch passes it on."""
    if tensor.outputs:
        return True
    return any(t is tensor for scope in walk(graph) for t in scope.outputs)


def _remove_outputs(graph: gs.Graph, lost: set[str]) -> None:
    """Remove outputs of the graph, and of the branches and the If they come through."""
    for scope in walk(graph):
        for node in scope.nodes:
            bodies = [body for body in node.attrs.values() if isinstance(body, gs.Graph)] if node.op == "If" else []
            gone = {i for body in bodies for i, tensor in enumerate(body.outputs) if tensor.name in lost}
            for position in sorted(gone, reverse=True):
                lost.add(node.outputs[position].name)
                del node.outputs[position]
                for body in bodies:
                    del body.outputs[position]
    graph.outputs[:] = [tensor for tensor in graph.outputs if tensor.name not in lost]


def _rewire(graph: gs.Graph, exit: gs.Tensor, entry: gs.Tensor) -> None:
    """Let everything that reads the exit read the entry; an output of the graph keeps its name."""
    if is_fused_sum(exit.inputs[0]):
        _unfuse(graph, exit.inputs[0], entry)
    for consumer in list(exit.outputs):
        exchange_input(consumer, exit, entry)
    if not any(tensor is exit for tensor in graph.outputs):
        return
    producer = exit.inputs[0]
    position = next(i for i, tensor in enumerate(producer.outputs) if tensor is exit)
    producer.outputs[position] = gs.Variable(f"{exit.name}_dropped", exit.dtype)
    graph.nodes.append(gs.Node("Identity", f"{exit.name}_kept", {}, [entry], [exit]))


def _unfuse(graph: gs.Graph, node: gs.Node, entry: gs.Tensor) -> None:
    """Where a node that adds and normalises no longer adds, normalise the entry alone."""
    layer = node.op == "SkipLayerNormalization"
    weights = [tensor for tensor in node.inputs[2 : 4 if layer else 3] if not tensor.is_empty()]
    attributes = {"epsilon": node.attrs.get("epsilon", 1e-12 if layer else 1e-6), "axis": -1}
    kind = "LayerNormalization" if layer else "SimplifiedLayerNormalization"
    normalised = node.outputs[0]
    alone = gs.Node(kind, f"{node.name}_alone", attributes, [entry, *weights], [])
    node.outputs[0] = gs.Variable(f"{normalised.name}_dropped", normalised.dtype)
    alone.outputs.append(normalised)
    graph.nodes.insert(next(i for i, other in enumerate(graph.nodes) if other is node), alone)


def exchange_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every slot of a node that reads one tensor read another."""
    for slot, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[slot] = new


def _outputs_inside(child: Model, tensors: dict[str, gs.Tensor], spans: Sequence[tuple[str, str]]) -> set[str]:
    """Return the outputs computed strictly inside dropped spans, such as caches."""
    ends = {name for span in spans for name in span}
    outputs = {t.name for graph in walk(child.graph) for t in graph.outputs} - ends
    found: set[str] = set()
    for entry, exit in spans:
        below = _below(tensors[entry], exit)
        for name in outputs & below.keys():
            if exit not in _names_above(tensors[name]) and _above(tensors[name], {entry}) & _above(
                tensors[exit], {entry}
            ):
                found.add(name)
    return found


def _states_of(child: Model, analysis: Analysis, spans: Sequence[tuple[str, str]]) -> set[str]:
    """Return the exits of dropped spans that are outputs, where the model gives the states of other blocks too."""
    outputs = {t.name for t in child.graph.outputs}
    exits = {exit for _, exit in spans}
    found: set[str] = set()
    for stack in analysis.stacks:
        given = [point for point in stack.points if point in outputs]
        found |= {point for point in given[:-1] if point in exits}
    return found


def _below(tensor: gs.Tensor, exit: str) -> dict[str, gs.Tensor]:
    """Return the tensors that descend from one without passing the exit.

    What a node that adds and normalises at once gives beside its sum is the sum's norm: it descends from the sum too.
    """
    seen: dict[str, gs.Tensor] = {}
    fused = [node for node in tensor.inputs if is_fused_sum(node) and node.outputs[3] is tensor]
    waiting = [tensor, *(node.outputs[0] for node in fused)]
    while waiting:
        for node in waiting.pop().outputs:
            for output in node.outputs:
                if output.name not in seen and output.name != exit:
                    seen[output.name] = output
                    waiting.append(output)
    return seen


def _above(tensor: gs.Tensor, stop: set[str]) -> set[int]:
    """Return the ids of the nodes a tensor is computed by, up to the tensors named `stop`."""
    return {id(node) for node in _nodes_above(tensor, stop)}


def _names_above(tensor: gs.Tensor) -> set[str]:
    return {output.name for node in _nodes_above(tensor, set()) for output in node.outputs} - {tensor.name}


def _nodes_above(tensor: gs.Tensor, stop: set[str]) -> list[gs.Node]:
    seen: dict[int, gs.Node] = {}
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if current.name in stop:
            continue
        for node in current.inputs:
            if id(node) not in seen:
                seen[id(node)] = node
                waiting.extend(node.inputs)
    return list(seen.values())


def remove_dead(graph: gs.Graph) -> None:
    """Remove nodes whose outputs reach no graph output; the others keep their order, sorted where edits broke it."""
    live: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) not in live:
                live.add(id(node))
                waiting.extend(node.inputs)
                for inner in (v for v in node.attrs.values() if isinstance(v, gs.Graph)):
                    for scope in walk(inner):
                        waiting.extend(t for n in scope.nodes for t in n.inputs)
                        waiting.extend(scope.outputs)
    for node in [node for node in graph.nodes if id(node) not in live]:
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes[:] = [node for node in graph.nodes if id(node) in live]


# renumbering -------------------------------------------------------------------------------------------------------


def _numbering(child: Model, stack: Stack) -> list[tuple[str, int]]:
    """Return (text before, offset) pairs by which names carry a block's number, or one more, as ('transformer.h.', 0).

    Names that several blocks read tell nothing, but those of caches: four tables for all are not a table of each block.
    What has other numbers in a block as well counts something else: its operators of a kind, or layers that alternate.
    """
    common: set[tuple[str, int]] | None = None
    other: set[str] = set()
    ends = {tensor.name for tensor in (*child.graph.inputs, *child.graph.outputs)}
    names = [_names_in(child, block) for block in stack.blocks]
    times = Counter(itertools.chain.from_iterable(names))
    for block, mine in zip(stack.blocks, names, strict=True):
        own = {name: set(_places(name, block.index)) for name in mine if times[name] == 1 or name in ends}
        other |= {text for name in own.keys() - ends for text, offset in own[name] if offset not in (0, 1)}
        here = set().union(*own.values())
        common = here if common is None else common & here
    return sorted(place for place in common or () if place[0] not in other)


def _places(name: str, number: int) -> Iterator[tuple[str, int]]:
    """Yield the text before each number in a name, and by how much that is more than a block's."""
    for match in re.finditer(r"\d+", name):
        yield name[: match.start()], int(match.group()) - number


def _names_in(child: Model, block: Block) -> set[str]:
    tensors = _tensors(child.graph)
    names: set[str] = set()
    for part in (block, *block.twins):
        below = _below(tensors[part.entry], "")
        for node in _nodes_above(tensors[part.exit], {part.entry}):
            inside = any(t.name in below for t in node.outputs)
            if inside or all(isinstance(t, gs.Constant) for t in node.inputs):
                names.add(node.name)
                names.update(t.name for t in (*node.inputs, *node.outputs))
                names.update(child.node_metadata.get(node.name, {}).values())
        names.update(name for name in below if name in {t.name for t in child.graph.outputs})
    return names


def _renumber(child: Model, numbering: Sequence[tuple[str, int]], kept: Sequence[int]) -> None:
    """Rename weights, nodes, tensors, inputs, outputs and metadata of kept blocks: layer.0, .1, .5 -> .0, .1, .2."""
    if not numbering:
        return
    number = {old: new for new, old in enumerate(kept)}
    offsets = dict(numbering)
    texts = "|".join(re.escape(text) for text in sorted(offsets, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)({texts})(\d+)(?!\d)")

    def renamed(text: str) -> str:
        def one(match: re.Match) -> str:
            offset = offsets[match.group(1)]
            old = int(match.group(2)) - offset
            return f"{match.group(1)}{number[old] + offset}" if old in number else match.group(0)

        return pattern.sub(one, text)

    for graph in walk(child.graph):
        tensors = _unique(t for node in graph.nodes for t in (*node.inputs, *node.outputs))
        child.value_metadata = _rename(tensors, renamed, child.value_metadata)
        child.node_metadata = _rename(graph.nodes, renamed, child.node_metadata)
    child.node_metadata = {
        name: {key: renamed(value) for key, value in props.items()} for name, props in child.node_metadata.items()
    }


def _rename(items: Sequence, renamed: Callable[[str], str], notes: dict[str, dict]) -> dict[str, dict]:
    """Rename tensors or nodes and what is noted under their names; what a dropped block left behind makes way."""
    taken = {new for item in items if (new := renamed(item.name)) != item.name}
    result = dict(notes)
    for item in items:
        old, new = item.name, renamed(item.name)
        while new == old and item.name in taken:
            item.name += "_shared"
        item.name = item.name if new == old else new
        if item.name != old and old in notes:
            result[item.name] = notes[old]
    return result


def _unique(tensors: Iterable[gs.Tensor]) -> list[gs.Tensor]:
    seen: dict[int, gs.Tensor] = {}
    for tensor in tensors:
        if not tensor.is_empty():
            seen[id(tensor)] = tensor
    return list(seen.values())
