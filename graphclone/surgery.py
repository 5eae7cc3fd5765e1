"""Apply a plan: the only code that changes a graph or a weight.

Weights are sliced by the index vectors of their axes. Stored sizes follow "freeze the sources, fix the sinks": what
`Shape` reports of a cut tensor keeps the old sizes, so all shape arithmetic keeps its values, and every slot that
consumes a size gets the one its axes require. Dropped blocks are bypassed; then what died is removed.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import Axis, find
from graphclone.axes.contractions import contracting_node
from graphclone.axes.typed import Site, Use
from graphclone.bypass import bypass, exchange_input
from graphclone.errors import CutError
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.native import check_tables, nodes_in_pairs, use_native_constants
from graphclone.plan import Cut, Plan, resolve
from graphclone.weights import Weight, weight_of

CLAMPED = 1 << 30


def apply(model: Model, plan: Plan, analysis: Analysis | None = None, native_constants: bool = False) -> Model:
    """Return the child a plan describes; the parent stays as it is, and no weight is read.

    analysis: of the model, where it is at hand. native_constants: scalars that depend on a size become what the
    framework's own smaller class computes, and neighbouring weights take the ratio (some are read for that).
    Raises: CutError for what the plan asks and the graph does not admit.

    Example:
        child = apply(parent, Plan(keep={"hidden": range(0, 768, 2)}, blocks={"": (0, 5, 11)}))
    """
    analysis = analysis or analyse(model)
    cut = resolve(plan, analysis)
    child = carry_out(cut, model, analysis, plan, native_constants=native_constants)
    if plan.parent or cut.indices or plan.blocks or plan.drop or plan.scale or plan.replace or plan.bias or plan.untie:
        child.metadata["graphclone.plan"] = json.dumps(_summary(plan, analysis), sort_keys=True)
        child.metadata["graphclone.parent"] = model.fingerprint
    return child


def carry_out(
    cut: Cut,
    model: Model,
    analysis: Analysis,
    plan: Plan = Plan(),  # noqa: B008
    onto: Model | None = None,
    native_constants: bool = False,
    renumber: bool = True,
) -> Model:
    """Return what a cut makes of a model.

    plan: its scales and replacements. onto: a copy of the model with other weights, which is cut in its place.
    native_constants: as in `apply`. renumber: whether kept blocks are numbered anew in names.
    """
    return carry_out_traced(cut, model, analysis, plan, onto, native_constants, renumber)[0]


def carry_out_traced(
    cut: Cut,
    model: Model,
    analysis: Analysis,
    plan: Plan = Plan(),  # noqa: B008
    onto: Model | None = None,
    native_constants: bool = False,
    renumber: bool = True,
    stored_tables: Sequence[str] = (),
) -> tuple[Model, dict[int, gs.Node]]:
    """Return the child, and {id of the model's node: the child's node}; a dropped node has no inputs.

    stored_tables: initializers that look like computed tables and are weights of a checkpoint. The rest: `carry_out`.
    """
    if native_constants:
        check_tables(analysis.typing, cut, stored_tables)
    child = (onto or model).copy()
    surgeon = _Surgeon(model, child, analysis, cut)
    surgeon.edit_weights(plan)
    surgeon.add_biases(plan)
    surgeon.edit_sites()
    surgeon.edit_shapes()
    bypass(child, analysis, cut, renumber)
    if native_constants:
        use_native_constants(child, nodes_in_pairs(analysis.typing, surgeon.nodes))
    return child, surgeon.nodes


def _summary(plan: Plan, analysis: Analysis) -> dict:
    """Return what a slim model says of how it was made: the sizes kept, the blocks, the parent's names of them."""
    kept = {name: len(indices) for name, indices in plan.keep.items()}
    return {"keep": kept, "blocks": {name: list(v) for name, v in plan.blocks.items()}, "drop": list(plan.drop)}


