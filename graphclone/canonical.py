"""Make explicit what a graph only implies, so that the analysis has a name for it; what is computed stays the same."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.graphs import subgraphs, walk
from graphclone.weights import weight_of
from graphclone.whole_numbers import plain_of

FUSED_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
SUM = 3
MATRIX_PRODUCTS = ("Gemm", "MatMul")
BLOCKED = "com.microsoft.nchwc"
QUANTIZING = ("QuantizeLinear", "DynamicQuantizeLinear")
MOVING = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def make_explicit(graph: gs.Graph) -> None:
    """Name the sums and restore the states of the residual stream that a graph only implies."""
    name_fused_sums(graph)
    for scope in walk(graph):
        restore_flat_states(scope)
        show_real_states(scope)
        show_plain_states(scope)


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


def show_real_states(graph: gs.Graph) -> None:
    """Let a stream that operators on whole numbers add to be real between them: dequantized, and quantized again.

    The norm behind such a sum (QLinearAdd) reads it as real numbers, the next sum reads it in whole ones by the same
    scale: no tensor is what both read. Now both read the real one; the whole numbers that are made of it again are the
    same numbers. So it is with what the sums add up, where branches that run side by side join.
    """
    made = {id(tensor): node for node in graph.nodes for tensor in node.outputs}
    shown: dict[int, Sequence[gs.Tensor]] = {}  # scale and zero point, by the id of what is shown
    waiting = [node for node in graph.nodes if _joins(node) and _is_read_as_real(node.outputs[0])]
    while waiting:
        node = waiting.pop()
        plain = plain_of(node.op, node.domain, node.attrs)
        shown[id(node.outputs[0])] = node.inputs[plain.result : plain.result + 2]
        for slot in plain.given:
            operand = node.inputs[slot]
            producer = made.get(id(operand))
            if producer is None or id(operand) in shown or producer.op in QUANTIZING:
                continue
            if _joins(producer):
                waiting.append(producer)
            else:
                shown[id(operand)] = node.inputs[slot + 1 : slot + 3]
    tensors = [tensor for node in graph.nodes for tensor in node.outputs if id(tensor) in shown]
    _put_behind(graph, {id(tensor): _real_and_whole(tensor, shown[id(tensor)], made) for tensor in tensors})


def show_plain_states(graph: gs.Graph) -> None:
    """Let a stream that onnxruntime keeps in blocks of channels be plain where something reads it so.

    The branch behind it then reads the plain one, in blocks again: padding, which no weight reads, is zeros.
    """
    added = {}
    for node in list(graph.nodes):
        if node.op != "ReorderOutput" or node.domain != BLOCKED or len(node.inputs[0].outputs) < 2:
            continue
        tensor, plain, attributes = node.inputs[0], node.outputs[0], dict(node.attrs)
        node.inputs.clear()
        node.outputs.clear()
        again = gs.Variable(f"{tensor.name}_again", tensor.dtype, tensor.shape)
        _exchange(tensor, again)
        last = {"channels_last": attributes.get("channels_last", 0)}
        added[id(tensor)] = [
            gs.Node("ReorderOutput", node.name, attributes, [tensor], [plain], domain=BLOCKED),
            gs.Node("ReorderInput", again.name, last, [plain], [again], domain=BLOCKED),
        ]
    _put_behind(graph, added)


def _put_behind(graph: gs.Graph, added: dict[int, list[gs.Node]]) -> None:
    """Put nodes behind those that make tensors, by the tensors' ids; nodes that give nothing any more go."""
    order = [(node, *(new for tensor in node.outputs for new in added.get(id(tensor), ()))) for node in graph.nodes]
    graph.nodes[:] = [node for group in order for node in group if node.outputs]


def _exchange(tensor: gs.Tensor, other: gs.Tensor) -> None:
    """Let all that reads a tensor read another."""
    for reader in list(tensor.outputs):
        for slot in [slot for slot, read in enumerate(reader.inputs) if read is tensor]:
            reader.inputs[slot] = other


def _joins(node: gs.Node) -> bool:
    """Tell whether a node adds two activations that are whole numbers, by stored scales."""
    plain = plain_of(node.op, node.domain, node.attrs)
    if plain is None or plain.type != "Add" or not all(node.inputs[slot].inputs for slot in plain.given):
        return False
    steps = [node.inputs[slot : slot + 2] for slot in (*(slot + 1 for slot in plain.given), plain.result)]
    stored = all(isinstance(tensor, gs.Constant) for step in steps for tensor in step)
    return stored and all(weight_of(scale).dtype == np.float32 for scale, _ in steps)


def _is_read_as_real(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor, moved or not, is dequantized for more than its shape."""
    for reader in tensor.outputs:
        given = reader.outputs[0]
        if reader.op == "DequantizeLinear" and any(each.op not in ("Shape", "Size") for each in given.outputs):
            return True
        if reader.op in MOVING and reader.inputs[0] is tensor and _is_read_as_real(given):
            return True
    return False


def _real_and_whole(tensor: gs.Tensor, step: Sequence[gs.Tensor], made: dict[int, gs.Node]) -> list[gs.Node]:
    """Return what makes a tensor real, in the place of what did so, and whole again for all that read it."""
    real, name = gs.Variable(f"{tensor.name}_real", np.float32, tensor.shape), f"{tensor.name}_real"
    for reader in tensor.outputs:
        if reader.op == "DequantizeLinear" and reader.inputs[1] is step[0] and id(reader.outputs[0]) in made:
            real, name = reader.outputs[0], reader.name
            reader.inputs.clear()
            reader.outputs.clear()
            break
    whole = gs.Variable(f"{tensor.name}_again", tensor.dtype, tensor.shape)
    _exchange(tensor, whole)
    return [
        gs.Node("DequantizeLinear", name, {}, [tensor, *step], [real]),
        gs.Node("QuantizeLinear", whole.name, {}, [real, *step], [whole]),
    ]
