"""Keep what `Shape` and `Size` report of cut tensors at the old sizes, so that shape arithmetic keeps its values."""

import math

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Size, find
from graphclone.axes.typed import Site
from graphclone.bypass import exchange_input
from graphclone.graphs import walk
from graphclone.surgery.child import Child, Editor
from graphclone.surgery.vectors import rescaled
from graphclone.weights import weight_of


def _shape(child: Child, site: Site, node: gs.Node) -> None:
    """Let every consumer of Shape see the old sizes; those that read unchanged entries stay as they are."""
    old = [find(axis).size for axis in site.axes]
    new = [child.cut.size(axis) for axis in site.axes]
    changed = {i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    output = node.outputs[0]
    if not changed:
        return
    for consumer in list(output.outputs):
        read = _entries_read(consumer, output, len(old))
        if not changed & set(read):
            continue
        if consumer.op == "Gather" and all(len(set(old[i])) == 1 for i in read):
            indices = weight_of(consumer.inputs[1]).load()
            value = np.array([old[i][0] for i in read], np.int64).reshape(indices.shape)
            _replace_everywhere(consumer.outputs[0], child.constant(consumer, "frozen", value), child.graph)
            continue
        exchange_input(consumer, output, _frozen(child, consumer, output, old, new))


def _entries_read(consumer: gs.Node, vector: gs.Tensor, count: int) -> list[int]:
    """Return which entries of a shape vector a consumer reads: those a constant Gather picks, else all."""
    if consumer.op == "Gather" and consumer.inputs[0] is vector and isinstance(consumer.inputs[1], gs.Constant):
        return [int(i) % count for i in np.ravel(weight_of(consumer.inputs[1]).load())]
    if consumer.op == "Slice" and consumer.inputs[0] is vector:
        bounds = consumer.inputs[1:3]
        if all(isinstance(b, gs.Constant) for b in bounds) and len(consumer.inputs) < 5:
            start, end = (int(np.ravel(weight_of(b).load())[0]) for b in bounds)
            return list(range(count))[start:end]
    return list(range(count))


def _frozen(child: Child, consumer: gs.Node, output: gs.Tensor, old: list[Size], new: list[Size]) -> gs.Tensor:
    if all(len(set(entry)) == 1 for entry in old):
        return child.constant(consumer, "frozen", np.array([entry[0] for entry in old], np.int64))
    return rescaled(child, consumer, output, old, new, (len(old),))


def _replace_everywhere(old: gs.Tensor, new: gs.Tensor, graph: gs.Graph) -> None:
    for consumer in list(old.outputs):
        exchange_input(consumer, old, new)
    for scope in walk(graph):
        scope.outputs[:] = [new if tensor is old else tensor for tensor in scope.outputs]


def _size(child: Child, site: Site, node: gs.Node) -> None:
    old = _count([find(axis).size for axis in site.axes])
    new = _count([child.cut.size(axis) for axis in site.axes])
    if old == new:
        return
    for consumer in list(node.outputs[0].outputs):
        frozen = rescaled(child, consumer, node.outputs[0], [old], [new], ())
        exchange_input(consumer, node.outputs[0], frozen)


def _count(sizes: list[Size]) -> Size:
    """Return how many entries a tensor has, per probe."""
    return tuple(math.prod(column) for column in zip(*(sizes or [(1, 1)]), strict=True))


REPORTS: dict[str, Editor] = {"shape": _shape, "size": _size}
