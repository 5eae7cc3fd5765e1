"""Graphs: graphsurgeon graphs walked and copied with their subgraphs."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield the graph and every subgraph in it, outer ones first."""
    yield graph
    for node in graph.nodes:
        for inner in subgraphs(node):
            yield from walk(inner)


def subgraphs(node: gs.Node) -> list[gs.Graph]:
    """Return the graphs that a node's attributes hold: branches, bodies of loops."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the constants that this graph's own nodes read or that are its outputs, each once, in order of use."""
    seen: set[int] = set()
    for tensors in (*(node.inputs for node in graph.nodes), graph.outputs):
        for tensor in tensors:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def holds_floats(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is known to hold real numbers; a type that numpy lacks is one of few bits."""
    if tensor.dtype is None:
        return False
    try:
        dtype = np.dtype(tensor.dtype)
        return dtype.kind == "f" or "float" in dtype.name
    except TypeError:
        return True


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """Copy nodes, tensors, shapes and subgraphs; weights are shared.

    `gs.Graph.copy` shares shape and attribute lists with its original, gives a subgraph its own copy of an outer
    constant, and forgets sequence types and the producer.
    """
    with collection_paused():
        return _copy(graph, {})


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Build many objects without the cyclic garbage collector, which else visits all of them again and again.

    A graph of 10,000 nodes is built in half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _copy(graph: gs.Graph, copies: dict[int, gs.Tensor]) -> gs.Graph:
    def tensor(original: gs.Tensor) -> gs.Tensor:
        copied = copies.get(id(original))
        if copied is None:
            copied = copies[id(original)] = _copy_tensor(original)
        return copied

    inputs = [tensor(item) for item in graph.inputs]
    outputs = [tensor(item) for item in graph.outputs]
    nodes = [
        gs.Node(
            op=node.op,
            name=node.name,
            attrs={name: _copy_attribute(value, copies) for name, value in node.attrs.items()},
            inputs=[tensor(item) for item in node.inputs],
            outputs=[tensor(item) for item in node.outputs],
            domain=node.domain,
        )
        for node in graph.nodes
    ]
    for original, node in zip(graph.nodes, nodes, strict=True):
        if (mark := getattr(original, "unrolled", None)) is not None:
            node.unrolled = mark
    copied = gs.Graph(
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=list(graph.import_domains or ()),
        producer_name=graph.producer_name,
        producer_version=graph.producer_version,
        ir_version=graph.ir_version,
    )
    copied.name_idx = graph.name_idx
    return copied


def _copy_tensor(tensor: gs.Tensor) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        return gs.Constant(tensor.name, tensor._values)
    shape = list(tensor.shape) if tensor.shape is not None else None
    copied = gs.Variable(tensor.name, tensor.dtype, shape, tensor.type)
    if hasattr(tensor, "type_proto"):
        copied.type_proto = tensor.type_proto
    return copied


def _copy_attribute(value: object, copies: dict[int, gs.Tensor]) -> object:
    if isinstance(value, gs.Graph):
        return _copy(value, copies)
    if isinstance(value, gs.Constant):
        return _copy_tensor(value)
    return list(value) if isinstance(value, list) else value


def copy_part(
    graph: gs.Graph, ends: Sequence[str], stops: Mapping[str, object], prefix: str
) -> tuple[list[gs.Node], dict[str, gs.Tensor]]:
    """Copy the nodes that compute the tensors `ends`, down to the tensors `stops` and the graph's inputs.

    prefix: goes before each tensor's name in the copy. Returns the nodes in order, and {name: copied tensor} of the
    main graph. Weights are shared. Raises: KeyError for an end that the main graph does not compute.
    """
    known = {tensor.name: tensor for tensor in graph.inputs}
    known.update((tensor.name, tensor) for node in graph.nodes for tensor in (*node.inputs, *node.outputs))
    needed: set[int] = set()
    waiting, seen = [known[name] for name in ends], set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in stops or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in tensor.inputs:
            if id(node) not in needed:
                needed.add(id(node))
                waiting.extend(node.inputs)
                for inner in subgraphs(node):
                    for scope in walk(inner):
                        read = [t for reader in scope.nodes for t in reader.inputs]
                        waiting.extend(t for t in (*read, *scope.outputs) if known.get(t.name) is t)
    copies: dict[int, gs.Tensor] = {}
    copied = _copy(gs.Graph(nodes=[node for node in graph.nodes if id(node) in needed]), copies)
    by_name = {name: copies[id(tensor)] for name, tensor in known.items() if name and id(tensor) in copies}
    by_name.update((name, _copy_tensor(known[name])) for name in ends if name not in by_name)
    for name in [name for name in by_name if name in stops and by_name[name].inputs]:
        by_name[name] = _severed(by_name[name], prefix)
    inner = [tensor for scope in walk(copied) for tensor in constants(scope)]
    for tensor in {id(tensor): tensor for tensor in (*by_name.values(), *inner)}.values():
        tensor.name = f"{prefix}{tensor.name}"
    for node in copied.nodes:
        node.name = f"{prefix}{node.name}"
    return copied.nodes, by_name


def _severed(tensor: gs.Tensor, prefix: str) -> gs.Tensor:
    """Let the readers of a tensor, which its node computes beside others, read a fresh one of the same name instead."""
    fresh = _copy_tensor(tensor)
    tensor.name = f"{prefix}{tensor.name}_computed"
    for reader in list(tensor.outputs):
        for slot, read in enumerate(reader.inputs):
            if read is tensor:
                reader.inputs[slot] = fresh
    return fresh
