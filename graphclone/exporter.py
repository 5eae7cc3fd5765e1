"""Exporter: a graphsurgeon graph becomes an ONNX proto again, with what graphsurgeon has no place for."""

from collections.abc import Mapping, MutableSequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from graphclone.dtypes import onnx_dtype_of
from graphclone.errors import GraphcloneError
from graphclone.graphs import constants
from graphclone.weights import Weight, weight_of

Stored = list[tuple[TensorProto, Weight]]


class Exporter:
    """Export one model's graph; `main` returns a GraphProto without initializers, `stored` then lists them.

    stored: a TensorProto without data and its Weight, for each constant of the main graph, in the order of the file.
    inner: the same for the constants of subgraphs, whose TensorProtos are already in the proto.
    """

    def __init__(
        self,
        order: tuple[str, ...],
        node_metadata: Mapping[str, Mapping[str, str]],
        node_docs: Mapping[str, str],
        value_metadata: Mapping[str, Mapping[str, str]],
    ):
        self.rank = {name: index for index, name in enumerate(order)}
        self.node_metadata = node_metadata
        self.node_docs = node_docs
        self.value_metadata = value_metadata
        self.stored: Stored = []
        self.inner: Stored = []
        self.owners: dict[str, tuple[gs.Graph, ...]] = {}
        self.weights: dict[str, Weight] = {}
        self._values: dict[str, object] = {}

    def main(self, graph: gs.Graph, unused: Mapping[str, Weight], proto: GraphProto) -> None:
        """Export the main graph into `proto`. Raises: GraphcloneError where two constants share a name."""
        self._find_owners(graph, (graph,))
        self.weights |= {name: weight for name, weight in unused.items() if name not in self.weights}
        for name in unused:
            self.owners.setdefault(name, (graph,))
        self._graph(graph, proto)
        names = [name for name, path in self.owners.items() if path[-1] is graph]
        names.sort(key=lambda name: self.rank.get(name, len(self.rank)))
        self.stored = [(self._header(name), self.weights[name]) for name in names]

    def _find_owners(self, graph: gs.Graph, path: tuple[gs.Graph, ...]) -> None:
        """Give each constant to the innermost graph around all its readers, those of the file's main graph to that."""
        for constant in constants(graph):
            name = constant.name
            if self._values.setdefault(name, constant._values) is not constant._values:
                raise GraphcloneError(f"two constants are called '{name}'; give each its own name")
            self.weights.setdefault(name, weight_of(constant))
            known = self.owners.get(name, path)
            shared = tuple(a for a, b in zip(known, path, strict=False) if a is b)
            self.owners[name] = path[:1] if name in self.rank else shared
        for node in graph.nodes:
            for value in node.attrs.values():
                if isinstance(value, gs.Graph):
                    self._find_owners(value, (*path, value))

    def _graph(self, graph: gs.Graph, proto: GraphProto) -> None:
        proto.name, proto.doc_string = graph.name, graph.doc_string
        for node in graph.nodes:
            self._node(node, graph, proto.node.add())
        proto.input.extend(self._info(tensor) for tensor in graph.inputs)
        proto.output.extend(self._info(tensor) for tensor in graph.outputs)
        known = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.name and tensor.name not in known and self._has_info(tensor):
                    proto.value_info.append(self._info(tensor))

    def _inner_graph(self, graph: gs.Graph, proto: GraphProto) -> None:
        self._graph(graph, proto)
        for name, path in self.owners.items():
            if path[-1] is graph:
                header = proto.initializer.add()
                header.CopyFrom(self._header(name))
                self.inner.append((header, self.weights[name]))

    def _header(self, name: str) -> TensorProto:
        header = self.weights[name].header(name)
        add_metadata(header.metadata_props, self.value_metadata.get(name))
        return header

    def _node(self, node: gs.Node, graph: gs.Graph, proto: NodeProto) -> None:
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        proto.name, proto.op_type = node.name, node.op
        if node.domain:
            proto.domain = node.domain
        for name, value in node.attrs.items():
            self._attribute(value, node, graph, proto.attribute.add(name=name))
        add_metadata(proto.metadata_props, self.node_metadata.get(node.name))
        if node.name in self.node_docs:
            proto.doc_string = self.node_docs[node.name]

    def _attribute(self, value: object, node: gs.Node, graph: gs.Graph, proto: AttributeProto) -> None:
        """Write an attribute in place: `inner` points into the proto, and a copy would leave it behind."""
        value = value.tolist() if isinstance(value, np.ndarray) else value
        is_list = isinstance(value, (list, tuple))
        if isinstance(value, gs.Graph):
            proto.type = AttributeProto.GRAPH
            self._inner_graph(value, proto.g)
        elif isinstance(value, gs.Constant):
            proto.type = AttributeProto.TENSOR
            proto.t.CopyFrom(_attribute_tensor(value))
        elif is_list and not value:
            proto.type = _list_kind(proto.name, node, graph)
        elif is_list and isinstance(value[0], gs.Constant):
            proto.type = AttributeProto.TENSORS
            proto.tensors.extend(_attribute_tensor(item) for item in value)
        elif isinstance(value, (type, np.dtype)):
            proto.type = AttributeProto.INT
            proto.i = onnx_dtype_of(np.dtype(value))
        else:
            proto.CopyFrom(helper.make_attribute(proto.name, value))

    def _has_info(self, tensor: gs.Tensor) -> bool:
        return tensor.dtype is not None or tensor.name in self.value_metadata or hasattr(tensor, "type_proto")

    def _info(self, tensor: gs.Tensor) -> ValueInfoProto:
        info = ValueInfoProto(name=tensor.name)
        if hasattr(tensor, "type_proto"):
            info.type.CopyFrom(tensor.type_proto)
        elif isinstance(tensor, gs.Constant):
            info.type.CopyFrom(helper.make_tensor_type_proto(weight_of(tensor).onnx_dtype, tensor.shape))
            return info
        elif tensor.dtype is not None:
            info.type.CopyFrom(_tensor_type(tensor.dtype, tensor.shape))
        add_metadata(info.metadata_props, self.value_metadata.get(tensor.name))
        return info