class _Surgeon:
    def __init__(self, parent: Model, child: Model, analysis: Analysis, cut: Cut):
        self.child = child
        self.typing = analysis.typing
        self.cut = cut
        self.nodes: dict[int, gs.Node] = {}
        self.graphs: dict[int, gs.Graph] = {}
        for old, new in zip(walk(parent.graph), walk(child.graph)):
            for a, b in zip(old.nodes, new.nodes):
                self.nodes[id(a)] = b
                self.graphs[id(a)] = new
        self.names = {t.name for graph in walk(child.graph) for node in graph.nodes for t in (*node.inputs, *node.outputs)}
        self.inserted: dict[int, list[gs.Node]] = defaultdict(list)  # id of a child's node -> nodes to place before it
        self.after: dict[int, list[gs.Node]] = defaultdict(list)

    # weights ----------------------------------------------------------------------------------------------------

    def edit_weights(self, plan: Plan) -> None:
        known = {*self.typing.uses, *plan.untie.values()}
        for name in (*plan.scale, *plan.replace, *plan.bias, *plan.untie):
            if name not in known:
                raise CutError(f"the plan changes an initializer '{name}' that the graph does not have")
        for name, own in plan.untie.items():
            if own != name and own in self.typing.uses:
                raise CutError(f"the plan unties '{name}' as '{own}', which is another initializer of the graph")
        for name, uses in self.typing.uses.items():
            for own, mine in _owners(name, uses, plan.untie):
                groups: dict[tuple, list] = defaultdict(list)
                for use in mine:
                    picks = tuple(self._picks(axis) for axis in use.axes)
                    key = tuple(None if pick is None else pick.tobytes() for pick in picks)
                    groups[key].append((use, picks))
                changed = own in plan.scale or own in plan.replace or own != name
                if len(groups) == 1 and not changed and not any(next(iter(groups))):
                    continue
                self._split_uses(name, own, groups, plan)

    def _picks(self, axis: Axis) -> np.ndarray | None:
        """Return what stays of a weight's axis; of one along which the weight repeats itself, the first entry."""
        return np.zeros(1, np.int64) if id(find(axis)) in self.cut.shrunk else self.cut.picks(axis)

    def _split_uses(self, name: str, own: str, groups: Mapping[tuple, list], plan: Plan) -> None:
        """Give each group of uses that is cut alike its own constant; the first gets the name `own`."""
        for number, members in enumerate(groups.values()):
            first = members[0][0]
            weight = weight_of(self._constant_of(name, first))
            for axis, pick in enumerate(members[0][1]):
                if pick is not None:
                    weight = weight.take(axis, pick)
            if own in plan.replace:
                weight = self._replacement(own, plan.replace[own], weight)
            if own in plan.scale:
                weight = weight.scaled(plan.scale[own])
            new = gs.Constant(own if number == 0 else self._fresh(f"{own}_{number}"), weight)
            for use, _ in members:
                self._put(name, use, new)

    def _replacement(self, name: str, value: np.ndarray, weight: Weight) -> Weight:
        if tuple(value.shape) != tuple(weight.shape):
            raise CutError(f"the plan replaces '{name}' by shape {value.shape}; after the cut it has {weight.shape}")
        return Weight.of(np.asarray(value).astype(weight.dtype))

    def _constant_of(self, name: str, use) -> gs.Constant:
        if use.node is None:
            return next(t for graph in walk(self.child.graph) for t in graph.outputs if _is_constant(t, name))
        return self.nodes[id(use.node)].inputs[use.slot]

    def _put(self, name: str, use, constant: gs.Constant) -> None:
        if use.node is not None:
            self.nodes[id(use.node)].inputs[use.slot] = constant
            return
        for graph in walk(self.child.graph):
            graph.outputs[:] = [constant if _is_constant(t, name) else t for t in graph.outputs]

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def add_biases(self, plan: Plan) -> None:
        """Add the plan's biases behind the operators that multiply with a weight and have none."""
        for name, value in plan.bias.items():
            uses = self.typing.uses.get(name, ())
            reader = contracting_node(uses[0].node) if len(uses) == 1 else None
            if reader is None:
                raise CutError(f"the plan adds a bias behind '{name}', which not one operator alone multiplies with")
            node, window = self.nodes[id(reader)], reader.op == "Conv"
            size = self.cut.size(self.typing.types[reader.outputs[0].name][1 if window else -1])[0]
            if np.shape(value) != (size,):
                raise CutError(f"the plan's bias for '{name}' has shape {np.shape(value)}; the child needs ({size},)")
            dtype = weight_of(self._constant_of(name, uses[0])).dtype
            bias = gs.Constant(self._fresh(bias_name(name)), Weight.of(np.asarray(value).astype(dtype)))
            if window and len(node.inputs) == 2:
                node.inputs.append(bias)
                continue
            output = node.outputs[0]
            bare = gs.Variable(self._fresh(f"{output.name}_bare"), output.dtype)
            node.outputs[0] = bare
            self.after[id(node)].append(gs.Node("Add", self._fresh(f"{node.name}_bias"), {}, [bare, bias], [output]))

    # stored sizes -----------------------------------------------------------------------------------------------

    def edit_sites(self) -> None:
        for site in self.typing.sites:
            if site.kind not in ("shape", "size"):
                getattr(self, f"_{site.kind}")(site, self.nodes[id(site.op.node)])
        for site in self.typing.sites:
            if site.kind in ("shape", "size"):
                getattr(self, f"_{site.kind}")(site, self.nodes[id(site.op.node)])
        if self.inserted or self.after:
            for graph in walk(self.child.graph):
                graph.nodes[:] = [placed for node in graph.nodes for placed in self._placed(node)]

    def _placed(self, node: gs.Node) -> list[gs.Node]:
        """Return a node with what edits put before and behind it, theirs included."""
        before = [placed for other in self.inserted.get(id(node), ()) for placed in self._placed(other)]
        return [*before, node, *self.after.get(id(node), ())]

    def _new(self, axis: Axis | None, old):
        return old if axis is None else self.cut.size(axis)

    def _stored(self, site: Site) -> list[tuple[int, ...]] | None:
        """Return what the slot holds, an entry per axis and a value per probe."""
        if isinstance(site.slot, str):
            value = site.op.attribute(site.slot)
            return None if value is None else [(int(v), int(v)) for v in np.atleast_1d(value)]
        value = site.op.value(site.slot)
        return None if value is None else list(zip(*([int(v) for v in np.ravel(probe)] for probe in value)))

    def _sizes(self, site: Site, node: gs.Node) -> None:
        stored = self._stored(site)
        if stored is None:
            return
        wanted = []
        for i, (value, axis) in enumerate(zip(stored, site.axes)):
            if axis is None or value != find(axis).size:
                copied = value == (0, 0) and site.op.type == "Reshape" and axis is not None
                if copied and i < len(site.op.axes[0]) and self._new(site.op.axes[0][i], 0) != self._new(axis, 0):
                    value = self._new(axis, value)
                wanted.append(value)
            else:
                wanted.append(self._new(axis, value))
        self._write(site, node, stored, wanted)

    def _begin(self, site: Site, node: gs.Node) -> None:
        stored = self._stored(site)
        wanted = [self._bound(*entry) for entry in zip(stored, site.axes, site.whole)]
        self._write(site, node, stored, wanted)

    _end = _begin

    def _bound(self, value, axis: Axis | None, whole: Axis | None):
        """Return the new value of a slice's bound: kept where it still means the required position."""
        if axis is None or whole is None:
            return value
        required, total = self.cut.size(axis), self.cut.size(whole)
        meant = tuple(min(max(v + t if v < 0 else v, 0), t) for v, t in zip(value, total))
        if meant == required:
            return value
        return tuple(r - t if v < 0 and r < t else r for v, r, t in zip(value, required, total))

    def _range(self, site: Site, node: gs.Node) -> None:
        begin, count = (self.cut.size(axis)[0] for axis in site.axes)
        total = self.cut.size(site.whole[0])[0]
        old = np.asarray(site.op.value(site.slot)[0])
        flat = old.reshape(-1)
        meant = np.where(flat < 0, flat + total, flat)
        if np.array_equal(meant, np.arange(begin, begin + count)):
            return
        new = np.arange(begin, begin + count, dtype=old.dtype)
        node.inputs[site.slot] = self._constant(node, site.slot, new.reshape(old.shape if old.size == count else (count,)))

    def _stride(self, site: Site, node: gs.Node) -> None:
        total, step = self.cut.size(site.axes[0])[0], int(site.value)
        old = np.asarray(site.op.value(site.slot)[0])
        new = np.arange(int(old[0]), total, step, dtype=old.dtype)
        if not np.array_equal(new, old):
            node.inputs[site.slot] = self._constant(node, site.slot, new)

    def _regroup(self, site: Site, node: gs.Node) -> None:
        """Write the Reshape that a Gather of every entry in order means: its indices are of the old sizes."""
        sizes = [self.cut.size(axis) for axis in site.axes]
        if sizes == [find(axis).size for axis in site.axes]:
            return
        target = [size[0] if len(set(size)) == 1 else -1 for size in sizes]
        node.op = "Reshape"
        node.attrs.clear()
        node.inputs[1] = self._constant(node, 1, np.array(target, np.int64))

    def _split(self, site: Site, node: gs.Node) -> None:
        sizes = [self.cut.size(axis)[0] for axis in site.axes]
        if sizes == [find(axis).size[0] for axis in site.axes]:
            return
        if isinstance(site.slot, str):
            node.attrs["split"] = sizes
            return
        listed = site.op.has(1)
        if not listed and len(set(sizes)) == 1:
            return
        node.attrs.pop("num_outputs", None)
        constant = self._constant(node, 1, np.array(sizes, np.int64))
        if len(node.inputs) > 1:
            node.inputs[1] = constant
        else:
            node.inputs.append(constant)

    def _select(self, site: Site, node: gs.Node) -> None:
        picks = self.cut.picks(site.axes[0])
        if picks is None:
            return
        output = node.outputs[0]
        whole = gs.Variable(self._fresh(f"{output.name}_whole"), output.dtype)
        node.outputs[0] = whole
        indices = self._constant(node, 1, np.asarray(picks, np.int64))
        name = self._fresh(f"{node.name}_kept")
        self.after[id(node)].append(gs.Node("Gather", name, {"axis": 0}, [whole, indices], [output]))

    def _scale(self, site: Site, node: gs.Node) -> None:
        given = node.attrs.get("scale")
        if given in (None, 0.0) and self.cut.size(site.axes[0]) != find(site.axes[0]).size:
            node.attrs["scale"] = float(site.value)

    def _denominator(self, site: Site, node: gs.Node, less: int = 0) -> None:
        """Let a statistic's divisor or multiplier, (size - less) ** power, follow the size of the statistic's axes."""
        old = math.prod(find(axis).size[0] for axis in site.axes) - less
        new = math.prod(self.cut.size(axis)[0] for axis in site.axes) - less
        if old == new:
            return
        tensor = node.inputs[site.slot]
        if site.op.is_constant(site.slot):
            value = weight_of(tensor).load()
            node.inputs[site.slot] = self._constant(node, site.slot, np.full_like(value, float(new) ** site.value))
            return
        known = site.op.value(site.slot)
        dtype = known[0].dtype
        if np.array_equal(known[0], known[-1]):
            node.inputs[site.slot] = self._constant(node, site.slot, np.full_like(known[0], float(new) ** site.value))
            return
        scaled = gs.Variable(self._fresh(f"{tensor.name}_rescaled"), tensor.dtype)
        if dtype.kind == "f":
            factor = self._constant(node, site.slot, np.asarray((new / old) ** site.value, dtype))
            step = gs.Node("Mul", self._fresh(f"{node.name}_ratio"), {}, [tensor, factor], [scaled])
            self.inserted[id(node)].append(step)
        else:
            scaled = self._rescaled(node, tensor, [((new,), (old,))], np.shape(known[0]))
        node.inputs[site.slot] = scaled

    def _denominator_less_one(self, site: Site, node: gs.Node) -> None:
        self._denominator(site, node, less=1)

    def _constant(self, node: gs.Node, slot, values: np.ndarray) -> gs.Constant:
        return gs.Constant(self._fresh(f"{node.name}_{slot}"), Weight.of(np.asarray(values, order="C")))

    # vectors of sizes -------------------------------------------------------------------------------------------

    def _write(self, site: Site, node: gs.Node, stored: list, wanted: list) -> None:
        if stored == wanted:
            return
        if isinstance(site.slot, str):
            new = [w[0] for w in wanted]
            node.attrs[site.slot] = new if isinstance(node.attrs[site.slot], (list, tuple)) else new[0]
            return
        shape = np.shape(site.op.value(site.slot)[0])
        node.inputs[site.slot] = self._patched(node, node.inputs[site.slot], stored, wanted, shape, site.slot)

    def _patched(self, node: gs.Node, tensor: gs.Tensor, stored, wanted, shape, slot) -> gs.Tensor:
        """Return a tensor that holds `wanted` where this one holds `stored`: a constant, or new entries of a Concat."""
        if stored == wanted:
            return tensor
        if all(len(set(entry)) == 1 for entry in (*stored, *wanted)):
            dtype = weight_of(tensor).dtype if isinstance(tensor, gs.Constant) else np.int64
            return self._constant(node, slot, np.array([w[0] for w in wanted], dtype).reshape(shape))
        producer = tensor.inputs[0]
        if producer.op == "Concat":
            return self._patched_concat(node, producer, stored, wanted)
        return self._rescaled(node, tensor, [(w, s) for w, s in zip(wanted, stored)], shape)

    def _patched_concat(self, node: gs.Node, producer: gs.Node, stored, wanted) -> gs.Tensor:
        """Copy the Concat with the changed entries exchanged, so that the rest stays computed."""
        parts, position = [], 0
        for i, part in enumerate(producer.inputs):
            count = self._length(part)
            here = slice(position, position + count)
            parts.append(self._patched(node, part, stored[here], wanted[here], (count,), f"{slot_name(producer)}{i}"))
            position += count
        output = gs.Variable(self._fresh(f"{producer.outputs[0].name}_cut"), np.int64)
        name = self._fresh(f"{producer.name}_cut")
        self.inserted[id(node)].append(gs.Node("Concat", name, dict(producer.attrs), parts, [output]))
        return output

    def _length(self, tensor: gs.Tensor) -> int:
        if isinstance(tensor, gs.Constant):
            return int(np.prod(weight_of(tensor).shape))
        return self.typing.types[tensor.name][0].size[0]

    def _rescaled(self, node: gs.Node, tensor: gs.Tensor, entries, shape) -> gs.Tensor:
        """Return tensor // d * m: exact, because dynamic sizes are never cut and static ones divide."""
        ratios = [_ratio(wanted, stored) for wanted, stored in entries]
        steps = (("Div", [r.denominator for r in ratios]), ("Mul", [r.numerator for r in ratios]))
        for op, factors in steps:
            if set(factors) == {1}:
                continue
            constant = self._constant(node, op.lower(), np.array(factors, np.int64).reshape(shape))
            output = gs.Variable(self._fresh(f"{tensor.name}_{op.lower()}"), np.int64)
            name = self._fresh(f"{node.name}_{op.lower()}")
            self.inserted[id(node)].append(gs.Node(op, name, {}, [tensor, constant], [output]))
            tensor = output
        return tensor

    # frozen sources ---------------------------------------------------------------------------------------------

    def _shape(self, site: Site, node: gs.Node) -> None:
        """Let every consumer of Shape see the old sizes; those that read unchanged entries stay as they are."""
        old = [find(axis).size for axis in site.axes]
        new = [self.cut.size(axis) for axis in site.axes]
        changed = {i for i, (a, b) in enumerate(zip(old, new)) if a != b}
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
                _replace_everywhere(consumer.outputs[0], self._constant(consumer, "frozen", value), self.child.graph)
                continue
            frozen = self._frozen(consumer, output, old, new)
            exchange_input(consumer, output, frozen)

    def _frozen(self, consumer: gs.Node, output: gs.Tensor, old, new) -> gs.Tensor:
        if all(len(set(entry)) == 1 for entry in old):
            return self._constant(consumer, "frozen", np.array([entry[0] for entry in old], np.int64))
        return self._rescaled(consumer, output, list(zip(old, new)), (len(old),))

    def _size(self, site: Site, node: gs.Node) -> None:
        old, new = [tuple(math.prod(c) for c in zip(*sizes)) for sizes in (
            [find(axis).size for axis in site.axes] or [(1, 1)], [self.cut.size(axis) for axis in site.axes] or [(1, 1)]
        )]  # fmt: skip
        if old == new:
            return
        for consumer in list(node.outputs[0].outputs):
            frozen = self._rescaled(consumer, node.outputs[0], [(old, new)], ())
            exchange_input(consumer, node.outputs[0], frozen)

    # declared shapes --------------------------------------------------------------------------------------------

    def edit_shapes(self) -> None:
        """Update the shapes that graph inputs, outputs and intermediate tensors declare."""
        for graph in walk(self.child.graph):
            tensors = [*graph.inputs, *graph.outputs, *(t for node in graph.nodes for t in node.outputs)]
            for tensor in tensors:
                axes = self.typing.types.get(tensor.name)
                if isinstance(tensor, gs.Constant) or tensor.shape is None or not axes or len(axes) != len(tensor.shape):
                    continue
                sizes = [self.cut.size(axis) for axis in axes]
                if any(new != find(axis).size for new, axis in zip(sizes, axes)):
                    tensor.shape = [
                        size[0] if isinstance(listed, int) and len(set(size)) == 1 else listed
                        for size, listed in zip(sizes, tensor.shape)
                    ]


