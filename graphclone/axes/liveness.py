"""Which nodes a graph needs for values, and which only for shapes."""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from graphclone.graphs import subgraphs


def data_live(graph: gs.Graph) -> set[int]:
    """Return the ids of nodes whose values reach an output, not only their shapes."""
    live: set[int] = set()
    waiting: list[gs.Tensor] = list(graph.outputs)
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) in live:
                continue
            live.add(id(node))
            if node.op not in ("Shape", "Size"):
                waiting.extend(node.inputs)
                for inner in subgraphs(node):
                    waiting.extend(used_tensors(inner))
    return live


def used_tensors(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """Yield what the nodes of a graph and of the graphs inside it read, and what it returns."""
    for node in graph.nodes:
        yield from node.inputs
        for inner in subgraphs(node):
            yield from used_tensors(inner)
    yield from graph.outputs
