"""Importer: an ONNX proto becomes a graphsurgeon graph, losing nothing that the file said.

graphsurgeon's own importer drops metadata and unused initializers, moves outer constants into subgraphs, and skips
attribute types it does not know. This one keeps them, and leaves one form of everything: no `Constant` nodes, no
`Identity` of an initializer, no two tensors and no two nodes of one name, in subgraphs neither.
"""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    ValueInfoProto,
)

from graphclone.dtypes import numpy_dtype
from graphclone.errors import InputError
from graphclone.weights import Weight

Scope = ChainMap[str, gs.Tensor]
Metadata = dict[str, dict[str, str]]

STANDARD = ("", "ai.onnx")
FOLDED = ("Constant", "Identity")


class Names:
    """Hand out names that are all different.

    Example:
        >>> names = Names()
        >>> [names.take("Add") for _ in range(3)]
        ['Add', 'Add_1', 'Add_2']
    """

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.reserved: set[str] = set()
        self._counts: Counter[str] = Counter()

    def take(self, name: str, inside: bool = False) -> str:
        """Return `name`, or with a number after it where it is taken, or `inside` a subgraph also where reserved."""
        if not isinstance(name, str):
            raise InputError(f"the name {name!r} is not UTF-8 text; the file is damaged: download or export it again")
        candidate = name
        while candidate in self.taken or ((inside or candidate != name) and candidate in self.reserved):
            self._counts[name] += 1
            candidate = f"{name}_{self._counts[name]}"
        self.taken.add(candidate)
        return candidate


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
        self._tensor_names = Names()
        self._node_names = Names()

    def main(self, proto: GraphProto) -> gs.Graph:
        """Import the main graph. Raises: InputError where the graph is not well formed."""
        self._node_names.reserved.update(node.name for node in proto.node)
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
            raise InputError(
                f"initializer '{name}' is sparse, which graphclone cannot read; export it as a dense tensor"
            )
        infos: dict[str, ValueInfoProto] = {}
        for info in (*proto.value_info, *proto.output, *proto.input):
            if info.name not in infos or info.type.WhichOneof("value"):
                infos[info.name] = info
        for initializer in proto.initializer:
            constant = gs.Constant(self._define(initializer.name, scope), self.read(initializer))
            self._note(constant.name, initializer.metadata_props, infos.get(initializer.name))
            scope[initializer.name] = constant
        inputs = [self._variable(info.name, scope, infos) for info in proto.input if info.name not in scope.maps[0]]
        fixed = {name for node in proto.node if node.op_type not in FOLDED for name in node.output}
        fixed.update(info.name for info in proto.output)
        nodes = _ordered([node for node in proto.node if not self._constant(node, scope, fixed, infos)])
        for node in nodes:
            for name in filter(None, node.output):
                self._variable(name, scope, infos)
        return gs.Graph(
            nodes=[self._node(node, scope) for node in nodes],
            inputs=inputs,
            outputs=[self._read_tensor(info.name, scope, f"graph output of '{proto.name}'") for info in proto.output],
            name=legible(proto.name),
            doc_string=legible(proto.doc_string),
        )

    def _constant(self, node: NodeProto, scope: Scope, fixed: set[str], infos: dict[str, ValueInfoProto]) -> bool:
        """Take in a Constant node, or an Identity of a constant, as a constant; tell whether it was one."""
        if node.domain not in STANDARD:
            return False
        if node.op_type == "Constant":
            if len(node.output) != 1:
                raise InputError(f"Constant node '{node.name}' has {len(node.output)} outputs; export the model again")
            name = node.output[0]
            constant = gs.Constant(self._define(name, scope), self._constant_weight(node))
            self._note(constant.name, (), infos.get(name))
            scope[name] = constant
            return True
        if node.op_type != "Identity" or (len(node.input), len(node.output)) != (1, 1) or node.output[0] in fixed:
            return False
        source = scope.get(node.input[0])
        if not isinstance(source, gs.Constant) or (node.input[0] in fixed and node.input[0] not in scope.maps[0]):
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
            f"Constant node '{node.name}' of '{node.output[0]}' stores its value as '{attribute.name}', which "
            "graphclone cannot read; export it as a dense tensor"
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
        return self._tensor_names.take(name)

    def _note(self, name: str, props: Iterable, info: ValueInfoProto | None) -> None:
        found = entries((*(info.metadata_props if info is not None else ()), *props))
        if found:
            self.value_metadata[name] = found

    def _node(self, node: NodeProto, scope: Scope) -> gs.Node:
        where = f"{node.op_type} node '{node.name}'"
        name = self._node_names.take(node.name or node.op_type, inside=not node.name or len(scope.maps) > 1)
        if node.metadata_props:
            self.node_metadata[name] = entries(node.metadata_props)
        if node.doc_string:
            self.node_docs[name] = legible(node.doc_string)
        return gs.Node(
            op=legible(node.op_type),
            name=name,
            attrs={legible(attribute.name): self._attribute(attribute, scope, where) for attribute in node.attribute},
            inputs=[self._read_tensor(tensor, scope, where) for tensor in node.input],
            outputs=[scope[tensor] if tensor else gs.Variable.empty() for tensor in node.output],
            domain=None if node.domain in STANDARD else legible(node.domain),
        )

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
                return copied(attribute.tp)
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
    """Give a variable the type a file states; `type_proto` keeps what graphsurgeon cannot say (sequences)."""
    kind = proto.WhichOneof("value")
    if kind is None:
        return
    if kind != "tensor_type":
        variable.type = kind
        variable.type_proto = copied(proto)
        return
    tensor = proto.tensor_type
    variable.dtype = numpy_dtype(tensor.elem_type) if tensor.elem_type else None
    if tensor.HasField("shape"):
        variable.shape = [_size(dim) for dim in tensor.shape.dim]


