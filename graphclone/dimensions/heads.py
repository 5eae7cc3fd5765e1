"""The axes around an attention, with their roles: heads (grouped or not), head_dim, v_head_dim."""

from collections.abc import Mapping, Sequence

from graphclone.axes.axis import Axis, find, is_static, is_unit, leaves, product, total
from graphclone.axes.contractions import Contraction
from graphclone.axes.notation import Pattern, parse
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
    before = _scores_before(index, within, nodes, contractions)
    scores = None if before is None else contractions[before]
    heads = carriers.carried(static_parts(mix.shared))
    if scores is not None:
        heads = carriers.carried(static_parts(scores.shared)) or heads
    inner = [axis for axis in (scores.contracted if scores else ()) if is_static(axis)]
    if before is not None:
        heads += _heads_of_queries(nodes[before], mix, heads, inner, carriers)
    roles = _head_roles(heads)
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


def _heads_of_queries(
    scores: TypedNode, mix: Contraction, heads: Sequence[Axis], inner: Sequence[Axis], carriers: Carriers
) -> list[Axis]:
    """Return the axes of scores, beside the heads of keys, that come of one weight with the head dim.

    Grouped queries need no repeated keys: `btkgd, bskd -> bkgts`.
    """
    known = {id(leaf) for axis in (*heads, *inner, *mix.contracted) for leaf in leaves(axis)} | carriers.fed
    projections = set().union(*(carriers.of(leaf) for axis in inner for leaf in leaves(axis)))
    free = [part for axis in scores.outputs[0] or () for part in outer_parts(axis) if is_static(part) and not is_unit(part)]
    free = [axis for axis in free if not {id(leaf) for leaf in leaves(axis)} & known]
    return [axis for axis in free if all(carriers.of(leaf) & projections for leaf in leaves(axis))]


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
        last = parse(node.text).outputs[0][-1]
        roles.append(("head_dim", _built(last if node.op.rank(0) == 4 else last.parts[-1], bound)))
    if "v" in bound and find(bound["v"]) is not find(bound["d"]):
        roles.append(("v_head_dim", bound["v"]))
    return roles


def _built(pattern: Pattern, bound: Mapping[str, Axis]) -> Axis:
    """Return the axis that a pattern stands for, as `(p + p)` for the halves of a head that is turned."""
    if pattern.kind == "name":
        return bound[pattern.name]
    return (product if pattern.kind == "product" else total)([_built(part, bound) for part in pattern.parts])


def _scores_before(
    index: int, within: Sequence[int], nodes: Sequence[TypedNode], contractions: Contractions
) -> int | None:
    """Return which node contracts queries with keys to the scores that the attention at `index` mixes by."""
    for i in reversed([i for i in within if i < index]):
        contraction = contractions[i]
        if contraction is not None and contraction.weight is None and i != index:
            outputs = {id(find(axis)) for axis in nodes[i].outputs[0] or ()}
            if any(id(find(axis)) in outputs for axis in contractions[index].contracted):
                return i
    return None
