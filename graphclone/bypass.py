"""Drop blocks: rewire each exit to its entry, remove what died, renumber what stays."""

import re
from collections.abc import Callable, Iterable, Sequence

import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.blocks import Block, Stack
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.plan import Cut


def bypass(child: Model, analysis: Analysis, cut: Cut) -> None:
    """Remove the dropped blocks and half blocks of a cut from the child's graph."""
    dropped = [
        (stack, block) for stack in analysis.stacks for block in stack.blocks if block.index not in cut.blocks[stack.prefix]
    ]
    spans = [(block.entry, block.exit) for _, block in dropped] + [(half.entry, half.exit) for half in cut.dropped]
    if not spans:
        remove_dead(child.graph)
        return
    tensors = child.graph.tensors()
    caches = _caches(child, spans)
    names = {prefix: _numbering(child, stack) for stack in analysis.stacks for prefix in [stack.prefix]}
    entry_of = dict((exit, entry) for entry, exit in spans)
    read = {t.name for t in child.graph.inputs if t.outputs}
    for exit in entry_of:
        entry = exit
        while entry in entry_of:
            entry = entry_of[entry]
        _rewire(child.graph, tensors[exit], tensors[entry])
    child.graph.outputs[:] = [t for t in child.graph.outputs if t.name not in caches]
    remove_dead(child.graph)
    child.graph.inputs[:] = [t for t in child.graph.inputs if t.outputs or t.name not in read]
    for stack in analysis.stacks:
        kept = cut.blocks[stack.prefix]
        if len(kept) < len(stack.blocks):
            _renumber(child, names[stack.prefix], kept)
            child.metadata[f"graphclone.blocks.{stack.prefix}".rstrip(".")] = ",".join(map(str, kept))


def _rewire(graph: gs.Graph, exit: gs.Tensor, entry: gs.Tensor) -> None:
    """Let everything that reads the exit read the entry; a graph output keeps its name."""
    for consumer in list(exit.outputs):
        exchange_input(consumer, exit, entry)
    if not any(tensor is exit for tensor in graph.outputs):
        return
    producer = exit.inputs[0]
    position = next(i for i, tensor in enumerate(producer.outputs) if tensor is exit)
    producer.outputs[position] = gs.Variable(f"{exit.name}_dropped", exit.dtype)
    graph.nodes.append(gs.Node("Identity", f"{exit.name}_kept", {}, [entry], [exit]))


def exchange_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every slot of a node that reads one tensor read another."""
    for slot, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[slot] = new


def _caches(child: Model, spans: Sequence[tuple[str, str]]) -> set[str]:
    """Return the graph outputs that lie strictly inside dropped spans: their caches and per-block outputs."""
    tensors = child.graph.tensors()
    outputs = {t.name for t in child.graph.outputs}
    entries, exits = {entry for entry, _ in spans}, {exit for _, exit in spans}
    found: set[str] = set()
    for entry, exit in spans:
        seen: set[str] = set()
        waiting = [tensors[entry]]
        inside: set[int] = set()
        while waiting:
            for node in waiting.pop().outputs:
                for tensor in node.outputs:
                    if tensor.name not in seen and tensor.name != exit:
                        seen.add(tensor.name)
                        inside.add(id(node))
                        waiting.append(tensor)
        above = _reaching(tensors[exit], {entry})
        for name in seen & outputs:
            if not tensors[name].inputs or name in entries | exits:
                continue
            sources = _reaching(tensors[name], {entry}) & above
            past_exit = exit in {t.name for node in _nodes(_reaching(tensors[name], set()), child.graph) for t in node.outputs}
            if sources and not past_exit:
                found.add(name)
    return found


def _reaching(tensor: gs.Tensor, stop: set[str]) -> set[int]:
    """Return the ids of the nodes a tensor is computed by, up to the tensors named `stop`."""
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if current.name in stop:
            continue
        for node in current.inputs:
            if id(node) not in seen:
                seen.add(id(node))
                waiting.extend(node.inputs)
    return seen


def _nodes(ids: set[int], graph: gs.Graph) -> Iterable[gs.Node]:
    return (node for node in graph.nodes if id(node) in ids)


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
    """Return the (text before, offset) pairs by which names carry a block's number, as ('transformer.h.', 0)."""
    common: set[tuple[str, int]] | None = None
    for block in stack.blocks:
        names = _names_in(child, block)
        here = set()
        for name in names:
            for match in re.finditer(r"\d+", name):
                offset = int(match.group()) - block.index
                if offset in (0, 1):
                    here.add((name[: match.start()], offset))
        common = here if common is None else common & here
    return sorted(common or ())


def _names_in(child: Model, block: Block) -> set[str]:
    tensors = child.graph.tensors()
    inside = _reaching(tensors[block.exit], {block.entry})
    below: set[int] = set()
    waiting = [tensors[block.entry]]
    while waiting:
        for node in waiting.pop().outputs:
            if id(node) not in below:
                below.add(id(node))
                waiting.extend(node.outputs)
    names: set[str] = set()
    for node in child.graph.nodes:
        if id(node) in inside and (id(node) in below or all(isinstance(t, gs.Constant) for t in node.inputs)):
            names.add(node.name)
            names.update(t.name for t in (*node.inputs, *node.outputs))
            names.update(child.node_metadata.get(node.name, {}).values())
    return names


def _renumber(child: Model, numbering: Sequence[tuple[str, int]], kept: Sequence[int]) -> None:
    """Rename initializers, nodes, tensors, inputs, outputs and metadata of kept blocks: layer.0, .1, .5 -> .0, .1, .2."""
    if not numbering:
        return
    number = {old: new for new, old in enumerate(kept)}
    offsets = dict(numbering)
    pattern = re.compile("(" + "|".join(re.escape(p) for p in sorted(offsets, key=len, reverse=True)) + r")(\d+)(?!\d)")

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

