"""Give every tensor its axes: one sweep over the nodes in topological order, adding each rule's equations."""

from collections.abc import Iterable, Iterator, Mapping

import onnx_graphsurgeon as gs

from graphclone.axes import load_rules
from graphclone.axes.axis import Axis, Equations, find, is_fill, leaves, lock, multiply
from graphclone.axes.binding import Binding
from graphclone.axes.denominators import find_denominators
from graphclone.axes.initializers import Initializers
from graphclone.axes.liveness import data_live
from graphclone.axes.notation import moves, parse
from graphclone.axes.positions import Positions
from graphclone.axes.registry import Typing, find_rule
from graphclone.axes.symbols import Regrouping, Symbols
from graphclone.axes.typed import Axes, AxisTyping, Site, TypedNode
from graphclone.axes.values import evaluate
from graphclone.dtypes import is_float
from graphclone.graphs import holds_floats, subgraphs, walk
from graphclone.model import Model
from graphclone.op import Op, is_standard
from graphclone.weights import weight_of


def type_axes(model: Model) -> AxisTyping:
    """Return the axes of every tensor of a model.

    Example:
        typing = type_axes(graphclone.load("gpt2.onnx")); typing.types["last_hidden_state"]
    """
    load_rules()
    same: dict[str, str | int] = {}
    written: dict[str, tuple[int, str]] = {}
    while True:
        sweep = _Sweep(model, same)
        typing = sweep.run()
        found: dict[str, str | int] = sweep.symbols.coinciding(sweep.equations.conflicts)
        if not found:
            found |= sweep.symbols.regrouped(sweep.misfits)
        if not found:
            fixed = sweep.symbols.written_out(sweep.misfits)
            written |= fixed | {symbol: fixed[other] for symbol, other in same.items() if other in fixed}
            found = {symbol: size for symbol, (size, _) in fixed.items()}
        if not found:
            break
        same = {**{symbol: found.get(other, other) for symbol, other in same.items()}, **found}
    typing.written = written
    typing.sites += find_denominators(typing)
    return typing