def _owners(name: str, uses: Sequence[Use], untie: Mapping[str, str]) -> list[tuple[str, list[Use]]]:
    """Return the uses of an initializer by the name they read it under: products read a copy where it is untied."""
    own = untie.get(name, name)
    if own == name:
        return [(name, list(uses))]
    reading = [use for use in uses if contracting_node(use.node) is not None]
    return [(each, found) for each, found in ((name, [u for u in uses if u not in reading]), (own, reading)) if found]


def bias_name(weight: str) -> str:
    """Return what the bias of a weight is called that has none.

    Example:
        >>> bias_name("h.0.attn.q_proj.weight"), bias_name("MatMul_12")
        ('h.0.attn.q_proj.bias', 'MatMul_12_bias')
    """
    return f"{weight.removesuffix('weight')}bias" if weight.endswith(".weight") else f"{weight}_bias"


def _is_constant(tensor: gs.Tensor, name: str) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.name == name


def slot_name(node: gs.Node) -> str:
    return f"{node.op.lower()}_"


def _ratio(wanted: Sequence[int], stored: Sequence[int]) -> Fraction:
    return Fraction(wanted[0], stored[0]) if stored[0] else Fraction(1)


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


def _replace_everywhere(old: gs.Tensor, new: gs.Tensor, graph: gs.Graph) -> None:
    for consumer in list(old.outputs):
        exchange_input(consumer, old, new)
    for scope in walk(graph):
        scope.outputs[:] = [new if tensor is old else tensor for tensor in scope.outputs]
