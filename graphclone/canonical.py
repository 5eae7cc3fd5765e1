"""Make explicit what a graph only implies, so that the analysis has a name for it; what is computed stays the same."""

import onnx_graphsurgeon as gs

from graphclone.graphs import walk

FUSED_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
SUM = 3


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
