"""Program: a graph as a list of operators over values, small enough to rewrite freely."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from graphclone.errors import InputError
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.pytorch.sizes import Integer, SizeTable
from graphclone.weights import Weight, weight_of

STANDARD = ("", "ai.onnx", None)
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
FX_NODE = "pkg.torch.onnx.fx_node"


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the program.

    Attributes:
        name: of the tensor in the graph.
        op: what computes it; None for inputs and stored tensors.
        weight: the stored tensor, for initializers.
        known: what it holds, where only sizes of inputs are open: a numpy object array of numbers and sizes.
        dims: sizes of its axes. dtype: of the torch tensor.
        is_table: it depends on sizes and constants alone, not on parameters or float inputs.
    """

    name: str
    op: "Op | None" = None
    weight: Weight | None = None
    known: np.ndarray | None = None
    dims: tuple[Integer, ...] | None = None
    dtype: torch.dtype | None = None
    is_table: bool = False
    parameter: Any = None

    def __repr__(self) -> str:
        return f"<{self.name!r} {self.dims}>"

    @property
    def scalar(self) -> "Integer | float | bool | None":
        """The one number it holds, or None."""
        return self.known.reshape(-1)[0] if self.known is not None and self.known.size == 1 else None

    @property
    def rank(self) -> int:
        return len(self.dims)


