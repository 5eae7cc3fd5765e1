"""Make explicit what a graph only implies, so that the analysis has a name for it; what is computed stays the same."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphclone.graphs import subgraphs, walk

FUSED_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
SUM = 3
MATRIX_PRODUCTS = ("Gemm", "MatMul")


def make_explicit(graph: gs.Graph) -> None:
    """Name the sums and restore the states of the residual stream that a graph only implies."""
    name_fused_sums(graph)
    for scope in walk(graph):
        restore_flat_states(scope)


def name_fused_sums(graph: gs.Graph) -> None:
    """Name the sum of the nodes that add and normalise at once, where the sum is a state of the residual stream.

    It is in a pre-norm network: the last block's sum is computed but unnamed, whether the other blocks are fused (the
    graph then reads their sums) or not. In a post-norm network what the norm gives is the state: it is added again.
    """
    nodes = [node for scope in walk(graph) for node in scope.nodes if node.op in FUSED_SUMS]
    read = any(len(node.outputs) > SUM and node.outputs[SUM].name for node in nodes)
    for node in nodes if read else [node for node in nodes if not (_adds_a_norm(node) or _is_added_again(node))]:
        while len(node.outputs) < SUM:
            node.outputs.append(gs.Variable.empty())
        if len(node.outputs) == SUM:
            node.outputs.append(gs.Variable(f"{node.outputs[0].name}_sum", node.outputs[0].dtype))


def _adds_a_norm(node: gs.Node) -> bool:
    producers = [tensor.inputs[0] for tensor in node.inputs[:2] if tensor.inputs]
    return any("Normalization" in producer.op for producer in producers)


def _is_added_again(node: gs.Node) -> bool:
    consumers = node.outputs[0].outputs
    return any(each.op in FUSED_SUMS or each.op == "Add" for each in consumers)


def restore_flat_states(graph: gs.Graph) -> None:
    """Let matrix products that read a state as rows read them off the state itself, where only its addition does.

    A simplifier that finds x -> rows behind rows -> x takes both out for the products, and leaves rows -> x for the
    residual connection: then no tensor is what both read. In this order they do: rows -> x -> the same rows.
    """
    for node in list(graph.nodes):
        if node.op != "Reshape" or not node.inputs[0].inputs or not _restores_rows(node):
            continue
        above = _nodes_above(node)
        products = [
            each
            for each in node.inputs[0].outputs
            if each.op in MATRIX_PRODUCTS and each.inputs[0] is node.inputs[0] and id(each) not in above
        ]
        here = {id(each) for each in graph.nodes}
        if products and all(id(each) in here for each in products):
            _read_from(graph, node, products, above)


def _restores_rows(node: gs.Node) -> bool:
    """Tell whether a node makes a sequence out of rows of the same width, to be added to a branch."""
    before, after = (tensor.shape or () for tensor in (node.inputs[0], node.outputs[0]))
    rows = len(before) == 2 and len(after) > 2 and isinstance(after[-1], int) and before[-1] == after[-1]
    return rows and any(each.op in FUSED_SUMS or each.op == "Add" for each in node.outputs[0].outputs)


def _read_from(graph: gs.Graph, node: gs.Node, products: Sequence[gs.Node], above: set[int]) -> None:
    """Let products read the rows of what a node gives; what the node needs goes before the first of them."""
    rows, state = node.inputs[0], node.outputs[0]
    flat = gs.Variable(f"{state.name}_rows", rows.dtype, rows.shape)
    flatten = gs.Node("Flatten", f"{node.name or state.name}_rows", {"axis": len(state.shape) - 1}, [state], [flat])
    for product in products:
        product.inputs[0] = flat
    reading = {id(product) for product in products}
    first = next(i for i, each in enumerate(graph.nodes) if id(each) in reading)
    before, rest = graph.nodes[:first], graph.nodes[first:]
    needed, others = ([n for n in rest if (id(n) in above) == wanted] for wanted in (True, False))
    graph.nodes[:] = [*before, *needed, flatten, *others]


def _nodes_above(node: gs.Node) -> set[int]:
    """Return the ids of a node and of all it is computed from."""
    found, waiting = {id(node)}, [node]
    while waiting:
        current = waiting.pop()
        inner = [each for body in subgraphs(current) for scope in walk(body) for each in scope.nodes]
        for tensor in (tensor for each in (current, *inner) for tensor in each.inputs):
            for producer in tensor.inputs:
                if id(producer) not in found:
                    found.add(id(producer))
                    waiting.append(producer)
    return found
