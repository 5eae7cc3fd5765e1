"""Cut weights: each use of an initializer by the index vectors of its axes, with the plan's scales and values."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find
from graphclone.axes.contractions import contracting_node
from graphclone.axes.typed import Use
from graphclone.cut import Cut
from graphclone.errors import CutError
from graphclone.graphs import walk
from graphclone.plan import Plan
from graphclone.surgery.child import Child
from graphclone.weights import Weight, weight_of

Picks = tuple[np.ndarray | None, ...]


def edit_weights(child: Child, plan: Plan) -> None:
    """Cut, scale, replace and untie the child's weights. Raises: CutError for names the graph does not have."""
    all_uses = child.typing.uses
    known = {*all_uses, *plan.untie.values()}
    for name in (*plan.scale, *plan.replace, *plan.bias, *plan.untie):
        if name not in known:
            raise CutError(f"the plan changes an initializer '{name}' that the graph does not have")
    for name, own in plan.untie.items():
        if own != name and own in all_uses:
            raise CutError(f"the plan unties '{name}' as '{own}', which is another initializer of the graph")
    for name, uses in all_uses.items():
        for own, mine in _owners(name, uses, plan.untie):
            groups: dict[tuple, list[tuple[Use, Picks]]] = defaultdict(list)
            for use in mine:
                picks = tuple(_picks(child.cut, axis) for axis in use.axes)
                key = tuple(None if pick is None else pick.tobytes() for pick in picks)
                groups[key].append((use, picks))
            changed = own in plan.scale or own in plan.replace or own != name
            if len(groups) == 1 and not changed and not any(next(iter(groups))):
                continue
            _split_uses(child, name, own, groups.values(), plan)


def _owners(name: str, uses: Sequence[Use], untie: Mapping[str, str]) -> list[tuple[str, list[Use]]]:
    """Return the uses of an initializer by the name they read it under: products read a copy where it is untied."""
    own = untie.get(name, name)
    if own == name:
        return [(name, list(uses))]
    reading = [use for use in uses if contracting_node(use.node) is not None]
    return [(each, found) for each, found in ((name, [u for u in uses if u not in reading]), (own, reading)) if found]


def _picks(cut: Cut, axis: Axis) -> np.ndarray | None:
    """Return what stays of a weight's axis; of one along which the weight repeats itself, the first entry."""
    return np.zeros(1, np.int64) if id(find(axis)) in cut.shrunk else cut.picks(axis)


def _split_uses(child: Child, name: str, own: str, groups, plan: Plan) -> None:
    """Give each group of uses that is cut alike its own constant; the first gets the name `own`."""
    for number, members in enumerate(groups):
        first, picks = members[0]
        weight = weight_of(_constant_of(child, name, first))
        for axis, pick in enumerate(picks):
            if pick is not None:
                weight = weight.take(axis, pick)
        if own in plan.replace:
            weight = _replacement(own, plan.replace[own], weight)
        if own in plan.scale:
            weight = weight.scaled(plan.scale[own])
        new = gs.Constant(own if number == 0 else child.fresh(f"{own}_{number}"), weight)
        for use, _ in members:
            _put(child, name, use, new)


def _replacement(name: str, value: np.ndarray, weight: Weight) -> Weight:
    if tuple(value.shape) != tuple(weight.shape):
        raise CutError(f"the plan replaces '{name}' by shape {value.shape}; after the cut it has {weight.shape}")
    return Weight.of(np.asarray(value).astype(weight.dtype))


def _constant_of(child: Child, name: str, use: Use) -> gs.Constant:
    if use.node is None:
        return next(t for graph in walk(child.graph) for t in graph.outputs if _is_constant(t, name))
    return child.nodes[id(use.node)].inputs[use.slot]


def _put(child: Child, name: str, use: Use, constant: gs.Constant) -> None:
    if use.node is not None:
        child.nodes[id(use.node)].inputs[use.slot] = constant
        return
    for graph in walk(child.graph):
        graph.outputs[:] = [constant if _is_constant(t, name) else t for t in graph.outputs]


def _is_constant(tensor: gs.Tensor, name: str) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.name == name


def add_biases(child: Child, plan: Plan) -> None:
    """Add the plan's biases behind the operators that multiply with a weight and have none.

    Raises: CutError for a weight that more than one operator reads, and for a bias of another size than the child's.
    """
    for name, value in plan.bias.items():
        uses = child.typing.uses.get(name, ())
        reader = contracting_node(uses[0].node) if len(uses) == 1 else None
        if reader is None:
            raise CutError(f"the plan adds a bias behind '{name}', which not one operator alone multiplies with")
        node, window = child.nodes[id(reader)], reader.op == "Conv"
        size = child.cut.size(child.typing.types[reader.outputs[0].name][1 if window else -1])[0]
        if np.shape(value) != (size,):
            raise CutError(f"the plan's bias for '{name}' has shape {np.shape(value)}; the child needs ({size},)")
        dtype = weight_of(_constant_of(child, name, uses[0])).dtype
        bias = gs.Constant(child.fresh(bias_name(name)), Weight.of(np.asarray(value).astype(dtype)))
        if window and len(node.inputs) == 2:
            node.inputs.append(bias)
            continue
        output = node.outputs[0]
        bare = gs.Variable(child.fresh(f"{output.name}_bare"), output.dtype)
        node.outputs[0] = bare
        name = child.fresh_node(f"{node.name}_bias")
        child.behind[id(node)].append(gs.Node("Add", name, {}, [bare, bias], [output]))


def bias_name(weight: str) -> str:
    """Return what the bias of a weight is called that has none.

    Example:
        >>> bias_name("h.0.attn.q_proj.weight"), bias_name("MatMul_12")
        ('h.0.attn.q_proj.bias', 'MatMul_12_bias')
    """
    return f"{weight.removesuffix('weight')}bias" if weight.endswith(".weight") else f"{weight}_bias"
