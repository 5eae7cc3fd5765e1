"""Make explicit what a graph only implies, so that the analysis has a name for it; what is computed stays the same."""

import onnx_graphsurgeon as gs

from graphclone.graphs import walk

FUSED_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
SUM = 3


def name_fused_sums(graph: gs.Graph) -> None:
    """Name the sum of every node that adds and normalises at once, where the graph reads such sums anywhere.

    In a pre-norm network each of these nodes gives on its sum as the residual stream; the last one's sum is computed but
    unnamed, and it is the exit of the last block.
    """
    nodes = [node for scope in walk(graph) for node in scope.nodes if node.op in FUSED_SUMS]
    if not any(len(node.outputs) > SUM and node.outputs[SUM].name for node in nodes):
        return
    for node in nodes:
        while len(node.outputs) < SUM:
            node.outputs.append(gs.Variable.empty())
        if len(node.outputs) == SUM:
            node.outputs.append(gs.Variable(f"{node.outputs[0].name}_sum", node.outputs[0].dtype))
