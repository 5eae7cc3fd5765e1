"""Give every tensor its axes: one sweep over the nodes in topological order, adding each rule's equations."""

import ast
import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes import load_rules
from graphclone.axes.axis import (
    Axis,
    Equations,
    Size,
    divide,
    find,
    is_fill,
    is_static,
    is_unit,
    leaves,
    lock,
    multiply,
    product,
    total,
)
from graphclone.axes.denominators import find_denominators
from graphclone.axes.elementwise import BROADCASTING, UNARY
from graphclone.axes.notation import Pattern, parse, parse_axes
from graphclone.axes.registry import Store, Typing, find_rule
from graphclone.axes.typed import Axes, AxisTyping, Site, TypedNode, Use
from graphclone.axes.values import evaluate
from graphclone.axes.wrapping import WrappedIndices
from graphclone.dtypes import holds_weights
from graphclone.graphs import constants, walk
from graphclone.model import Model
from graphclone.op import Op, Values
from graphclone.weights import repeated_axes, weight_of

MAX_CONSTANT = 1 << 20
ELEMENTWISE = {*BROADCASTING, *UNARY, "Cast", "Identity"}
SMALL_PRIMES = [(2, 3), (5, 7), (11, 13), (17, 19), (23, 29), (31, 37), (41, 43), (47, 53), (59, 61), (67, 71)]
LARGE_PRIMES = [(1601, 2003), (1607, 2011), (1609, 2017), (1613, 2027)]


def type_axes(model: Model) -> AxisTyping:
    """Return the axes of every tensor of a model.

    Example:
        typing = type_axes(graphclone.load("gpt2.onnx")); typing.types["last_hidden_state"]
    """
    load_rules()
    same: dict[str, str] = {}
    while True:
        sweep = _Sweep(model, same)
        typing = sweep.run()
        found = sweep.coinciding_symbols()
        if not found:
            break
        same = {**{symbol: found.get(other, other) for symbol, other in same.items()}, **found}
    typing.sites += find_denominators(typing)
    return typing


