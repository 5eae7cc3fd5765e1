"""Sequences of a known number of tensors become the tensors themselves, which the analysis can follow."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto

from graphclone.graphs import walk
from graphclone.weights import Weight, weight_of

MAKERS = ("SplitToSequence", "SequenceConstruct")
READERS = ("SequenceAt", "SequenceLength", "ConcatFromSequence")
INPUT_AXES_OPSET = 13
Shapes = Mapping[str, Sequence[int | None]]


def open_sequences(graph: gs.Graph, proto: ModelProto) -> None:
    """Write SplitToSequence as Split, SequenceAt as the tensor it picks and ConcatFromSequence as Concat.

    Only where the number of tensors and what reads them is known: by constants, or by a shape.
    proto: what the graph was read from; onnx infers the shapes that it does not declare.
    """
    if not any(node.op in MAKERS for scope in walk(graph) for node in scope.nodes):
        return
    shapes = _inferred(proto)
    nodes = [node for scope in walk(graph) for node in scope.nodes]
    names = {named.name for node in nodes for named in (node, *node.inputs, *node.outputs)}
    for scope in walk(graph):
        inside, outputs = {id(node) for node in scope.nodes}, {id(tensor) for tensor in scope.outputs}
        replaced: dict[int, list[gs.Node]] = {}
        for node in scope.nodes:
            if node.op not in MAKERS or node.domain or id(node.outputs[0]) in outputs:
                continue
            readers = list(node.outputs[0].outputs)
            if all(id(reader) in inside and _is_known(reader) for reader in readers):
                opened = _Opened(node, graph.opset, names, shapes)
                if opened.tensors is not None:
                    replaced[id(node)] = opened.nodes
                    replaced |= {id(reader): opened.read(reader) for reader in readers}
        if replaced:
            scope.nodes[:] = [new for node in scope.nodes for new in replaced.get(id(node), [node])]


def _is_known(reader: gs.Node) -> bool:
    """Tell whether a node reads a sequence as a whole, or a tensor of a known number."""
    chosen = reader.op != "SequenceAt" or isinstance(reader.inputs[1], gs.Constant)
    return reader.op in READERS and not reader.domain and chosen


class _Opened:
    """A sequence as tensors. tensors: None where their number is not known. nodes: what makes them."""

    def __init__(self, node: gs.Node, opset: int, names: set[str], shapes: Shapes):
        self.opset = opset
        self.names = names
        self.shapes = shapes
        self.nodes: list[gs.Node] = []
        self.tensors = list(node.inputs) if node.op == "SequenceConstruct" else self._split(node)
        if self.tensors is not None:
            node.inputs.clear()

    def read(self, reader: gs.Node) -> list[gs.Node]:
        """Return what takes the place of a node that reads the sequence; its name and its output's stay."""
        index = int(weight_of(reader.inputs[1]).load()) if reader.op == "SequenceAt" else 0
        outputs, nodes, attributes, kind = list(reader.outputs), [], {}, "Identity"
        if reader.op == "SequenceAt":
            inputs = [self.tensors[index]]
        elif reader.op == "SequenceLength":
            inputs = [self._constant(reader, np.array(len(self.tensors), np.int64))]
        else:
            kind, attributes, inputs = "Concat", {"axis": reader.attrs["axis"]}, self.tensors
            if reader.attrs.get("new_axis", 0):
                made = [self._rearranged("Unsqueeze", reader, tensor, reader.attrs["axis"]) for tensor in inputs]
                nodes, inputs = made, [node.outputs[0] for node in made]
        reader.inputs.clear()
        reader.outputs.clear()
        return [*nodes, gs.Node(kind, reader.name, attributes, list(inputs), outputs)]

    def _split(self, node: gs.Node) -> list[gs.Tensor] | None:
        """Return the tensors that a SplitToSequence makes."""
        axis, sizes = int(node.attrs.get("axis", 0)), _sizes(node, self.shapes)
        if sizes is None:
            return None
        data, out = node.inputs[0], node.outputs[0].name
        parts = [gs.Variable(self._fresh(f"{out}_{i}"), data.dtype) for i in range(len(sizes))]
        by_input = self.opset >= INPUT_AXES_OPSET
        inputs = [data, self._constant(node, np.array(sizes, np.int64))] if by_input else [data]
        attributes = {"axis": axis} if by_input else {"axis": axis, "split": sizes}
        self.nodes = [gs.Node("Split", node.name, attributes, inputs, parts)]
        if _has(node, 1) or node.attrs.get("keepdims", 1):
            return parts
        squeezed = [self._rearranged("Squeeze", node, part, axis) for part in parts]
        self.nodes += squeezed
        return [each.outputs[0] for each in squeezed]

    def _rearranged(self, kind: str, node: gs.Node, tensor: gs.Tensor, axis: int) -> gs.Node:
        name = self._fresh(f"{tensor.name}_{kind.lower()}d")
        by_input = self.opset >= INPUT_AXES_OPSET
        axes = [self._constant(node, np.array([axis], np.int64))] if by_input else []
        attributes = {} if by_input else {"axes": [axis]}
        return gs.Node(kind, name, attributes, [tensor, *axes], [gs.Variable(name, tensor.dtype)])

    def _constant(self, node: gs.Node, values: np.ndarray) -> gs.Constant:
        return gs.Constant(self._fresh(f"{node.name}_sizes"), Weight.of(values))

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def _inferred(proto: ModelProto) -> Shapes:
    """Return the shapes of the tensors of the main graph, with None for what varies."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        graph = proto.graph
    return {
        info.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.value_info, *graph.input, *graph.output)
        if info.type.tensor_type.HasField("shape")
    }


def _has(node: gs.Node, slot: int) -> bool:
    return len(node.inputs) > slot and not node.inputs[slot].is_empty()


def _sizes(node: gs.Node, shapes: Shapes) -> Sequence[int] | None:
    """Return how large the pieces of a SplitToSequence are; None where only a run can tell."""
    shape, axis = shapes.get(node.inputs[0].name), int(node.attrs.get("axis", 0))
    size = shape[axis] if shape is not None else None
    if not _has(node, 1):
        return None if size is None else [1] * size
    if not isinstance(node.inputs[1], gs.Constant):
        return None
    split = weight_of(node.inputs[1]).load()
    if split.ndim:
        return [int(each) for each in split]
    if size is None:
        return None
    each = int(split)
    return [each] * (size // each) + ([size % each] if size % each else [])
