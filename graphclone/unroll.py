"""Unroll loops over stacked layers: every iteration becomes nodes of its own, every layer a weight of its own.

`jax.lax.scan` over the layers of a model exports as a `Loop` (or `Scan`) with a constant trip count, whose body picks
its layer's weights from stacked ones. Unrolled, a layer is a block as in any other model: it has widths of its own, and
can be dropped. Loops whose count depends on data stay as they are, and lock what they touch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.dtypes import onnx_dtype_of
from graphclone.graphs import walk
from graphclone.sources import RowSource
from graphclone.weights import Weight, weight_of

MAX_COUNT = 256
MAX_NODES = 50_000


def unroll_loops(graph: gs.Graph) -> "tuple[Loop, ...]":
    """Replace each loop of a constant, small number of iterations by its iterations, inner loops first.

    Return the loops that lay in the main graph, with which `roll` writes them back; their nodes are marked.

    Example:
        loops = unroll_loops(model.graph)
    """
    found: list[Loop] = []
    if not any(node.op in ("Loop", "Scan") for scope in walk(graph) for node in scope.nodes):
        return ()
    names = {t.name for scope in walk(graph) for node in scope.nodes for t in (*node.inputs, *node.outputs)}
    names |= {node.name for scope in walk(graph) for node in scope.nodes}
    for scope in reversed(list(walk(graph))):
        nodes: list[gs.Node] = []
        for node in list(scope.nodes):
            loop = _loop_of(node, scope)
            nodes += [node] if loop is None else _Unroller(loop, scope, names).run()
            found += [loop] if loop is not None and scope is graph else []
        scope.nodes[:] = nodes
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """A Loop or Scan, told apart no more: `states` enter the body's inputs first; `scanned` are picked by row.

    node: without inputs and outputs once it is unrolled; `inputs` and `outputs` are what it had.
    """

    node: gs.Node
    body: gs.Graph
    count: int
    states: tuple[gs.Tensor, ...]
    scanned: tuple[gs.Tensor, ...]
    counter: gs.Tensor | None
    condition: gs.Tensor | None
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]

    @property
    def results(self) -> list[gs.Tensor]:
        """Return the body's outputs but for the condition: states, then what is stacked."""
        return list(self.body.outputs)[self.condition is not None :]

    @property
    def entries(self) -> list[gs.Tensor]:
        return list(self.body.inputs)[2 if self.condition is not None else 0 :]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a node of an unrolled loop comes from.

    role: `body`, then `number` is of the node in the body; `lift` and `stack` what stacks the results of an output,
    `last` what hands over a last state, then `number` is of the output, without the states or among them.
    """

    loop: Loop
    role: str
    number: int
    iteration: int = 0


def mark_of(node: gs.Node) -> Mark | None:
    """Return where a node comes from that unrolling made; None for all others."""
    return getattr(node, "unrolled", None)


def passes_on(node: gs.Node) -> bool:
    """Tell whether a node hands over what it reads: an Identity, or a Cast to the type that it already is of."""
    if node.op == "Cast":
        types = (node.inputs[0].dtype, node.attrs["to"])
        return None not in types and len({t if isinstance(t, int) else onnx_dtype_of(np.dtype(t)) for t in types}) == 1
    return node.op == "Identity"


def _loop_of(node: gs.Node, scope: gs.Graph) -> Loop | None:
    if node.op not in ("Loop", "Scan") or node.domain not in (None, "", "ai.onnx"):
        return None
    body = node.attrs["body"]
    if any(isinstance(value, gs.Graph) for inner in body.nodes for value in inner.attrs.values()):
        return None
    loop = _read_loop(node, body) if node.op == "Loop" else _read_scan(node, body, scope.opset)
    if loop is None or not 0 < loop.count <= MAX_COUNT or loop.count * len(body.nodes) > MAX_NODES:
        return None
    return loop


def _read_loop(node: gs.Node, body: gs.Graph) -> Loop | None:
    count, condition = node.inputs[0], node.inputs[1]
    if not isinstance(count, gs.Constant) or not (condition.is_empty() or _is_true(condition)):
        return None
    going = body.outputs[0]
    while going is not body.inputs[1] and going.inputs and going.inputs[0].op in ("Identity", "Cast"):
        going = going.inputs[0].inputs[0]
    if going is not body.inputs[1] and not _is_true(going):
        return None
    trips = int(weight_of(count).load().reshape(-1)[0])
    ends = tuple(node.inputs), tuple(node.outputs)
    return Loop(node, body, trips, tuple(node.inputs[2:]), (), body.inputs[0], body.inputs[1], *ends)


def _read_scan(node: gs.Node, body: gs.Graph, opset: int) -> Loop | None:
    scanned = int(node.attrs["num_scan_inputs"])
    settings = ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions")
    if opset < 9 or any(any(node.attrs.get(name, ())) for name in settings):
        return None
    states, stacks = node.inputs[: len(node.inputs) - scanned], node.inputs[len(node.inputs) - scanned :]
    lengths = [stack.shape[0] for stack in stacks if stack.shape]
    count = next((int(length) for length in lengths if isinstance(length, (int, np.integer))), None)
    ends = tuple(node.inputs), tuple(node.outputs)
    return None if count is None else Loop(node, body, count, tuple(states), tuple(stacks), None, None, *ends)


def _is_true(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and bool(weight_of(tensor).load().all())


class _Unroller:
    def __init__(self, loop: Loop, scope: gs.Graph, names: set[str]):
        self.loop = loop
        self.scope = scope
        self.names = names
        self.nodes: list[gs.Node] = []
        self.rows: dict[tuple[int, int], gs.Constant] = {}

    def run(self) -> list[gs.Node]:
        """Return the nodes that replace the loop; whatever read its outputs reads theirs."""
        loop, states = self.loop, list(self.loop.states)
        stacked: list[list[gs.Tensor]] = [[] for _ in loop.results[len(states) :]]
        for i in range(loop.count):
            known: dict[int, gs.Tensor] = {}
            if loop.condition is not None:
                number = np.full(
                    (1,) * len(loop.counter.shape or ()), i, np.int64
                )  # a scalar, or one entry as declared
                known[id(loop.counter)] = gs.Constant(self._fresh(f"{loop.node.name}.{i}"), Weight.of(number))
                known[id(loop.condition)] = gs.Constant(
                    self._fresh(f"{loop.node.name}.true"), Weight.of(np.array(True))
                )
            entering = [*states, *(self._row(stack, i) for stack in loop.scanned)]
            known |= {id(entry): tensor for entry, tensor in zip(loop.entries, entering, strict=True)}
            self._iterate(i, known)
            results = [known.get(id(tensor), tensor) for tensor in loop.results]
            states = results[: len(states)]
            for rows, tensor in zip(stacked, results[len(states) :], strict=True):
                rows.append(tensor)
        outputs = list(loop.node.outputs)
        loop.node.inputs.clear()
        loop.node.outputs.clear()
        for number, (output, state) in enumerate(zip(outputs, states, strict=False)):
            self._hand_over(output, state, number)
        for number, (output, rows) in enumerate(zip(outputs[len(states) :], stacked, strict=False)):
            if self._is_read(output):
                self._stack(output, rows, number)
        return self.nodes

    def _iterate(self, i: int, known: dict[int, gs.Tensor]) -> None:
        for number, node in enumerate(self.loop.body.nodes):
            inputs = [known.get(id(tensor), tensor) for tensor in node.inputs]
            if passes_on(node):
                known[id(node.outputs[0])] = inputs[0]
            elif self._picks_row(node, inputs):
                known[id(node.outputs[0])] = self._row(inputs[0], int(weight_of(inputs[1]).load()))
            else:
                outputs = [self._copy(tensor, i) for tensor in node.outputs]
                known |= {id(old): new for old, new in zip(node.outputs, outputs, strict=True) if not old.is_empty()}
                attributes = dict(node.attrs)
                mark = Mark(self.loop, "body", number, i)
                self._add(node.op, f"{node.name}.{i}", attributes, inputs, outputs, node.domain, mark)

    def _picks_row(self, node: gs.Node, inputs: Sequence[gs.Tensor]) -> bool:
        if node.op != "Gather" or node.attrs.get("axis", 0) or not all(isinstance(t, gs.Constant) for t in inputs):
            return False
        picked, stack = weight_of(inputs[1]), weight_of(inputs[0])
        return not picked.shape and bool(stack.shape) and 0 <= int(picked.load()) < stack.shape[0]

    def _row(self, stack: gs.Tensor, i: int) -> gs.Tensor:
        """Return one layer of a stacked tensor: a weight of its own where the stack is a weight."""
        if isinstance(stack, gs.Constant):
            weight = weight_of(stack)
            if (id(stack), i) not in self.rows:
                source = RowSource(weight.source, i) if weight.untouched else None
                row = Weight(source) if source else Weight.of(weight.load()[i])
                self.rows[id(stack), i] = gs.Constant(self._fresh(f"{stack.name}.{i}"), row)
            return self.rows[id(stack), i]
        row = gs.Variable(self._fresh(f"{stack.name}.{i}"), stack.dtype, list(stack.shape[1:]) if stack.shape else None)
        index = gs.Constant(self._fresh(f"{stack.name}.{i}.index"), Weight.of(np.array(i, np.int64)))
        self._add("Gather", f"{stack.name}.{i}.pick", {"axis": 0}, [stack, index], [row])
        return row

    def _stack(self, output: gs.Tensor, rows: Sequence[gs.Tensor], number: int) -> None:
        axis = gs.Constant(self._fresh(f"{output.name}.axis"), Weight.of(np.array([0], np.int64)))
        parts = []
        for i, row in enumerate(rows):
            part = gs.Variable(self._fresh(f"{output.name}.{i}"), output.dtype)
            as_input = self.scope.opset >= 13
            inputs = [row, axis] if as_input else [row]
            attributes = {} if as_input else {"axes": [0]}
            self._add(
                "Unsqueeze", f"{part.name}.lift", attributes, inputs, [part], mark=Mark(self.loop, "lift", number)
            )
            parts.append(part)
        mark = Mark(self.loop, "stack", number)
        self._add("Concat", f"{output.name}.stack", {"axis": 0}, parts, [output], mark=mark)

    def _hand_over(self, output: gs.Tensor, state: gs.Tensor, number: int) -> None:
        """Let readers of a loop's output read the last state."""
        if output.is_empty() or not self._is_read(output):
            return
        if any(tensor is output for tensor in self.scope.outputs) or any(o is output for o in self._captured()):
            mark = Mark(self.loop, "last", number)
            self._add("Identity", f"{output.name}.last", {}, [state], [output], mark=mark)
            return
        for reader in list(output.outputs):
            for slot, tensor in enumerate(reader.inputs):
                if tensor is output:
                    reader.inputs[slot] = state

    def _captured(self) -> list[gs.Tensor]:
        """Return what the bodies of other nodes read from this scope: those reads are not seen by `tensor.outputs`."""
        return [t for g in list(walk(self.scope))[1:] for t in g.outputs]

    def _is_read(self, tensor: gs.Tensor) -> bool:
        return bool(tensor.outputs) or any(t is tensor for g in walk(self.scope) for t in g.outputs)

    def _copy(self, tensor: gs.Tensor, i: int) -> gs.Tensor:
        if tensor.is_empty():
            return gs.Variable.empty()
        shape = list(tensor.shape) if tensor.shape is not None else None
        return gs.Variable(self._fresh(f"{tensor.name}.{i}"), tensor.dtype, shape)

    def _add(
        self, op: str, name: str, attributes: dict, inputs, outputs, domain: str | None = None, mark: Mark | None = None
    ) -> None:
        node = gs.Node(op, self._fresh(name), attributes, list(inputs), list(outputs), domain=domain)
        node.unrolled = mark
        self.nodes.append(node)

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name