class _Sweep:
    """One pass; `same` maps symbolic sizes to those an earlier pass found them to equal."""

    def __init__(self, model: Model, same: Mapping[str, str]):
        self.model = model
        self.same = same
        self.result = AxisTyping()
        self.equations = Equations()
        self.symbols: dict[str, Size] = {}
        self.origin: dict[str, str] = {}  # tensor -> graph input whose values it only rearranges
        self.positions: dict[str, Axis] = {}  # integer tensor -> the axis its values are positions on
        self.wrapped = WrappedIndices(self.origin)
        self.compared: dict[str, str] = {}  # graph input -> the node that computes with its values
        self.arithmetic: set[str] = set()  # tensors that are shape arithmetic
        self.repeated: dict[str, tuple[int, ...]] = {}  # constant -> the axes along which it repeats itself
        self.lost: dict[str, str] = {}  # tensors whose axes are unknown -> the node without a rule that they descend from
        self.opsets = {item.domain: item.version for item in model.graph.import_domains}

    def run(self) -> AxisTyping:
        graph = self.model.graph
        self._name_symbols(graph.inputs)
        for tensor in graph.inputs:
            self._type_input(tensor)
        live = _data_live(graph)
        self._tie()
        self._sweep(graph.nodes, live)
        for tensor in graph.outputs:
            if tensor.name in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor.name], "a graph output")
            if isinstance(tensor, gs.Constant):
                self._constant_axes(tensor, None, 0)
            elif tensor.name in self.positions:
                self.result.position_outputs[tensor.name] = self.positions[tensor.name]
            elif self.origin.get(tensor.name) in self.result.index_axes:
                self.result.position_outputs[tensor.name] = self.result.index_axes[self.origin[tensor.name]]
        self._settle_fills()
        _lock_ranges(self.result)
        for name, axis in self.result.index_axes.items():
            if name in self.compared:
                lock(axis, f"{self.compared[name]} computes with the values of input '{name}'")
        return self.result

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

    # graph inputs -----------------------------------------------------------------------------------------------

    def _name_symbols(self, inputs: Iterable[gs.Variable]) -> None:
        """Give every symbolic size its own pair of probe sizes; sizes of images and waves are large."""
        small, large = itertools.cycle(SMALL_PRIMES), itertools.cycle(LARGE_PRIMES)
        for tensor in inputs:
            for axis, size in enumerate(tensor.shape or ()):
                size = self.same.get(size, size)
                if isinstance(size, str) and size.isidentifier() and size not in self.symbols:
                    spatial = tensor.dtype is not None and _is_float(tensor) and (axis >= 2 or len(tensor.shape) == 2 > axis > 0)
                    self.symbols[size] = next(large if spatial else small)

    def _size(self, size, where: str) -> Size:
        if isinstance(size, (int, np.integer)):
            return (int(size), int(size))
        text = size if isinstance(size, str) and size else where
        text = self.same.get(text, text)
        if text not in self.symbols:
            known = [_evaluate_symbol(text, {name: pair[p] for name, pair in self.symbols.items()}) for p in (0, 1)]
            fresh = SMALL_PRIMES[len(self.symbols) % len(SMALL_PRIMES)]
            self.symbols[text] = tuple(known) if all(known) else fresh
        return self.symbols[text]

    def coinciding_symbols(self) -> dict[str, str]:
        """Return the symbols that the graph equates with others: {symbol: the one to use in its place}."""
        by_size: dict[Size, list[str]] = defaultdict(list)
        for symbol, size in self.symbols.items():
            by_size[size].append(symbol)
        found: dict[str, str] = {}
        for sizes in self.equations.conflicts:
            first, second = (by_size[size][0] if size in by_size else None for size in sizes)
            if first is not None and second is not None:
                first, second = (found.get(symbol, symbol) for symbol in (first, second))
                if first != second:
                    found = {symbol: first if other == second else other for symbol, other in found.items()}
                    found[second] = first
        return found

    def _type_input(self, tensor: gs.Variable) -> None:
        name = tensor.name
        if tensor.shape is None:
            self.result.types[name] = None
            return
        axes = [Axis(self._size(size, f"{name}.{i}")) for i, size in enumerate(tensor.shape)]
        if not _is_float(tensor):
            for i, axis in enumerate(axes):
                lock(axis, f"axis {i} of graph input '{name}'")
        self.result.types[name] = axes
        self.origin[name] = name

    # constants --------------------------------------------------------------------------------------------------

    def _tie(self) -> None:
        ties = self.model.ties
        tensors = {c.name: c for graph in walk(self.model.graph) for c in constants(graph)} if ties else {}
        for tie in ties:
            first, second = self._shared(tensors[tie.first]), self._shared(tensors[tie.second])
            self.equations.why = f"initializers '{tie.first}' and '{tie.second}' are tied"
            for a, b in zip(first, reversed(second) if tie.transposed else second):
                self.equations.equate(a, b)

    def _shared(self, constant: gs.Constant) -> Axes:
        if constant.name not in self.result.types:
            self.result.types[constant.name] = [Axis((n, n)) for n in weight_of(constant).shape]
        return self.result.types[constant.name]

    def _constant_axes(self, constant: gs.Constant, node: gs.Node | None, slot: int) -> Axes:
        """Vectors are private to each use (exporters share equal ones between unrelated layers); matrices are shared."""
        weight = weight_of(constant)
        if sum(n > 1 for n in weight.shape) <= 1 or not holds_weights(weight.onnx_dtype):
            axes = [Axis((n, n)) for n in weight.shape]
        else:
            axes = self._shared(constant)
        if node is not None and node.op in ELEMENTWISE:
            axes = self._with_fills(constant, axes)
        self.result.uses[constant.name].append(Use(node, slot, axes))
        return axes

    def _with_fills(self, constant: gs.Constant, axes: Axes) -> Axes:
        """Let axes along which a stored mask repeats itself be fills of this use, as those of a generated one are."""
        if constant.name not in self.repeated:
            self.repeated[constant.name] = repeated_axes(weight_of(constant))
        axes = list(axes)
        for i in self.repeated[constant.name]:
            axes[i] = Axis(axes[i].size)
            axes[i].fill = True
        return axes

    def _constant_values(self, constant: gs.Constant) -> Values | None:
        known = self.result.values
        if constant.name not in known:
            weight = weight_of(constant)
            count = int(np.prod(weight.shape))
            small = count <= (16 if holds_weights(weight.onnx_dtype) else MAX_CONSTANT)
            value = weight.load() if small and weight.dtype.kind in "iubf" else None
            known[constant.name] = None if value is None else (value, value)
        return known[constant.name]

    # nodes ------------------------------------------------------------------------------------------------------

    def _sweep(self, nodes: Iterable[gs.Node], live: set[int] | None) -> None:
        for node in nodes:
            self._visit(node, live is None or id(node) in live)

    def _visit(self, node: gs.Node, constrains: bool) -> None:
        op = Op(node, self.opsets.get("" if node.domain in ("", "ai.onnx", None) else node.domain, 1))
        for slot, tensor in enumerate(node.inputs):
            if tensor.is_empty():
                axes = value = None
            elif isinstance(tensor, gs.Constant):
                axes, value = self._constant_axes(tensor, node, slot), self._constant_values(tensor)
            else:
                axes, value = self.result.types.get(tensor.name), self.result.values.get(tensor.name)
            op.axes.append(axes)
            op.values.append(value)
        self.equations.why = op.where
        op.output_values = evaluate(op)
        if op.output_values is not None:
            self.result.values[node.outputs[0].name] = op.output_values
            for number, tensor in enumerate(node.outputs[1:], 1):
                self.result.values[tensor.name] = evaluate(op, number)
        if self._is_arithmetic(op):
            return self._arithmetic(op, constrains)
        if op.type == "If" and not op.domain:
            return self._branch(op)
        rule = find_rule(op.domain, op.type)
        missing = any(op.has(slot) and axes is None for slot, axes in enumerate(op.axes))
        typing = rule.read(op) if rule and not missing else None
        if typing is None:
            return self._unknown(op, rule is None)
        if not constrains:
            op.axes = [None if axes is None else [Axis(axis.size) for axis in axes] for axes in op.axes]
            self.result.shape_only.add(id(node))
        self._apply(op, typing, constrains)

    def _is_arithmetic(self, op: Op) -> bool:
        if op.output_values is None or op.output_values[0].ndim > 1 or (op.output_count > 1 and op.type != "Split"):
            return False
        if op.type in ("Shape", "Size"):
            return True
        if op.type in ("Range", "ConstantOfShape"):
            return False
        for tensor in op.node.inputs:
            if isinstance(tensor, gs.Constant):
                if len(weight_of(tensor).shape) > 1:
                    return False
            elif not tensor.is_empty() and tensor.name not in self.arithmetic:
                return False
        return True

    def _arithmetic(self, op: Op, constrains: bool) -> None:
        """Shape arithmetic constrains nothing; what Shape reports is kept by surgery."""
        for tensor in op.node.outputs:
            self.arithmetic.add(tensor.name)
            sizes = zip(*(value.shape for value in self.result.values[tensor.name]))
            self.result.types[tensor.name] = [Axis(tuple(size), lock=op.where) for size in sizes]
        if op.type in ("Shape", "Size"):
            axes = op.axes[0]
            if op.type == "Shape":
                axes = axes[op.attribute("start", 0) : op.attribute("end", None)]
            site = Site(op, 0, op.type.lower(), tuple(axes), reported=op.output_values)
            self.result.sites.append(site)

    def _unknown(self, op: Op, no_rule: bool) -> None:
        """Lock what a node touches that no rule explains, its subgraphs' tensors too."""
        where = op.where
        if no_rule:
            self.result.unknown.append(where)
        reason = f"no axis rule for {where}" if no_rule else f"{where} has sizes that depend on data"
        reason = next((self.lost[tensor.name] for tensor in op.node.inputs if tensor.name in self.lost), reason)
        inner = [t for graph in _subgraphs(op.node) for t in _used_tensors(graph)]
        for tensor in [*op.node.inputs, *inner]:
            for axis in self.result.types.get(tensor.name) or ():
                lock(axis, reason)
        for use_axes in op.axes:
            for axis in use_axes or ():
                lock(axis, reason)
        for tensor in op.node.outputs:
            self._compare(op)
            axes = None
            if tensor.name and tensor.shape is not None:
                axes = [Axis(self._size(s, f"{tensor.name}.{i}"), lock=reason) for i, s in enumerate(tensor.shape)]
            elif tensor.name:
                self.lost[tensor.name] = reason
            self.result.types[tensor.name] = axes
        self.result.nodes.append(TypedNode(op, "", {}, [self.result.types[t.name] for t in op.node.outputs]))

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
                sides.append(self._constant_axes(out, None, 0) if is_constant else self.result.types.get(out.name))
            self.result.types[tensor.name] = self._merge(op, *sides)
        self.result.nodes.append(TypedNode(op, "", {}, [self.result.types[t.name] for t in op.node.outputs]))

    def _merge(self, op: Op, first: Axes | None, second: Axes | None) -> Axes | None:
        if first is None or second is None or len(first) != len(second):
            for axis in [*(first or ()), *(second or ())]:
                lock(axis, f"the branches of {op.where} differ in rank")
            return None
        merged = []
        for a, b in zip(first, second):
            if a.size != b.size and not any(_is_cuttable(leaf) for axis in (a, b) for leaf in leaves(axis)):
                merged.append(Axis(a.size if len(set(a.size)) > 1 else b.size))
                continue
            self.equations.equate(a, b)
            merged.append(a)
        return merged

    # one rule ---------------------------------------------------------------------------------------------------

    def _apply(self, op: Op, typing: Typing, constrains: bool) -> None:
        signature = parse(typing.text)
        sizes = {name: size if len(size) > 1 else size * 2 for name, size in typing.sizes.items()}
        bound: dict[str, Axis] = {}
        spread: list[Sequence[Axis]] = []
        groups: list[tuple[Pattern, Axis]] = []
        for slot, (patterns, axes) in enumerate(zip(signature.inputs, op.axes)):
            if axes is not None:
                self._bind_tensor(op, patterns, axes, bound, spread, groups)
                if patterns and patterns[0].kind == "any" and op.is_constant(slot) and len(axes) == 1:
                    lock(axes[0], f"{op.where} reads it whole")
        for name in _statistics(typing.text):
            for leaf in leaves(bound[name]) if name in bound else ():
                leaf.fill = False  # a statistic depends on how often its entries repeat
        lead = self._broadcast(spread)
        for pattern, axis in self._solvable_first(groups, bound, sizes):
            built = self._build(pattern, bound, sizes, axis.size)
            if built is None:
                lock(axis, f"{op.where} groups it")
            else:
                self.equations.equate(built, axis)
        for name in typing.fills:
            self._name(name, bound, sizes).fill = True
        for name in typing.fixed:
            if name in bound or name in sizes:
                lock(self._name(name, bound, sizes), f"{op.where} fixes it")
        outputs: list[Axes | None] = []
        for patterns, tensor in zip(signature.outputs, op.node.outputs):
            axes = self._output(patterns, lead, bound, sizes)
            outputs.append(axes)
            if tensor.name:
                self.result.types[tensor.name] = axes
        for tensor in op.node.outputs[len(signature.outputs) :]:
            self.result.types[tensor.name] = None
        self._follow_values(op, typing, bound)
        for name, least in typing.minimum.items():
            self.result.minimum.append((bound[name], least, op.where))
        for store in typing.stores:
            self._site(op, store, bound, sizes)
        self.result.nodes.append(TypedNode(op, typing.text, bound, outputs, constrains))

    def _bind_tensor(self, op, patterns, axes, bound, spread, groups) -> None:
        if patterns and patterns[0].kind == "any":
            return
        if len(patterns) == 1 and patterns[0].kind == "fixed":
            patterns = patterns * len(axes)
        where = next((i for i, pattern in enumerate(patterns) if pattern.kind == "broadcast"), None)
        if where is not None:
            count = len(axes) - len(patterns) + 1
            if count >= 0:
                spread.append(axes[where : where + count])
                axes = axes[:where] + axes[where + count :]
                patterns = patterns[:where] + patterns[where + 1 :]
        if len(axes) != len(patterns):
            for axis in axes:
                lock(axis, f"{op.where} has an input of unexpected rank {len(axes)}")
            return
        for pattern, axis in zip(patterns, axes):
            if pattern.optional and is_unit(axis):
                continue
            if pattern.kind == "name":
                known = bound.setdefault(pattern.name, axis)
                if known is not axis:
                    self.equations.equate(known, axis)
            elif pattern.kind == "fixed":
                lock(axis, f"{op.where} fixes it")
            elif pattern.kind == "unit":
                if not is_unit(axis):
                    lock(axis, f"{op.where} expects size one")
            else:
                groups.append((pattern, axis))

    def _broadcast(self, spread: list[Sequence[Axis]]) -> Axes:
        if len(spread) == 1:
            return list(spread[0])
        rank = max((len(axes) for axes in spread), default=0)
        result: Axes = []
        for position in range(-rank, 0):
            chosen = None
            for axes in spread:
                if len(axes) < -position:
                    continue
                axis = axes[position]
                if chosen is None or is_unit(chosen):
                    chosen = axis
                elif is_fill(chosen) != is_fill(axis) and is_static(axis):
                    fill, real = (chosen, axis) if is_fill(chosen) else (axis, chosen)
                    if not is_unit(real):
                        self.result.fills.append((fill, real))
                        chosen = real
                elif not is_unit(axis):
                    self.equations.equate(chosen, axis)
            result.append(chosen)
        return result

    def _solvable_first(self, groups, bound, sizes):
        """Yield groups whose names are known but for one before those that learn from them."""
        waiting = list(groups)
        while waiting:
            ready = [g for g in waiting if len(_names(g[0]) - bound.keys() - sizes.keys()) <= 1]
            batch = ready or waiting
            for group in batch:
                yield group
            waiting = [g for g in waiting if not any(g is done for done in batch)]

    def _name(self, name: str, bound: dict[str, Axis], sizes: dict[str, Size]) -> Axis:
        if name not in bound:
            bound[name] = Axis(sizes[name])
        return bound[name]

    def _build(self, pattern: Pattern, bound, sizes, size: Size | None = None) -> Axis | None:
        """Return the axis a pattern stands for, making atoms for new names; `size` settles one unknown name."""
        if pattern.kind == "name":
            if pattern.name not in bound:
                known = sizes.get(pattern.name, size)
                if known is None or (size is not None and known != size):
                    return None
                bound[pattern.name] = Axis(known)
            return bound[pattern.name]
        if pattern.kind in ("unit", "fixed"):
            return Axis((1, 1))
        known = [self._build(part, bound, sizes) if self._is_known(part, bound, sizes) else None for part in pattern.parts]
        if None in known:
            missing = known.index(None)
            rest = [axis.size for axis in known if axis is not None]
            if size is None or known.count(None) > 1:
                return None
            if pattern.kind == "product":
                left = divide(size, multiply(rest)) if rest else size
            else:
                left = tuple(a - sum(column) for a, column in zip(size, zip(*rest))) if rest else size
            if left is None or min(left) < 0:
                return None
            known[missing] = self._build(pattern.parts[missing], bound, sizes, left)
            if known[missing] is None:
                return None
        for part in known:
            for leaf in leaves(part):
                leaf.fill = False  # where other entries lie beside or inside them, entries cannot become one
        whole = product(known) if pattern.kind == "product" else total(known)
        return None if size is not None and whole.size != size else whole

    def _is_known(self, pattern: Pattern, bound, sizes) -> bool:
        return all(name in bound or name in sizes for name in _names(pattern))

    def _output(self, patterns, lead: Axes, bound, sizes) -> Axes | None:
        axes: Axes = []
        for pattern in patterns:
            if pattern.kind == "any":
                return None
            if pattern.kind == "broadcast":
                axes += lead
                continue
            axis = self._build(pattern, bound, sizes)
            if axis is None:
                return None
            axes.append(axis)
        return axes

    def _site(self, op: Op, store: Store, bound, sizes) -> None:
        axes = tuple(self._listed(p, bound, sizes) for p in parse_axes(store.pattern)) if store.pattern else ()
        whole = tuple(self._listed(p, bound, sizes) for p in parse_axes(store.whole)) if store.whole else ()
        self.result.sites.append(Site(op, store.slot, store.kind, axes, whole, store.value))

    def _listed(self, pattern: Pattern, bound, sizes) -> Axis | None:
        if pattern.kind == "name" and pattern.name == "0":
            return Axis((0, 0))
        return None if pattern.kind == "fixed" else self._build(pattern, bound, sizes)

    # values of integer tensors ----------------------------------------------------------------------------------

    def _follow_values(self, op: Op, typing: Typing, bound: dict[str, Axis]) -> None:
        """Track which axis the values of integer tensors are positions on."""
        for slot, name in typing.indexes.items():
            self._index(op, op.node.inputs[slot].name, bound[name])
        for output, name in typing.yields.items():
            if op.wants(output):
                self.positions[op.node.outputs[output].name] = bound[name]
        if not op.domain and self.wrapped.follow(op):
            return
        output = op.node.outputs[0].name
        first = op.node.inputs[0].name if op.node.inputs else ""
        if typing.moves and op.has(0):
            if first in self.origin:
                self.origin[output] = self.origin[first]
            if first in self.positions:
                self.positions[output] = self.positions[first]
            return
        self._compare(op, skip=set(typing.indexes))

    def _compare(self, op: Op, skip: set[int] = frozenset()) -> None:
        for slot, tensor in enumerate(op.node.inputs):
            if slot in skip or tensor.is_empty():
                continue
            if tensor.name in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor.name], op.where)
            if tensor.name in self.origin:
                self.compared.setdefault(self.origin[tensor.name], op.where)
                if op.type == "Conv" and slot == 0:
                    self._lock_input(self.origin[tensor.name])
            if tensor.name in self.positions:
                lock(self.positions[tensor.name], f"{op.where} computes with positions on it")

    def _lock_input(self, name: str) -> None:
        """What a convolution reads directly is an image or a wave: its channels are the data's."""
        for i, axis in enumerate(self.result.types[name]):
            lock(axis, f"axis {i} of graph input '{name}'")

    def _index(self, op: Op, tensor: str, axis: Axis) -> None:
        if tensor in self.positions:
            self.equations.equate(self.positions[tensor], axis)
        elif tensor in self.origin:
            if self.wrapped.limits.get(self.origin[tensor], axis.size[0]) < axis.size[0] - 1:
                self.compared.setdefault(self.origin[tensor], f"a clip before {op.where}")
            known = self.result.index_axes.setdefault(self.origin[tensor], axis)
            if known is not axis:
                self.equations.equate(known, axis)
        else:
            if tensor in self.wrapped.shifted:
                self.compared.setdefault(self.wrapped.shifted[tensor], op.where)
            lock(axis, f"{op.where} picks by computed positions")


