"""Importer: an ONNX proto becomes a graphsurgeon graph, losing nothing that the file said.

graphsurgeon's own importer drops metadata and unused initializers, moves outer constants into subgraphs, and skips
attribute types it does not know. This one keeps them, and leaves one form of everything: no `Constant` nodes, no
`Identity` of an initializer, no two tensors and no two nodes of one name, in subgraphs neither.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto

from graphclone.dtypes import numpy_dtype
from graphclone.errors import InputError
from graphclone.weights import Weight

Scope = ChainMap[str, gs.Tensor]
Metadata = dict[str, dict[str, str]]

STANDARD = ("", "ai.onnx")


class Importer:
    """Import one model's graph, and collect what graphsurgeon has no place for.

    read: turns a TensorProto with data into a Weight.
    Afterwards: `order`, the initializers of the main graph; `unused`, those nothing reads; `aliases`, the names that
    stood for an initializer; `node_metadata`, `node_docs` and `value_metadata` by the names the graph uses.
    """

    def __init__(self, read: Callable[[TensorProto], Weight]):
        self.read = read
        self.order: tuple[str, ...] = ()
        self.unused: dict[str, Weight] = {}
        self.aliases: dict[str, str] = {}
        self.node_metadata: Metadata = {}
        self.node_docs: dict[str, str] = {}
        self.value_metadata: Metadata = {}
        self._tensor_names: set[str] = set()
        self._node_names: set[str] = set()
        self._main_names: set[str] = set()

    def main(self, proto: GraphProto) -> gs.Graph:
        """Import the main graph. Raises: InputError where the graph is not well formed."""
        self._main_names = {node.name for node in proto.node}
        scope: Scope = ChainMap({})
        graph = self._graph(proto, scope)
        self.order = tuple(initializer.name for initializer in proto.initializer)
        outputs = {id(tensor) for tensor in graph.outputs}
        for name in self.order:
            constant = scope[name]
            if not constant.outputs and id(constant) not in outputs:
                self.unused[name] = constant._values
        return graph

    def _graph(self, proto: GraphProto, scope: Scope) -> gs.Graph:
        """Import a graph into `scope`, whose first map becomes its own tensors by the names in the file."""
        if proto.sparse_initializer:
            name = proto.sparse_initializer[0].values.name
            raise InputError(f"initializer '{name}' is sparse, which graphclone cannot read; export it as a dense tensor")
        infos = {info.name: info for info in (*proto.value_info, *proto.output, *proto.input)}
        for initializer in proto.initializer:
            constant = gs.Constant(self._define(initializer.name, scope), self.read(initializer))
            self._note(constant.name, initializer.metadata_props, infos.get(initializer.name))
            scope[initializer.name] = constant
        inputs = [self._variable(info.name, scope, infos) for info in proto.input if info.name not in scope.maps[0]]
        outputs = {info.name for info in proto.output}
        nodes = [node for node in proto.node if not self._constant(node, scope, outputs, infos)]
        for node in nodes:
            for name in filter(None, node.output):
                self._variable(name, scope, infos)
        return gs.Graph(
            nodes=[self._node(node, scope) for node in nodes],
            inputs=inputs,
            outputs=[self._read_tensor(info.name, scope, f"graph output of '{proto.name}'") for info in proto.output],
            name=proto.name,
            doc_string=proto.doc_string,
        )

    def _constant(self, node: NodeProto, scope: Scope, outputs: set[str], infos: dict[str, ValueInfoProto]) -> bool:
        """Take in a Constant node, or an Identity of a constant, as a constant; tell whether it was one."""
        if node.domain not in STANDARD:
            return False
        if node.op_type == "Constant":
            name = node.output[0]
            constant = gs.Constant(self._define(name, scope), self._constant_weight(node))
            self._note(constant.name, (), infos.get(name))
            scope[name] = constant
            return True
        if node.op_type != "Identity" or node.output[0] in outputs:
            return False
        source = scope.get(node.input[0])
        if not isinstance(source, gs.Constant):
            return False
        self.aliases[self._define(node.output[0], scope)] = source.name
        scope[node.output[0]] = source
        return True

    def _constant_weight(self, node: NodeProto) -> Weight:
        if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
            raise InputError(f"Constant node '{node.name}' of '{node.output[0]}' has no value; export the model again")
        attribute = node.attribute[0]
        match attribute.name:
            case "value":
                return self.read(attribute.t)
            case "value_float":
                return Weight.of(np.array(attribute.f, np.float32))
            case "value_floats":
                return Weight.of(np.array(attribute.floats, np.float32))
            case "value_int":
                return Weight.of(np.array(attribute.i, np.int64))
            case "value_ints":
                return Weight.of(np.array(attribute.ints, np.int64))
            case "value_string":
                return Weight.of(np.array(attribute.s, object))
            case "value_strings":
                return Weight.of(np.array(list(attribute.strings), object))
        raise InputError(
            f"Constant node '{node.name}' of '{node.output[0]}' stores its value as '{attribute.name}', which graphclone "
            "cannot read; export it as a dense tensor"
        )

    def _variable(self, name: str, scope: Scope, infos: dict[str, ValueInfoProto]) -> gs.Variable:
        variable = gs.Variable(self._define(name, scope))
        info = infos.get(name)
        if info is not None:
            set_type(variable, info.type)
        self._note(variable.name, (), info)
        scope[name] = variable
        return variable

    def _define(self, name: str, scope: Scope) -> str:
        """Return a name that no other tensor of the whole model has, for a tensor the scope defines."""
        if name in scope.maps[0]:
            raise InputError(f"two nodes or initializers define '{name}'; a valid ONNX graph defines each tensor once")
        return unique(name, self._tensor_names)

    def _note(self, name: str, props: Iterable, info: ValueInfoProto | None) -> None:
        found = {prop.key: prop.value for prop in (*(info.metadata_props if info is not None else ()), *props)}
        if found:
            self.value_metadata[name] = found

    def _node(self, node: NodeProto, scope: Scope) -> gs.Node:
        where = f"{node.op_type} node '{node.name}'"
        name = self._name(node, inside=len(scope.maps) > 1)
        if node.metadata_props:
            self.node_metadata[name] = {prop.key: prop.value for prop in node.metadata_props}
        if node.doc_string:
            self.node_docs[name] = node.doc_string
        return gs.Node(
            op=node.op_type,
            name=name,
            attrs={attribute.name: self._attribute(attribute, scope, where) for attribute in node.attribute},
            inputs=[self._read_tensor(tensor, scope, where) for tensor in node.input],
            outputs=[scope[tensor] if tensor else gs.Variable.empty() for tensor in node.output],
            domain=None if node.domain in STANDARD else node.domain,
        )

    def _name(self, node: NodeProto, inside: bool) -> str:
        """Return the node's own name where no other has it; main graph nodes come first."""
        name = node.name
        if not name or name in self._node_names or (inside and name in self._main_names):
            name = unique(name or node.op_type, self._node_names | self._main_names)
        self._node_names.add(name)
        return name

    def _attribute(self, attribute: AttributeProto, scope: Scope, where: str) -> object:
        where = f"attribute '{attribute.name}' of {where}"
        if attribute.ref_attr_name:
            raise InputError(f"{where} refers to a function's attribute, outside any function; export the model again")
        match attribute.type:
            case AttributeProto.FLOAT:
                return attribute.f
            case AttributeProto.INT:
                return attribute.i
            case AttributeProto.STRING:
                return text(attribute.s)
            case AttributeProto.TENSOR:
                return gs.Constant(attribute.t.name, self.read(attribute.t))
            case AttributeProto.GRAPH:
                return self._graph(attribute.g, scope.new_child())
            case AttributeProto.FLOATS:
                return list(attribute.floats)
            case AttributeProto.INTS:
                return list(attribute.ints)
            case AttributeProto.STRINGS:
                return [text(item) for item in attribute.strings]
            case AttributeProto.TENSORS:
                return [gs.Constant(tensor.name, self.read(tensor)) for tensor in attribute.tensors]
            case AttributeProto.TYPE_PROTO:
                return attribute.tp
        kind = AttributeProto.AttributeType.Name(attribute.type)
        raise InputError(f"{where} is of kind {kind}, which graphclone cannot read; export the model without it")

    def _read_tensor(self, name: str, scope: Scope, reader: str) -> gs.Tensor:
        if not name:
            return gs.Variable.empty()
        try:
            return scope[name]
        except KeyError:
            raise InputError(f"{reader} reads '{name}', which nothing defines; export the model again") from None


def set_type(variable: gs.Variable, proto: TypeProto) -> None:
    """Give a variable the type a file states; `type_proto` keeps what graphsurgeon cannot say (sequences, optionals)."""
    kind = proto.WhichOneof("value")
    if kind is None:
        return
    if kind != "tensor_type":
        variable.type = kind
        variable.type_proto = proto
        return
    tensor = proto.tensor_type
    variable.dtype = numpy_dtype(tensor.elem_type) if tensor.elem_type else None
    if tensor.HasField("shape"):
        variable.shape = [_size(dim) for dim in tensor.shape.dim]


def text(data: bytes) -> str | bytes:
    """Decode an attribute's string; bytes that are no text stay bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def unique(name: str, taken: set[str]) -> str:
    """Return `name`, or `name_1`, `name_2`, ... where it is taken, and take it.

    Example:
        >>> unique("Add", {"Add", "Add_1"})
        'Add_2'
    """
    candidate, index = name, 0
    while candidate in taken:
        index += 1
        candidate = f"{name}_{index}"
    taken.add(candidate)
    return candidate


def _size(dim: TensorShapeProto.Dimension) -> int | str | None:
    kind = dim.WhichOneof("value")
    return getattr(dim, kind) if kind else None