def add_metadata(props: MutableSequence[StringStringEntryProto], metadata: Mapping[str, str] | None) -> None:
    """Append a dictionary to the `metadata_props` of a proto."""
    entries = (StringStringEntryProto(key=key, value=value) for key, value in (metadata or {}).items())
    props.extend(entries)


def fill(stored: Stored) -> None:
    """Put the data of each weight into its TensorProto."""
    for proto, weight in stored:
        tensor = weight.tensor
        if tensor.string_data:
            proto.string_data.extend(tensor.string_data)
        else:
            proto.raw_data = tensor.raw_data


def _attribute_tensor(constant: gs.Constant) -> TensorProto:
    tensor = weight_of(constant).tensor
    tensor.name = constant.name
    return tensor


def _tensor_type(dtype: np.dtype | int, shape: list[int | str | None] | None) -> TypeProto:
    kind = dtype if isinstance(dtype, int) else onnx_dtype_of(np.dtype(dtype))
    proto = TypeProto()
    proto.tensor_type.elem_type = kind
    if shape is not None:
        proto.tensor_type.shape.SetInParent()
        for size in shape:
            dim = proto.tensor_type.shape.dim.add()
            if isinstance(size, str):
                dim.dim_param = size
            elif size is not None:
                dim.dim_value = int(size)
    return proto


def _list_kind(name: str, node: gs.Node, graph: gs.Graph) -> int:
    """Return the attribute kind of an empty list, which the operator's schema knows."""
    versions = {item.domain or "": item.version for item in graph.import_domains or ()}
    domain = node.domain or ""
    try:
        schema = onnx.defs.get_schema(node.op, versions.get(domain, graph.opset), domain)
        return int(schema.attributes[name].type.value)
    except (onnx.defs.SchemaError, KeyError):
        return AttributeProto.INTS