INDEXING = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterElements": 1, "ScatterND": 1}


def _lock_ranges(typing: AxisTyping) -> None:
    """Forbid cutting counts whose numbers pick positions: a cut would leave numbers of the old positions."""
    by_output = {t.name: node for node in typing.nodes for t in node.op.node.outputs}
    seen: set[int] = set()
    for node in typing.nodes:
        slot = INDEXING.get(node.op.type)
        if slot is None or slot >= len(node.op.node.inputs):
            continue
        waiting = [node.op.node.inputs[slot].name]
        while waiting:
            producer = by_output.get(waiting.pop())
            if producer is None or id(producer) in seen:
                continue
            seen.add(id(producer))
            if producer.op.type == "Range":
                for axis in producer.outputs[0] or ():
                    lock(axis, f"{node.op.where} picks by numbers counted along it")
            waiting += [t.name for t in producer.op.node.inputs if not _is_float(t)]


def _names(pattern: Pattern) -> set[str]:
    if pattern.kind == "name":
        return {pattern.name}
    return {name for part in pattern.parts for name in _names(part)}


@functools.cache
def _statistics(text: str) -> frozenset[str]:
    """Return the names of what a signature takes statistics over."""

    def within(pattern: Pattern) -> set[str]:
        if pattern.statistic:
            return _names(pattern)
        return {name for part in pattern.parts for name in within(part)}

    return frozenset(name for patterns in parse(text).inputs for pattern in patterns for name in within(pattern))


