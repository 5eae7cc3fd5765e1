"""The axes around an attention, with their roles: heads (grouped or not), head_dim, v_head_dim."""

from collections.abc import Sequence

from graphclone.axes.axis import Axis, find, is_static, is_unit, leaves
from graphclone.axes.contractions import Contraction
from graphclone.axes.typed import TypedNode
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.places import Contractions
from graphclone.dimensions.widths import outer_parts, static_parts
from graphclone.flow import ATTENTION_OPS

Roles = list[tuple[str, Axis]]


def attention_axes(
    index: int, within: Sequence[int], nodes: Sequence[TypedNode], contractions: Contractions, carriers: Carriers
) -> Roles:
    """Return the roles of the axes around one attention.

    index: of the node that mixes values by scores, or of an attention operator. within: the nodes of its half block.
    """
    node = nodes[index]
    if node.op.type in ATTENTION_OPS:
        return _fused_axes(node)
    mix = contractions[index]
    scores = _scores_before(index, within, nodes, contractions)
    heads = carriers.carried(static_parts(mix.shared))
    if scores is not None:
        heads = carriers.carried(static_parts(scores.shared)) or heads
    roles = _head_roles(heads)
    inner = [axis for axis in (scores.contracted if scores else ()) if is_static(axis)]
    roles += [("head_dim", axis) for axis in inner[:1]]
    contracted = {id(find(axis)) for axis in mix.contracted}
    value = [
        axis
        for axis in node.outputs[0] or ()
        if is_static(axis) and not is_unit(axis) and id(find(axis)) not in contracted
    ]
    known = {id(leaf) for axis in heads for leaf in leaves(axis)} | {id(find(axis)) for axis in inner}
    known |= {id(leaf) for axis in inner for leaf in leaves(axis)}
    values = [axis for axis in value if id(find(axis)) not in known and not {id(x) for x in leaves(axis)} <= known]
    role = "v_head_dim" if inner else "head_dim"
    return roles + [(role, axis) for axis in values[-1:]]


def _head_roles(heads: list[Axis]) -> Roles:
    if not heads:
        return []
    if len(heads) == 1 and find(heads[0]).kind == "atom":
        return [("heads", heads[0])]
    flat = [part for axis in heads for part in outer_parts(axis)]
    flat = [part for part in flat if is_static(part) and not is_unit(part)]
    if len(flat) == 1:
        return [("heads", flat[0])]
    return list(zip(("kv_heads", "queries_per_kv"), flat[:2], strict=False))


def _fused_axes(node: TypedNode) -> Roles:
    bound = node.bound
    size = lambda name: name in bound and not is_unit(bound[name])  # noqa: E731
    roles: Roles = []
    if "h" in bound:
        roles.append(("heads", bound["h"]))
    elif size("r") and size("g"):
        roles += [("kv_heads", bound["g"]), ("queries_per_kv", bound["r"])]
    elif size("r"):
        roles.append(("heads", bound["r"]))
    elif "g" in bound:
        roles += _head_roles([bound["g"]])
    if "d" in bound:
        roles.append(("head_dim", bound["d"]))
    elif "p" in bound:
        roles.append(("head_dim", node.outputs[0][-1]) if node.op.rank(0) == 4 else ("head_dim", bound["p"]))
    if "v" in bound and find(bound["v"]) is not find(bound["d"]):
        roles.append(("v_head_dim", bound["v"]))
    return roles


def _scores_before(
    index: int, within: Sequence[int], nodes: Sequence[TypedNode], contractions: Contractions
) -> Contraction | None:
    """Return the contraction of queries with keys whose scores the attention at `index` mixes by."""
    for i in reversed([i for i in within if i < index]):
        contraction = contractions[i]
        if contraction is not None and contraction.weight is None and i != index:
            outputs = {id(find(axis)) for axis in nodes[i].outputs[0] or ()}
            if any(id(find(axis)) in outputs for axis in contractions[index].contracted):
                return contraction
    return None
