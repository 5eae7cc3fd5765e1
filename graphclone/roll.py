"""Write layers back as the loop they were unrolled from, where they are still alike: weights stacked, fewer trips.

A child whose layers have shapes of their own stays unrolled. One that kept its layers alike - whole layers dropped,
every layer cut to the same sizes, or nothing at all - is a loop again. Each iteration's nodes are compared with the
loop's body, slot by slot; what differs between iterations may only be the rows of stacked weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.computed import computed
from graphclone.graphs import copy_graph, walk
from graphclone.sources import RowSource
from graphclone.unroll import Loop, Mark, mark_of, passes_on
from graphclone.weights import Weight, weight_of

SMALL = 4096  # up to this size, constants that every iteration has of its own are compared by value
COUNTER, CONDITION, DEAD = "counter", "condition", "dead"


def roll_loops(graph: gs.Graph, loops: Iterable[Loop]) -> gs.Graph:
    """Return a copy of the graph in which each loop is written back whose iterations are alike; else the graph itself.

    Example:
        roll_loops(model.graph, model.loops)
    """
    found = [loop for loop in loops if _compared(graph, loop) is not None]
    if not found:
        return graph
    copied = copy_graph(graph)
    for loop in found:
        iterations = _compared(copied, loop)
        if iterations is not None:
            _Writer(copied, loop, iterations).write()
    return copied


@dataclass(frozen=True, slots=True)
class _Stack:
    """A constant that the body reads whole, or picks a row of in each iteration."""

    constant: gs.Constant


@dataclass(frozen=True, slots=True)
class _Row:
    constant: gs.Constant


@dataclass(frozen=True, slots=True)
class _Start:
    """What a state of the loop begins with."""

    number: int


class _Unlike(Exception):
    """The iterations are not alike."""


def _compared(graph: gs.Graph, loop: Loop) -> "_Iterations | None":
    try:
        return _Iterations(graph, loop)
    except _Unlike:
        return None


class _Iterations:
    """What the iterations of an unrolled loop have in common. Raises: _Unlike where they are not one loop's.

    nodes: of all iterations, and what hands on their results. instances: of each of the body's nodes one, for its
    attributes and shapes. inputs: what a (node, slot) of the body reads from outside; kinds: whether it reads inside.
    rows: each iteration's row of a stack, by the stack's id; picked: the names of these stacks. wholes: stacks that are
    read whole. starts, finals: what states begin and end with. parts: what is stacked, by output.
    """

    def __init__(self, graph: gs.Graph, loop: Loop):
        self.graph, self.loop = graph, loop
        self.nodes = [node for node in graph.nodes if (mark := mark_of(node)) is not None and mark.loop is loop]
        self.instances: dict[int, gs.Node] = {}
        self.inputs: dict[tuple[int, int], gs.Tensor] = {}
        self.kinds: dict[tuple[int, int], bool] = {}
        self.rows: dict[int, list[gs.Constant]] = {}
        self.picked: set[str] = set()
        self.wholes: dict[int, gs.Constant] = {}
        self.starts: dict[int, gs.Tensor] = {}
        self.parts: dict[int, list[object]] = {}
        by_iteration: dict[int, dict[int, gs.Node]] = {}
        for node in self.nodes:
            mark = mark_of(node)
            if mark.role == "body":
                by_iteration.setdefault(mark.iteration, {})[mark.number] = node
        self.count = len(by_iteration)
        self.finals: list[object] = [
            _Stack(tensor) if isinstance(tensor, gs.Constant) else _Start(number)
            for number, tensor in enumerate(loop.states)
        ]
        for position, iteration in enumerate(sorted(by_iteration)):
            self._iteration(position, by_iteration[iteration])
        self._check()

    def _iteration(self, position: int, instances: Mapping[int, gs.Node]) -> None:
        loop = self.loop
        known: dict[int, object] = {id(tensor): value for tensor, value in zip(loop.entries, self.finals, strict=False)}
        picked = loop.entries[len(self.finals) :]
        known |= {id(tensor): _Row(stack) for tensor, stack in zip(picked, loop.scanned, strict=True)}
        if loop.counter is not None:
            known |= {id(loop.counter): COUNTER, id(loop.condition): CONDITION}
        for number, node in enumerate(loop.body.nodes):
            read = [known.get(id(tensor), tensor) for tensor in node.inputs]
            instance = instances.get(number)
            if instance is None:
                given = [_absent(node, read)] * len(node.outputs)
            else:
                self._instance(number, node, instance, read, position)
                given = instance.outputs
            known |= {id(old): new for old, new in zip(node.outputs, given, strict=True) if not old.is_empty()}
        results = [known.get(id(tensor), tensor) for tensor in loop.results]
        self.finals = results[: len(self.finals)]
        for number, part in enumerate(results[len(self.finals) :]):
            self.parts.setdefault(number, []).append(part)

    def _instance(self, number: int, node: gs.Node, instance: gs.Node, read: Sequence[object], position: int) -> None:
        first = self.instances.setdefault(number, instance)
        if _form(instance) != _form(node) or not _equal_attributes(first.attrs, instance.attrs):
            raise _Unlike
        for slot, (value, actual) in enumerate(zip(read, instance.inputs, strict=True)):
            if not self._agrees((number, slot), value, actual, position):
                raise _Unlike

    def _agrees(self, place: tuple[int, int], value: object, actual: gs.Tensor, position: int) -> bool:
        """Tell whether a slot reads in this iteration what it reads in the others; note what that is."""
        constant = isinstance(actual, gs.Constant)
        if isinstance(value, _Row):
            rows = self.rows.setdefault(id(value.constant), [])
            self.picked.add(value.constant.name)
            if constant and len(rows) == position:
                rows.append(actual)
            return constant and len(rows) == position + 1 and rows[-1] is actual and rows[0].shape == actual.shape
        if isinstance(value, _Stack):
            return constant and _same(self.wholes.setdefault(id(value.constant), actual), actual)
        if isinstance(value, _Start):
            return self.starts.setdefault(value.number, actual) is actual
        if isinstance(value, str) and value is not DEAD:
            return constant and (value is CONDITION or weight_of(actual).load() == position)
        inside = isinstance(value, gs.Variable) and self._is_inside(value) and value is actual
        if self.kinds.setdefault(place, inside) != inside or self._is_inside(actual) > inside:
            return False
        known = actual if inside else self.inputs.setdefault(place, actual)
        return known is actual or (isinstance(known, gs.Constant) and constant and _same(known, actual))

    def _is_inside(self, tensor: gs.Tensor) -> bool:
        mark = mark_of(tensor.inputs[0]) if tensor.inputs else None
        return mark is not None and mark.loop is self.loop

    def _check(self) -> None:
        """Check that the loop's outputs are all that the rest of the graph reads of it."""
        ends = {id(tensor) for tensor in self.finals if isinstance(tensor, gs.Variable)}
        given = {id(tensor) for scope in walk(self.graph) for tensor in scope.outputs}
        ours = {id(node) for node in self.nodes}
        for node in self.nodes:
            mark: Mark = mark_of(node)
            if mark.role in ("last", "stack"):
                wanted = self.finals[mark.number : mark.number + 1] if mark.role == "last" else self.parts[mark.number]
                read = node.inputs if mark.role == "last" else [lift.inputs[0].inputs[0] for lift in node.inputs]
                if [id(tensor) for tensor in wanted] != [id(tensor) for tensor in read]:
                    raise _Unlike
                continue
            for tensor in node.outputs:
                inside = all(id(reader) in ours for reader in tensor.outputs)
                if id(tensor) in given or (not inside and id(tensor) not in ends):
                    raise _Unlike
        kept = self.count == self.loop.count
        stale = [stack for stack in self.loop.scanned if id(stack) not in self.rows]
        unknown = [tensor for tensor in self.finals if isinstance(tensor, (str, gs.Constant))]
        whole = {tensor.name for tensor in (*self.wholes.values(), *self.inputs.values())}
        if not self.count or unknown or self.picked & whole or (stale and not kept):
            raise _Unlike
        lost = {id(t) for i, node in enumerate(self.loop.body.nodes) if self.is_lost(i, node) for t in node.outputs}
        if any(id(tensor) in lost for tensor in self.loop.body.outputs):
            raise _Unlike

    def is_lost(self, number: int, node: gs.Node) -> bool:
        """Tell whether a node of the body is in no iteration any more."""
        return number not in self.instances and not passes_on(node) and not _picks(node, self.loop)


