"""The axes around an attention, with their roles: heads (grouped or not), head_dim, v_head_dim."""

from collections import deque
from collections.abc import Mapping, Sequence

from graphclone.axes.axis import Axis, find, free_leaves, is_static, is_unit, leaves, outer_parts, product, total
from graphclone.axes.contractions import Contraction
from graphclone.axes.notation import Pattern, names_in, parse
from graphclone.axes.typed import TypedNode
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.places import Contractions
from graphclone.dimensions.widths import is_of_units, static_parts
from graphclone.flow import ATTENTION_OPS
from graphclone.whole_numbers import plain_of

Roles = list[tuple[str, Axis, str]]


def attention_axes(
    index: int, within: Sequence[int], nodes: Sequence[TypedNode], contractions: Contractions, carriers: Carriers
) -> Roles:
    """Return (role, axis, name) of the axes around one attention; names are roles, or with a prefix as `v_heads`.

    index: of the node that mixes values by scores, or of an attention operator. within: the nodes of its half block.
    """
    node = nodes[index]
    if node.op.type in ATTENTION_OPS:
        return [(role, axis, role) for role, axis in _fused_axes(node)]
    mix = contractions[index]
    before = _scores_before(index, within, nodes, contractions)
    if before is None:
        return _linear_axes(node, mix, carriers)
    scores = contractions[before]
    heads = carriers.carried(static_parts(scores.shared)) or carriers.carried(static_parts(mix.shared))
    inner = [axis for axis in scores.contracted if is_static(axis)]
    heads += _of_queries(before, within, nodes, contractions, [*heads, *mix.contracted])
    heads += _heads_of_queries(nodes[before], mix, heads, inner, carriers)
    roles: Roles = [(role, axis, role) for role, axis in _head_roles(heads)]
    roles += [("heads", axis, name) for name, axis in _other_heads(index, before, within, nodes, mix, heads, carriers)]
    roles += [("head_dim", axis, "head_dim") for axis in inner[:1]]
    known = [*heads, *inner, *mix.contracted, *(nodes[before].outputs[0] or ()), *(axis for _, axis, _ in roles)]
    summed = bool(heads) and not _unlike(heads, mix.contracted)
    mixed = _projected(heads, index, within, contractions) if summed else _of_values(node, nodes[before])
    values = _unlike(mixed, known)
    role = "v_head_dim" if inner else "head_dim"
    return roles + [(role, axis, role) for axis in values[-1:]]


def _of_values(node: TypedNode, scores: TypedNode) -> list[Axis]:
    """Return the axes that a mix has of its values alone: the others are tokens, which a window or a grid may fix."""
    plain = plain_of(node.op.type, node.op.domain, node.op.node.attrs)
    slots = plain.given if plain else (0, 1)
    waiting, seen = deque((slot, node.op.node.inputs[slot]) for slot in slots), {id(node.op.node)}
    shares = slots[0]
    while waiting and id(scores.op.node) not in seen:  # the nearer of both operands descends from them
        shares, tensor = waiting.popleft()
        for producer in tensor.inputs:
            if id(producer) not in seen:
                seen.add(id(producer))
                waiting += [(shares, read) for read in producer.inputs]
    signature = parse(node.text)
    others = set(names_in(*signature.inputs[shares]))
    own = [name for name in names_in(*signature.inputs[sum(slots) - shares]) if name not in others]
    return [node.bound[name] for name in names_in(*signature.outputs[0]) if name in own and name in node.bound]


def _heads_of_queries(
    scores: TypedNode, mix: Contraction, heads: Sequence[Axis], inner: Sequence[Axis], carriers: Carriers
) -> list[Axis]:
    """Return the axes of scores, beside the heads of keys, that come of one weight with the head dim.

    Grouped queries need no repeated keys: `btkgd, bskd -> bkgts`.
    """
    known = {id(leaf) for axis in (*heads, *inner, *mix.contracted) for leaf in leaves(axis)} | carriers.fed
    projections = set().union(*(carriers.of(leaf) for axis in inner for leaf in leaves(axis)))
    free = [
        part for axis in scores.outputs[0] or () for part in outer_parts(axis) if is_static(part) and not is_unit(part)
    ]
    free = [axis for axis in free if not {id(leaf) for leaf in leaves(axis)} & known]
    return [axis for axis in free if all(carriers.of(leaf) & projections for leaf in leaves(axis))]