def _is_cuttable(leaf: Axis) -> bool:
    return leaf.size[0] > 1 and len(set(leaf.size)) == 1 and leaf.lock is None


def _is_float(tensor: gs.Tensor) -> bool:
    if tensor.dtype is None:
        return False
    try:
        return np.dtype(tensor.dtype).kind == "f"
    except TypeError:
        return True  # dtypes numpy lacks are the small floats


def _subgraphs(node: gs.Node) -> list[gs.Graph]:
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def _used_tensors(graph: gs.Graph) -> Iterable[gs.Tensor]:
    for node in graph.nodes:
        yield from node.inputs
        for inner in _subgraphs(node):
            yield from _used_tensors(inner)
    yield from graph.outputs


def _data_live(graph: gs.Graph) -> set[int]:
    """Return the ids of nodes whose values reach an output, not only their shapes."""
    live: set[int] = set()
    waiting: list[gs.Tensor] = list(graph.outputs)
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) in live:
                continue
            live.add(id(node))
            if node.op not in ("Shape", "Size"):
                waiting.extend(node.inputs)
                for inner in _subgraphs(node):
                    waiting.extend(_used_tensors(inner))
    return live


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def _evaluate_symbol(text: str, known: dict[str, int]) -> int | None:
    """Evaluate a size written as a sum or product of symbols, as in `past_length + 1`; None where it is not one."""

    def value(tree) -> int:
        if isinstance(tree, ast.BinOp):
            return _OPERATORS[type(tree.op)](value(tree.left), value(tree.right))
        if isinstance(tree, ast.Constant):
            return int(tree.value)
        return known[tree.id]

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, ValueError, TypeError):
        return None