def _form(node: gs.Node) -> tuple:
    return node.op, node.domain or "", len(node.inputs), len(node.outputs)


def _absent(node: gs.Node, read: Sequence[object]) -> object:
    """Return what a node of the body stands for that has no instance: its input, a row, or nothing that is read."""
    if passes_on(node):
        return read[0]
    stack = read[0].constant if read and isinstance(read[0], _Stack) else read[0] if read else None
    picks = node.op == "Gather" and isinstance(stack, gs.Constant) and read[1] is COUNTER
    return _Row(stack) if picks else DEAD


def _picks(node: gs.Node, loop: Loop) -> bool:
    return node.op == "Gather" and node.inputs[1] is loop.counter


def _same(first: gs.Constant, second: gs.Constant) -> bool:
    """Tell whether two constants are one, or small and equal."""
    if first is second or first._values is second._values:
        return True
    a, b = weight_of(first), weight_of(second)
    return a.shape == b.shape and a.dtype == b.dtype and a.size <= SMALL and np.array_equal(a.load(), b.load())


def _equal_attributes(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, gs.Constant) and isinstance(b, gs.Constant):
            return _same(a, b)
        return a is b or (type(a) is type(b) and not isinstance(a, (gs.Constant, gs.Graph)) and a == b)

    return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())