class _Sweep:
    """One pass; `same` maps symbolic sizes to those, or to the numbers, an earlier pass found them to equal."""

    def __init__(self, model: Model, same: Mapping[str, str | int]):
        self.model = model
        self.result = AxisTyping()
        self.equations = Equations()
        self.symbols = Symbols(model.graph.inputs, same)
        self.initializers = Initializers(self.result)
        self.positions = Positions(self.result, self.equations)
        self.arithmetic: set[str] = set()  # tensors that are shape arithmetic
        self.misfits: list[Regrouping] = []
        self.lost: dict[
            str, str
        ] = {}  # tensors whose axes are unknown -> the node without a rule that they descend from
        self.opsets = {item.domain: item.version for item in model.graph.import_domains}

    def run(self) -> AxisTyping:
        graph = self.model.graph
        for tensor in graph.inputs:
            self._type_input(tensor)
        self.initializers.tie(self.model, self.equations)
        self._sweep(graph.nodes, data_live(graph))
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Constant):
                self.initializers.axes(tensor, None, 0)
        self._settle_fills()
        self.positions.settle(graph)
        self._correct_declarations()
        return self.result

    def _type_input(self, tensor: gs.Variable) -> None:
        name = tensor.name
        if tensor.shape is None:
            self.result.types[name] = None
            return
        axes = [Axis(self.symbols.size(size, f"{name}.{i}")) for i, size in enumerate(tensor.shape)]
        for i, axis in enumerate(axes):
            if not holds_floats(tensor) or tensor.shape[i] in self.symbols.numbers:
                lock(axis, f"axis {i} of graph input '{name}'")
        self.result.types[name] = axes
        self.positions.origin[name] = name

    def _correct_declarations(self) -> None:
        """Let no tensor inside the graph declare a size that its operator contradicts: onnxruntime lays out memory by
        what is declared, and a statistic of such a tensor would be one of other tensors' bytes."""
        declared = {tensor.name for tensor in self.model.graph.outputs}
        for tensor in (tensor for node in self.model.graph.nodes for tensor in node.outputs):
            axes = self.result.types.get(tensor.name)
            if not axes or tensor.name in declared or tensor.shape is None or len(axes) != len(tensor.shape):
                continue
            found = [(find(axis), size) for axis, size in zip(axes, tensor.shape, strict=True)]
            if any(isinstance(size, int) and size not in axis.size and not axis.fill for axis, size in found):
                tensor.shape = [axis.size[0] if isinstance(size, int) else size for axis, size in found]

    def _settle_fills(self) -> None:
        """Make equations after all of fills that something else than broadcasting uses."""
        for tensor in self.model.graph.outputs:
            for axis in self.result.types.get(tensor.name) or ():
                find(axis).fill = False
        waiting = self.result.fills
        while True:
            broken = [(fill, real) for fill, real in waiting if not is_fill(fill)]
            if not broken:
                break
            waiting = [pair for pair in waiting if is_fill(pair[0])]
            for fill, real in broken:
                self.equations.equate(fill, real)
        self.result.fills = waiting

    # nodes ------------------------------------------------------------------------------------------------------

    def _sweep(self, nodes: Iterable[gs.Node], live: set[int] | None) -> None:
        for node in nodes:
            self._visit(node, live is None or id(node) in live)

    def _visit(self, node: gs.Node, constrains: bool) -> None:
        op = Op(node, self.opsets.get("" if node.domain in ("", "ai.onnx", None) else node.domain, 1))
        self._read_inputs(op)
        self.equations.why = op.where
        op.output_values = evaluate(op)
        if op.output_values is not None:
            self.result.values[node.outputs[0].name] = op.output_values
            for number, tensor in enumerate(node.outputs[1:], 1):
                self.result.values[tensor.name] = evaluate(op, number)
        if self._is_arithmetic(op):
            return self._arithmetic(op)
        if op.type == "If" and not op.domain:
            return self._branch(op)
        rule = find_rule(op.domain, op.type)
        missing = any(axes is None and op.has(slot) for slot, axes in enumerate(op.axes))
        typing = rule.read(op) if rule and not missing else None
        if typing is None:
            self._note_misfit(op)
            return self._unknown(op, rule is None)
        if not constrains and not moves(parse(typing.text), typing.fixed):
            op.axes = [None if axes is None else [Axis(axis.size) for axis in axes] for axes in op.axes]
        self._apply(op, typing, constrains)

    def _read_inputs(self, op: Op) -> None:
        for slot, tensor in enumerate(op.node.inputs):
            if tensor.is_empty():
                axes = value = None
            elif isinstance(tensor, gs.Constant):
                axes, value = self.initializers.axes(tensor, op.node, slot), self.initializers.values(tensor)
            else:
                axes, value = self.result.types.get(tensor.name), self.result.values.get(tensor.name)
            op.axes.append(axes)
            op.values.append(value)

    def _apply(self, op: Op, typing: Typing, constrains: bool) -> None:
        """Bind what a rule says to the node's axes, and note what follows."""
        binding = Binding(op, typing, self.equations, self.result.fills)
        outputs = binding.outputs()
        for number, tensor in enumerate(op.node.outputs):
            axes = outputs[number] if number < len(outputs) else None
            if tensor.name:
                self.result.types[tensor.name] = axes
        self.positions.follow(op, typing, binding.bound)
        for name, least in typing.minimum.items():
            self.result.minimum.append((binding.bound[name], least, op.where))
        self.result.steps += [(binding.bound[name], step, op.where) for name, step in typing.steps.items()]
        self.result.sites += [binding.site(store) for store in typing.stores]
        self.result.nodes.append(TypedNode(op, typing.text, binding.bound, outputs, constrains))

    # shape arithmetic -------------------------------------------------------------------------------------------

    def _is_arithmetic(self, op: Op) -> bool:
        if op.output_values is None or op.output_values[0].ndim > 1 or (op.output_count > 1 and op.type != "Split"):
            return False
        if op.type in ("Shape", "Size"):
            return True
        if op.type in ("Range", "ConstantOfShape"):
            return False
        constants = [tensor for tensor in op.node.inputs if isinstance(tensor, gs.Constant)]
        others = [tensor for tensor in op.node.inputs if not isinstance(tensor, gs.Constant) and not tensor.is_empty()]
        if any(len(weight_of(tensor).shape) > 1 for tensor in constants):
            return False
        if not others:  # a few learned numbers are no sizes: the decay of each head, a scale of each channel
            return not any(is_float(w.onnx_dtype) and w.shape not in ((), (1,)) for w in map(weight_of, constants))
        return all(tensor.name in self.arithmetic for tensor in others)

    def _arithmetic(self, op: Op) -> None:
        """Shape arithmetic constrains nothing; surgery keeps what Shape reports, and constants beside it."""
        reports = op.type in ("Shape", "Size")  # of a weight's sizes: surgery lets them stay as they were
        for slot, axes in enumerate(() if reports else op.axes):
            for axis in axes if op.is_constant(slot) and axes else ():
                lock(axis, f"{op.where} computes sizes with it")
        for tensor in op.node.outputs:
            self.arithmetic.add(tensor.name)
            sizes = zip(*(value.shape for value in self.result.values[tensor.name]), strict=True)
            self.result.types[tensor.name] = [Axis(tuple(size), lock=op.where) for size in sizes]
        if reports:
            axes = op.axes[0]
            if op.type == "Shape":
                axes = axes[op.attribute("start", 0) : op.attribute("end", None)]
            site = Site(op, 0, op.type.lower(), tuple(axes), reported=op.output_values)
            self.result.sites.append(site)

    # nodes without a signature ----------------------------------------------------------------------------------

    def _unknown(self, op: Op, no_rule: bool) -> None:
        """Lock what a node touches that no rule explains, its subgraphs' tensors too."""
        where = op.where
        if no_rule and not op.domain and not is_standard(op.type, op.opset):
            where += f", because opset {op.opset} of the ONNX standard has no such operator"
        if no_rule:
            self.result.unknown.append(where)
        reason = f"no axis rule for {where}" if no_rule else f"{where} has sizes that depend on data"
        reason = next((self.lost[tensor.name] for tensor in op.node.inputs if tensor.name in self.lost), reason)
        for axes in (*op.axes, *self._inside(op.node)):
            for axis in axes or ():
                lock(axis, reason)
        self.positions.compute(op)
        for tensor in op.node.outputs:
            axes = None
            if tensor.name and tensor.shape is not None:
                sizes = [self.symbols.size(size, f"{tensor.name}.{i}") for i, size in enumerate(tensor.shape)]
                axes = [Axis(size, lock=reason) for size in sizes]
            elif tensor.name:
                self.lost[tensor.name] = reason
            self.result.types[tensor.name] = axes
        self._note(op)

    def _inside(self, node: gs.Node) -> Iterator[Axes | None]:
        """Yield the axes of what a node's subgraphs read from outside or hold; their initializers are in use there."""
        for scope in (scope for graph in subgraphs(node) for scope in walk(graph)):
            reads = [(reader, slot, tensor) for reader in scope.nodes for slot, tensor in enumerate(reader.inputs)]
            for reader, slot, tensor in (*reads, *((None, 0, tensor) for tensor in scope.outputs)):
                is_constant = isinstance(tensor, gs.Constant)
                yield (
                    self.initializers.axes(tensor, reader, slot) if is_constant else self.result.types.get(tensor.name)
                )

    def _note_misfit(self, op: Op) -> None:
        """Note how many entries a Reshape reads and what its target lists."""
        target = op.value(1) if op.type == "Reshape" and op.axes[0] else None
        if target is not None:
            read = multiply(axis.size for axis in op.axes[0])
            entries = zip(*(entry.tolist() for entry in target), strict=True)
            self.misfits.append((read, tuple(entries), op.where))

    def _branch(self, op: Op) -> None:
        """If: both bodies live in the outer scope; their outputs are the same tensors."""
        bodies = [op.attribute("then_branch"), op.attribute("else_branch")]
        for body in bodies:
            self._sweep(body.nodes, None)
        for i, tensor in enumerate(op.node.outputs):
            sides = []
            for body in bodies:
                out = body.outputs[i]
                is_constant = isinstance(out, gs.Constant)
                sides.append(self.initializers.axes(out, None, 0) if is_constant else self.result.types.get(out.name))
            self.result.types[tensor.name] = self._merge(op, *sides)
        self._note(op)

    def _note(self, op: Op) -> None:
        self.result.nodes.append(TypedNode(op, "", {}, [self.result.types[tensor.name] for tensor in op.node.outputs]))

    def _merge(self, op: Op, first: Axes | None, second: Axes | None) -> Axes | None:
        if first is None or second is None or len(first) != len(second):
            for axis in [*(first or ()), *(second or ())]:
                lock(axis, f"the branches of {op.where} differ in rank")
            return None
        merged = []
        for a, b in zip(first, second, strict=True):
            if a.size != b.size and not any(_is_cuttable(leaf) for axis in (a, b) for leaf in leaves(axis)):
                merged.append(Axis(a.size if len(set(a.size)) > 1 else b.size))
                continue
            self.equations.equate(a, b)
            merged.append(a)
        return merged


def _is_cuttable(leaf: Axis) -> bool:
    return leaf.size[0] > 1 and len(set(leaf.size)) == 1 and leaf.lock is None
