"""Graphs: graphsurgeon graphs walked and copied with their subgraphs."""

import contextlib
import gc
from collections.abc import Iterator

import onnx_graphsurgeon as gs


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield the graph and every subgraph in it, outer ones first."""
    yield graph
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from walk(attribute)


def constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the constants that this graph's own nodes read or that are its outputs, each once, in order of use."""
    seen: set[int] = set()
    for tensors in (*(node.inputs for node in graph.nodes), graph.outputs):
        for tensor in tensors:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


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