class _Writer:
    """Writes one loop back into a graph, in place of its iterations."""

    def __init__(self, graph: gs.Graph, loop: Loop, iterations: _Iterations):
        self.graph, self.loop, self.iterations = graph, loop, iterations
        self.ours = {id(node) for node in iterations.nodes}
        rest = [node for scope in walk(graph) for node in scope.nodes if id(node) not in self.ours]
        self.tensors = {tensor.name: tensor for node in rest for tensor in (*node.inputs, *node.outputs)}
        self.tensors |= {tensor.name: tensor for tensor in graph.inputs}
        self.stacks: dict[int, gs.Constant] = {}

    def write(self) -> None:
        loop, nodes = self.loop, self.graph.nodes
        lead = [] if loop.counter is None else [self._count(), self._own(loop.inputs[1])]
        states = [self._state(number, tensor) for number, tensor in enumerate(loop.states)]
        inputs = [*lead, *states, *(self._stack(stack) for stack in loop.scanned)]
        outputs = [self._output(number, tensor) for number, tensor in enumerate(loop.outputs)]
        attributes = {**loop.node.attrs, "body": self._body()}
        self._hand_over(outputs)
        rolled = gs.Node(loop.node.op, loop.node.name, attributes, inputs, outputs, domain=loop.node.domain)
        last = max(i for i, node in enumerate(nodes) if id(node) in self.ours)
        kept = [node for node in nodes[: last + 1] if id(node) not in self.ours]
        nodes[:] = [*kept, rolled, *nodes[last + 1 :]]
        for node in self.iterations.nodes:
            node.inputs.clear()
            node.outputs.clear()

    def _hand_over(self, outputs: Sequence[gs.Tensor]) -> None:
        """Let what read the last states and the stacked results read the loop's outputs."""
        pairs = list(zip(self.iterations.finals, outputs, strict=False))
        for node in self.iterations.nodes:
            mark = mark_of(node)
            if mark.role in ("last", "stack"):
                before = len(self.loop.states) if mark.role == "stack" else 0
                pairs.append((node.outputs[0], outputs[mark.number + before]))
        for old, new in pairs:
            for reader in [r for r in old.outputs if id(r) not in self.ours] if isinstance(old, gs.Variable) else ():
                for slot, tensor in enumerate(reader.inputs):
                    if tensor is old:
                        reader.inputs[slot] = new
            for scope in walk(self.graph):
                scope.outputs[:] = [new if tensor is old else tensor for tensor in scope.outputs]

    # the body ---------------------------------------------------------------------------------------------------

    def _body(self) -> gs.Graph:
        """Return the loop's body with the attributes, shapes and outside tensors that its instances have now."""
        loop, made = self.loop, {}
        shapes = [self._entry_shape(number) for number in range(len(loop.states))]
        shapes += [list(self._stack(stack).shape[1:]) for stack in loop.scanned]
        lead = [] if loop.counter is None else [loop.counter, loop.condition]
        entries = [_declared(made, tensor, tensor.shape) for tensor in lead]
        entries += [_declared(made, tensor, shape) for tensor, shape in zip(loop.entries, shapes, strict=True)]
        nodes = []
        for number, node in enumerate(loop.body.nodes):
            if self.iterations.is_lost(number, node):
                continue
            instance = self.iterations.instances.get(number)
            read = [self._read((number, slot), tensor, made) for slot, tensor in enumerate(node.inputs)]
            given = [tensor.shape for tensor in instance.outputs] if instance else [self._row_shape(node)]
            outputs = [_declared(made, tensor, shape) for tensor, shape in zip(node.outputs, given, strict=True)]
            nodes.append(gs.Node(node.op, node.name, dict((instance or node).attrs), read, outputs, domain=node.domain))
        results = [made.get(id(tensor), tensor) for tensor in loop.body.outputs]
        body = gs.Graph(nodes, entries, results, name=loop.body.name, doc_string=loop.body.doc_string)
        body.opset, body.ir_version = loop.body.opset, loop.body.ir_version
        body.import_domains = list(loop.body.import_domains or ())
        return body

    def _read(self, place: tuple[int, int], tensor: gs.Tensor, made: Mapping[int, gs.Tensor]) -> gs.Tensor:
        if place in self.iterations.inputs:
            return self.iterations.inputs[place]
        if id(tensor) in made or tensor.is_empty():
            return made.get(id(tensor), tensor)
        stacked = id(tensor) in self.iterations.rows or id(tensor) in self.iterations.wholes
        return self._stack(tensor) if stacked else self._own(tensor)

    def _entry_shape(self, number: int) -> Sequence | None:
        entry, final, start = self.loop.entries[number], self.iterations.finals[number], self.loop.states[number]
        if isinstance(start, gs.Constant):
            return None if entry.shape is None else self._stack(start).shape
        known = entry.shape is not None and isinstance(final, gs.Variable) and final.shape is not None
        return final.shape if known and len(final.shape) == len(entry.shape) else entry.shape

    def _row_shape(self, node: gs.Node) -> Sequence | None:
        """Return the shape of what a node without an instance gives: a row, or what it is handed."""
        source = node.inputs[0]
        for entry, tensor in zip(self.loop.entries, (*self.loop.states, *self.loop.scanned), strict=True):
            source = tensor if entry is source else source
        shape = self._stack(source).shape if isinstance(source, gs.Constant) else node.outputs[0].shape
        return shape[1:] if _picks(node, self.loop) and isinstance(source, gs.Constant) else shape

    # the node ---------------------------------------------------------------------------------------------------

    def _state(self, number: int, tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return self._stack(tensor)
        return self.iterations.starts.get(number) or self.tensors[tensor.name]

    def _stack(self, stack: gs.Constant) -> gs.Constant:
        """Return a stack of what the iterations read of it now."""
        if id(stack) not in self.stacks:
            rows, whole = self.iterations.rows.get(id(stack)), self.iterations.wholes.get(id(stack))
            if rows is not None:
                made = gs.Constant(stack.name, _stacked([weight_of(row) for row in rows]))
                self.stacks[id(stack)] = made if stack.name not in self.tensors else self._renamed(made)
            else:
                self.stacks[id(stack)] = whole if whole is not None else self._own(stack)
        return self.stacks[id(stack)]

    def _count(self) -> gs.Constant:
        given, count = self.loop.inputs[0], self.iterations.count
        if count == self.loop.count:
            return self._own(given)
        return self._renamed(gs.Constant(given.name, Weight.of(np.full(weight_of(given).shape, count, np.int64))))

    def _output(self, number: int, tensor: gs.Tensor) -> gs.Tensor:
        final = self.iterations.finals[number] if number < len(self.loop.states) else None
        shape = tensor.shape
        if isinstance(final, _Stack):
            shape = self._stack(final.constant).shape
        elif isinstance(final, gs.Variable) and final.shape is not None:
            shape = final.shape
        return gs.Variable(tensor.name, tensor.dtype, None if tensor.shape is None else list(shape))

    def _own(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return this graph's tensor of the same name; a constant that it lacks is copied."""
        if tensor.is_empty():
            return gs.Variable.empty()
        if tensor.name not in self.tensors and isinstance(tensor, gs.Constant):
            self.tensors[tensor.name] = gs.Constant(tensor.name, tensor._values)
        return self.tensors[tensor.name]

    def _renamed(self, constant: gs.Constant) -> gs.Constant:
        while constant.name in self.tensors:
            constant.name += "_"
        self.tensors[constant.name] = constant
        return constant


def _declared(made: dict[int, gs.Tensor], tensor: gs.Tensor, shape: Sequence | None) -> gs.Tensor:
    if tensor.is_empty():
        return gs.Variable.empty()
    return made.setdefault(id(tensor), gs.Variable(tensor.name, tensor.dtype, None if shape is None else list(shape)))


def _stacked(rows: Sequence[Weight]) -> Weight:
    """Return the weight whose layers these are: a part of the stack that they are rows of, where all are cut alike."""
    first = rows[0]
    stack = first.source.stack if isinstance(first.source, RowSource) else None
    alike = all(getattr(row.source, "stack", None) is stack and _cut(row) == _cut(first) for row in rows)
    if stack is None or not alike:
        return computed((len(rows), *first.shape), first.dtype, lambda: np.stack([row.load() for row in rows]))
    weight = Weight(stack).take(0, [row.source.row for row in rows])
    for axis, pick in enumerate(first.picks):
        weight = weight if pick is None else weight.take(axis + 1, pick)
    return weight if first.factor == 1.0 else weight.scaled(first.factor)


def _cut(row: Weight) -> tuple:
    return (row.factor, *(None if pick is None else pick.tobytes() for pick in row.picks))
