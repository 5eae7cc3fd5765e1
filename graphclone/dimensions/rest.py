"""Name the widths that are neither hidden, heads, ffn nor vocab: what is left."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, is_unit, leaves
from graphclone.axes.contractions import BLOCKWISE
from graphclone.axes.typed import TypedNode
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.collection import Collection
from graphclone.dimensions.places import Places
from graphclone.dimensions.widths import is_in_groups, lock_of


def name_rest(found: Collection, nodes: Sequence[TypedNode], carriers: Carriers, places: Places) -> None:
    """Name what is left: `stem_n` on the way into a stack, `head_n` elsewhere, `inner` (`inner_n`) inside a block.

    Numbers follow what the graph computes, not how its nodes happen to be ordered: exporters differ in that.
    """
    tables = [(i, slot, node.op.axes[slot]) for i, node in enumerate(nodes) for slot in _constants(node)]
    grouped = _grouped(found, (axis for *_, axes in tables for axis in axes))
    uses: dict[int, list[tuple[tuple, int, int, int, Axis]]] = defaultdict(list)
    for i, slot, axes in tables:
        for place, leaf in enumerate(leaf for axis in axes for leaf in leaves(axis)):
            if id(leaf) not in found.taken and not is_unit(leaf) and carriers.of(leaf):
                width = grouped.get(id(leaf), leaf)
                for use in places.uses(i, slot):
                    uses[id(width)].append((places.key(use[0], leaf), *use, place, width))
    first = sorted((min(use, key=lambda use: use[:4]) for use in uses.values()), key=lambda use: use[:4])
    numbers: Counter = Counter()
    inner: dict[str, list[tuple[Axis, str, int]]] = defaultdict(list)
    for _, i, slot, _, width in first:
        blocks = dict.fromkeys(places.blocks[other] for _, other, *_ in uses[id(width)])
        if lock_of(width) is not None and not _is_looked_up(width, nodes[i], slot):
            found.add("free", width, _fixed_name(width, nodes[i], slot, carriers, found.names()))
        elif None in blocks:
            kind = places.kind(other for _, other, *_ in uses[id(width)])
            found.add("free", width, f"{kind}_{numbers[kind]}")
            numbers[kind] += 1
        else:
            for prefix, index in blocks:
                inner[f"{prefix}blocks.{index}.inner"].append((width, prefix, index))
    for name, members in inner.items():
        for number, (width, prefix, index) in enumerate(members):
            found.add("free", width, name if len(members) == 1 else f"{name}_{number}", prefix, index)


def _constants(node: TypedNode) -> list[int]:
    """Return the slots of constants whose axes are known."""
    slots = zip(node.op.node.inputs, node.op.axes, strict=False)
    return [slot for slot, (tensor, axes) in enumerate(slots) if isinstance(tensor, gs.Constant) and axes is not None]


def _grouped(found: Collection, axes: Iterable[Axis]) -> dict[int, Axis]:
    """Return, by the ids of their atoms, the widths that are cut in whole groups: none of their factors is a width."""
    widths = [find(axis) for axis in axes if is_in_groups(axis)]
    free = [width for width in widths if not found.taken & {id(leaf) for leaf in leaves(width)}]
    return {id(leaf): width for width in free for leaf in leaves(width)}


def _is_looked_up(width: Axis, node: TypedNode, slot: int) -> bool:
    """Tell whether a width is that of the rows which a node looks up."""
    if node.op.type != "Gather" or slot or width.kind != "atom":
        return False
    rows = node.op.axes[0][int(node.op.attribute("axis", 0))]
    return all(width is not leaf for leaf in leaves(rows))


def _fixed_name(leaf: Axis, node: TypedNode, slot: int, carriers: Carriers, taken: set[str]) -> str:
    """Name a locked width that nothing else names: channels, kernel, packing, unknown or positions, numbered."""
    lock = lock_of(leaf)
    if "of graph input" in lock and id(leaf) not in carriers.counted:
        kind = "channels"
    elif lock.startswith("no axis rule"):
        kind = "unknown"
    elif node.op.type.startswith("Conv") and slot == 1:
        kind = "kernel"
    elif node.op.type in BLOCKWISE:
        kind = "packing"
    else:
        kind = "positions"
    return next(name for name in (kind, *(f"{kind}_{n}" for n in range(1, 10_000))) if name not in taken)