def copied(proto: TypeProto) -> TypeProto:
    """Copy a proto, so that it does not keep the whole model in memory that it is part of."""
    copy = TypeProto()
    copy.CopyFrom(proto)
    return copy


def entries(props: Iterable[StringStringEntryProto]) -> dict[str, str]:
    """Return `metadata_props` as a dictionary."""
    return {legible(prop.key): legible(prop.value) for prop in props}


def legible(value: str | bytes) -> str:
    """Return text; protobuf gives text that is not UTF-8 as bytes, and refuses to write those."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def text(data: bytes) -> str | bytes:
    """Decode an attribute's string; bytes that are no text stay bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _size(dim: TensorShapeProto.Dimension) -> int | str | None:
    kind = dim.WhichOneof("value")
    size = getattr(dim, kind) if kind else None
    return size if isinstance(size, int) else size and legible(size)


def _ordered(nodes: list[NodeProto]) -> list[NodeProto]:
    """Return nodes behind what they read: some converters append theirs at the end. Raises: InputError for a cycle."""
    made = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    needs = [sorted({made[name] for name in _names_read(node) if name in made}) for node in nodes]
    if all(not earlier or earlier[-1] < number for number, earlier in enumerate(needs)):
        return nodes
    order: dict[int, None] = {}
    for start in range(len(nodes)):
        waiting, open_ = [start], set()
        while waiting:
            number = waiting[-1]
            missing = [other for other in needs[number] if other not in order]
            if number in order or not missing:
                order[number] = None
                waiting.pop()
            elif number in open_:
                node = nodes[number]
                raise InputError(f"{node.op_type} node '{node.name}' reads what is made of its own output")
            else:
                open_.add(number)
                waiting.extend(reversed(missing))
    return [nodes[number] for number in order]


def _names_read(node: NodeProto) -> Iterator[str]:
    """Yield the names a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            own = {name for inner in graph.node for name in inner.output}
            own.update(item.name for item in (*graph.input, *graph.initializer))
            read = [*(name for inner in graph.node for name in _names_read(inner)), *(o.name for o in graph.output)]
            yield from (name for name in read if name not in own)
