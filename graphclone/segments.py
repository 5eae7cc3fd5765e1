"""Run the part of a graph between some of its tensors, and gather Gram matrices where it runs."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.bypass import exchange_input, remove_dead
from graphclone.calibration.session import open_session
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.weights import Weight

Feeds = Mapping[str, np.ndarray]


class Segment:
    """The part of a model that computes `outputs` from `starts` (tensors that become inputs) and the graph's inputs.

    Example:
        Segment(model, ["h.3.out"], ["h.4.out"]).run({"h.3.out": stream, "attention_mask": mask})
    """

    def __init__(self, model: Model, starts: Sequence[str], outputs: Sequence[str], provider: str = "cpu"):
        part = model.copy()
        self.outputs = list(outputs)
        self.passed = [name for name in outputs if name in starts]
        cut_out(part, starts, [name for name in outputs if name not in starts])
        self.inputs = [tensor.name for tensor in part.graph.inputs]
        self.session = open_session(part, provider=provider, mem_reuse=True) if part.graph.outputs else None

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        found = {name: feeds[name] for name in self.passed}
        if self.session is not None:
            names = [output.name for output in self.session.get_outputs()]
            found |= dict(zip(names, self.session.run(names, {name: feeds[name] for name in self.inputs})))
        return found


class GramSegment:
    """A segment that returns no activations but X'X and X'Y, of x with a column of ones and a target given or computed.

    x: the tensor [..., K]; y: the target [..., N] fed by name; minus: a tensor the target is reduced by inside, plus: one
    it is raised by; weights: a mask [batch, sequence] that weighs rows, or None.
    """

    def __init__(self, model, starts, x: str, width: int, targets: int, minus=(), plus=(), mask=None, provider="cpu"):
        part = model.copy()
        tensors = _tensors(part.graph)
        missing = [name for name in (x, *minus, *plus) if name not in tensors]
        if missing:
            raise InputError(f"no tensor '{missing[0]}' to measure")
        builder = _Builder(part.graph)
        target = gs.Variable("refit_target", np.float32, [None, targets])
        rows = builder.node("Reshape", [tensors[x], builder.ints([-1, width])])
        rows = builder.node("Cast", [rows], to=1)
        ones = builder.node("Add", [builder.node("Mul", [builder.columns(rows), builder.float(0.0)]), builder.float(1.0)])
        rows = builder.node("Concat", [rows, ones], axis=1)
        wanted: gs.Tensor = target
        for names, op in ((minus, "Sub"), (plus, "Add")):
            for name in names:
                other = builder.node("Reshape", [tensors[name], builder.ints([-1, targets])])
                wanted = builder.node(op, [wanted, other])
        weighed = rows
        if mask is not None:
            weight = builder.node("Cast", [builder.node("Reshape", [tensors[mask], builder.ints([-1, 1])])], to=1)
            weighed = builder.node("Mul", [rows, weight])
            square = builder.node("Mul", [builder.node("Mul", [wanted, wanted]), weight])
        else:
            square = builder.node("Mul", [wanted, wanted])
        left = builder.node("Transpose", [weighed], perm=[1, 0])
        gram = builder.node("MatMul", [left, rows])
        cross = builder.node("MatMul", [left, wanted])
        energy = builder.node("ReduceSum", [square], keepdims=0)
        part.graph.inputs.append(target)
        names = []
        for name, tensor in (("refit_gram", gram), ("refit_cross", cross), ("refit_energy", energy)):
            builder.rename(tensor, name)
            names.append(name)
        cut_out(part, starts, names, keep=("refit_target",))
        self.inputs = [tensor.name for tensor in part.graph.inputs]
        self.session = open_session(part, provider=provider, mem_reuse=True)

    def run(self, feeds: Feeds) -> tuple[np.ndarray, np.ndarray, float]:
        """Return X'X [K+1, K+1], X'Y [K+1, N] and the energy of Y, in double precision; the last row is of ones."""
        names = ["refit_gram", "refit_cross", "refit_energy"]
        gram, cross, energy = self.session.run(names, {name: feeds[name] for name in self.inputs})
        return gram.astype(np.float64), cross.astype(np.float64), float(energy)


class _Builder:
    def __init__(self, graph: gs.Graph):
        self.graph = graph
        self.count = 0

    def node(self, op: str, inputs: list[gs.Tensor], **attributes) -> gs.Variable:
        self.count += 1
        output = gs.Variable(f"refit_{op}_{self.count}")
        self.graph.nodes.append(gs.Node(op, f"refit_{op}_{self.count}", attributes, inputs, [output]))
        return output

    def ints(self, values: Sequence[int]) -> gs.Constant:
        self.count += 1
        return gs.Constant(f"refit_ints_{self.count}", Weight.of(np.array(values, np.int64)))

    def float(self, value: float) -> gs.Constant:
        self.count += 1
        return gs.Constant(f"refit_float_{self.count}", Weight.of(np.array(value, np.float32)))

    def columns(self, rows: gs.Tensor) -> gs.Variable:
        """Return the first column of a matrix."""
        return self.node("Slice", [rows, self.ints([0]), self.ints([1]), self.ints([1])])

    def rename(self, tensor: gs.Variable, name: str) -> None:
        tensor.name = name
        tensor.dtype = np.dtype(np.float32)
        self.graph.outputs.append(tensor)


def cut_out(part: Model, starts: Sequence[str], outputs: Sequence[str], keep: Sequence[str] = ()) -> None:
    """Leave of a copied model what computes `outputs` from `starts` and the graph's inputs."""
    graph = part.graph
    tensors = _tensors(graph)
    for name in starts:
        tensor = tensors.get(name)
        if tensor is None or not tensor.inputs:
            continue
        dtype = tensor.dtype or np.dtype(np.float32)
        start = gs.Variable(name, dtype, None if tensor.shape is None else [None] * len(tensor.shape))
        tensor.name = f"{name}_computed"
        for consumer in list(tensor.outputs):
            exchange_input(consumer, tensor, start)
        graph.inputs.append(start)
        tensors[name] = start
    graph.outputs[:] = [tensors[name] for name in outputs]
    for tensor in graph.outputs:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    remove_dead(graph)
    graph.inputs[:] = [t for t in graph.inputs if t.outputs or t.name in keep]


def _tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    found = {t.name: t for t in graph.inputs}
    found.update((t.name, t) for node in graph.nodes for t in (*node.inputs, *node.outputs))
    return found