@dataclass(eq=False)
class Op:
    """One operator: `type` and `domain` as the standard spells them, or an idiom in the domain `graphclone`.

    Attributes: `scope` is the path of the module the exporter was in (`transformer.h.0.attn`), `fx` the line of
    torch's own graph it came from, `opset` the version of its domain, `inside` the branches it stands in, outer ones
    first, as names of If nodes with 0 for the branch where the condition holds and 1 for the other.

    An If reads its condition, the results of the first branch and those of the second; the operators of its branches
    are operators of the program like others.
    """

    type: str
    inputs: list[Value | None]
    outputs: list[Value | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""
    scope: str = ""
    fx: str = ""
    opset: int = 0
    code: Any = None
    inside: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        return f"<{self.type} {self.name!r}>"

    def __getitem__(self, slot: int) -> Value | None:
        """Return an input, or None where it is absent."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    @property
    def key(self) -> tuple[str, str]:
        return self.domain, self.type

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def attribute(self, name: str, default=None):
        """Return an attribute, tensors as arrays and bytes as text."""
        value = self.attributes.get(name, default)
        if isinstance(value, gs.Constant):
            return np.asarray(value.values)
        return value.decode() if isinstance(value, bytes) else value

    def axis(self, default: int = -1, name: str = "axis") -> int:
        return int(self.attribute(name, default))

    def integers(self, slot: int, name: str | None = None) -> list[Integer] | None:
        """Return integers that older opsets keep in attribute `name` and newer ones in an input; None where absent.

        Raises: Unsupported if they depend on data.
        """
        if name is not None and self.attribute(name) is not None:
            return [int(entry) for entry in np.atleast_1d(self.attribute(name))]
        given = self[slot]
        if given is None:
            return None
        if given.known is None:
            raise Unsupported(f"its input {slot} ('{given.name}') depends on data")
        return list(given.known.reshape(-1))


class Unsupported(InputError):
    """A use of an operator that its rule cannot turn into PyTorch; the message finishes `Op ...: `."""


@dataclass
class Program:
    """Operators in topological order, those of branches among them, what goes in and comes out, and their sizes."""

    ops: list[Op]
    inputs: list[Value]
    outputs: list[Value]
    sizes: SizeTable
    signature: dict[str, tuple[str, str]] = field(default_factory=dict)

    def users(self) -> dict[Value, list[Op]]:
        """Return the operators that read each value."""
        result: dict[Value, list[Op]] = {}
        for op in self.ops:
            for each in op.inputs:
                if each is not None and op not in result.setdefault(each, []):
                    result[each].append(op)
        return result

    def replace(self, old: Value, new: Value) -> None:
        """Let everything that reads `old` read `new`."""
        for op in self.ops:
            op.inputs = [new if each is old else each for each in op.inputs]
        self.outputs = [new if each is old else each for each in self.outputs]

    def prune(self) -> None:
        """Remove operators that no output needs."""
        alive: set[Value] = set(self.outputs)
        kept = []
        for op in reversed(self.ops):
            if any(output in alive for output in op.outputs if output is not None):
                if op.key == ("", "If"):
                    _forget_unread(op, alive)
                alive.update(each for each in op.inputs if each is not None)
                kept.append(op)
        self.ops = kept[::-1]

    def values(self) -> Iterator[Value]:
        """Yield every value once: inputs, stored tensors and results."""
        seen: set[Value] = set()
        for each in [*self.inputs, *(v for op in self.ops for v in [*op.inputs, *op.outputs]), *self.outputs]:
            if each is not None and each not in seen:
                seen.add(each)
                yield each


def in_order_of_use(ops: list[Op]) -> list[Op]:
    """Return operators as the results that none of them reads lead to them: inputs first, in the order they are read.

    Equal graphs give equal orders, whatever order their files have.
    """
    inside = set(ops)
    read = {each.op for op in ops for each in op.inputs if each is not None}
    done: dict[Op, None] = {}
    pending = [op for op in reversed(ops) if op not in read]
    while pending:
        op = pending[-1]
        missing = [v.op for v in op.inputs if v is not None and v.op in inside and v.op not in done]
        if missing:
            pending.append(missing[0])
        else:
            done.setdefault(pending.pop())
    return list(done)


def _forget_unread(op: Op, alive: set[Value]) -> None:
    """Drop the results of an If that nothing reads, and what its branches compute for them."""
    count = len(op.outputs)
    for place, output in enumerate(op.outputs):
        if output not in alive:
            op.outputs[place] = op.inputs[1 + place] = op.inputs[1 + count + place] = None


def read(model: Model) -> Program:
    """Return the program of a model's graph; nothing is converted yet and no weight is loaded."""
    graph: gs.Graph = model.graph
    values: dict[str, Value] = {}

    def value(tensor: gs.Tensor) -> Value | None:
        if tensor.is_empty():
            return None
        if tensor.name not in values:
            weight = weight_of(tensor) if isinstance(tensor, gs.Constant) else None
            values[tensor.name] = Value(tensor.name, weight=weight)
        return values[tensor.name]

    inputs = [value(tensor) for tensor in graph.inputs]
    wanted = {tensor.name for scope in walk(graph) for node in scope.nodes for tensor in node.inputs}
    wanted |= {tensor.name for scope in walk(graph) for tensor in scope.outputs}
    ops: list[Op] = []

    def add(graph: gs.Graph, inside: tuple[tuple[str, int], ...]) -> None:
        for node in sorted_nodes(graph):
            bodies = branches(node)
            for number, body in enumerate(bodies):
                add(body, (*inside, (node.name, number)))
            metadata = model.node_metadata.get(node.name, {})
            chosen = [tensor for body in bodies for tensor in body.outputs]
            op = Op(
                type=node.op,
                inputs=[value(tensor) for tensor in [*node.inputs, *chosen]],
                outputs=[value(tensor) for tensor in _given(node, wanted, model.opset)],
                attributes={} if bodies else dict(node.attrs),
                domain="" if node.domain in STANDARD else node.domain,
                name=node.name,
                scope=scope_of(node.name, metadata),
                fx=metadata.get(FX_NODE, ""),
                opset=model.opset,
                inside=inside,
            )
            for output in op.outputs:
                if output is not None:
                    output.op = op
            ops.append(op)

    add(graph, ())
    outputs = [value(tensor) for tensor in graph.outputs]
    return Program(ops, inputs, outputs, SizeTable())


def _given(node: gs.Node, wanted: set[str], opset: int) -> list[gs.Tensor]:
    """Return a node's outputs without those at its end that it may leave out and nothing wants: a norm's statistics."""
    outputs = list(node.outputs)
    while len(outputs) > 1 and (outputs[-1].is_empty() or outputs[-1].name not in wanted):
        if not _may_leave_out(node, len(outputs) - 1, opset):
            break
        outputs.pop()
    return outputs


def _may_leave_out(node: gs.Node, number: int, opset: int) -> bool:
    if node.domain not in STANDARD or not onnx.defs.has(node.op, opset):
        return False
    formal = onnx.defs.get_schema(node.op, opset, "").outputs[number : number + 1]
    return bool(formal) and formal[0].option == onnx.defs.OpSchema.FormalParameterOption.Optional


def branches(node: gs.Node) -> list[gs.Graph]:
    """Return the graph that an If runs where its condition holds, and the other; none for other operators."""
    return [node.attrs["then_branch"], node.attrs["else_branch"]] if node.op == "If" and not node.domain else []


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes in topological order, keeping the file's order where it is one already."""
    ready = {tensor.name for tensor in graph.inputs}
    made = {output.name for node in graph.nodes for output in node.outputs}
    pending, result = list(graph.nodes), []
    while pending:
        later = []
        for node in pending:
            bodies = [scope for body in branches(node) for scope in walk(body)]
            reads = [*node.inputs, *(t for body in bodies for each in body.nodes for t in each.inputs)]
            reads += [tensor for body in bodies for tensor in body.outputs]
            if all(tensor.name in ready or tensor.name not in made for tensor in reads):
                ready.update(output.name for output in node.outputs)
                result.append(node)
            else:
                later.append(node)
        if len(later) == len(pending):
            return result + later
        pending = later
    return result


LEGACY_NAME = re.compile(r"^/(?P<path>[^:]+)/(?P<leaf>[^/]+)$")


def scope_of(name: str, metadata: dict[str, str]) -> str:
    """Return the path of the module a node came from, as its exporter tells; "" where it does not.

    Example:
        >>> scope_of("/model/layers.0/self_attn/q_proj/MatMul", {})
        'model.layers.0.self_attn.q_proj'
    """
    if NAME_SCOPES in metadata:
        try:
            scopes = ast.literal_eval(metadata[NAME_SCOPES])
        except (ValueError, SyntaxError):
            return ""
        if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str):
            return scopes[-2]
        return ""
    match = LEGACY_NAME.match(name)
    return match["path"].replace("/", ".") if match else ""