def _of_queries(
    before: int, within: Sequence[int], nodes: Sequence[TypedNode], contractions: Contractions, known: Sequence[Axis]
) -> list[Axis]:
    """Return the widths of scores that a weight of the half block makes: heads of queries alone.

    known: the heads that keys have, and the keys' tokens, which a convolution may have made.
    """
    made: set[int] = set()
    for i in within:
        if i < before and contractions[i] is not None and contractions[i].weight is not None:
            read = {id(leaf) for axis in nodes[i].op.axes[contractions[i].activation] or () for leaf in leaves(axis)}
            made |= {id(leaf) for axis in nodes[i].outputs[0] or () for leaf in leaves(axis)} - read
    return [axis for axis in _unlike(nodes[before].outputs[0], known) if {id(leaf) for leaf in leaves(axis)} <= made]


def _projected(heads: Sequence[Axis], index: int, within: Sequence[int], contractions: Contractions) -> list[Axis]:
    """Return what values lost to an output projection of each head that came before their mixing, which sums heads."""
    wanted = {id(leaf) for axis in heads for leaf in leaves(axis)}
    found = [contractions[i] for i in within if i < index and contractions[i] and contractions[i].weight is not None]
    each = [c for c in found if wanted <= {id(leaf) for axis in c.shared for leaf in leaves(axis)}]
    return [axis for contraction in each for axis in contraction.contracted]


def _linear_axes(node: TypedNode, mix: Contraction, carriers: Carriers) -> Roles:
    """Return the roles around keys times values, summed over the sequence: heads, and a width of either."""
    heads = carriers.carried(static_parts(mix.shared))
    widths = _unlike(node.outputs[0], [*heads, *mix.contracted])
    roles: Roles = [(role, axis, role) for role, axis in _head_roles(heads)]
    named = ("head_dim", "v_head_dim") if len(widths) > 1 else ("head_dim",)
    return roles + [(role, axis, role) for role, axis in zip(named, widths[-2:], strict=True)]


def _other_heads(
    index: int,
    before: int,
    within: Sequence[int],
    nodes: Sequence[TypedNode],
    mix: Contraction,
    heads: list[Axis],
    carriers: Carriers,
) -> list[tuple[str, Axis]]:
    """Return the widths that talking heads mix scores into: those that softmax sees, and those of values."""
    if len(heads) != 1:
        return []
    values = _unlike(carriers.carried(static_parts(mix.shared)), heads)
    known, mixed = [*heads, *values, *(nodes[before].outputs[0] or ())], []
    for i in within:
        if before < i < index and nodes[i].op.real_type == "Softmax":
            mixed = _widths(nodes[i].outputs[0], known, carriers)
    return [("mixed_heads", axis) for axis in mixed[:1]] + [("v_heads", axis) for axis in values[:1]]


def _widths(axes: Sequence[Axis] | None, known: Sequence[Axis], carriers: Carriers) -> list[Axis]:
    """Return the widths that weights carry among some axes, those known left out."""
    return [axis for axis in _unlike(axes, known) if free_leaves(axis) and carriers.count([axis])]


def _unlike(axes: Sequence[Axis] | None, known: Sequence[Axis]) -> list[Axis]:
    """Return the static axes that are made of others than the known ones."""
    seen = {id(leaf) for axis in known for leaf in leaves(axis)}
    wide = [axis for axis in axes or () if is_static(axis) and not is_unit(axis)]
    return [axis for axis in wide if not {id(leaf) for leaf in leaves(axis)} <= seen]


def _head_roles(heads: list[Axis]) -> list[tuple[str, Axis]]:
    if not heads:
        return []
    if len(heads) == 1 and find(heads[0]).kind == "atom":
        return [("heads", heads[0])]
    flat = [part for axis in heads for part in outer_parts(axis)]
    flat = [part for part in flat if is_static(part) and not is_of_units(part)]
    if len(flat) == 1:
        return [("heads", flat[0])]
    return list(zip(("kv_heads", "queries_per_kv"), flat[:2], strict=False))


def _fused_axes(node: TypedNode) -> list[tuple[str, Axis]]:
    bound = node.bound
    size = lambda name: name in bound and not is_unit(bound[name])  # noqa: E731
    roles: list[tuple[str, Axis]] = []
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
            mixed = contractions[index].contracted
            if any(id(part) in outputs for axis in mixed for part in (find(axis), *outer_parts(axis))):
                return i
    return None
