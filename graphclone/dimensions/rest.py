"""Name the widths that are neither hidden, heads, ffn nor vocab: what is left."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, is_unit, leaves
from graphclone.axes.contractions import BLOCKWISE
from graphclone.axes.typed import TypedNode
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.collection import Collection
from graphclone.dimensions.places import Places


def name_rest(found: Collection, nodes: Sequence[TypedNode], carriers: Carriers, places: Places) -> None:
    """Name what is left: `stem_n` on the way into a stack, `head_n` elsewhere, `inner` (`inner_n`) inside a block.

    Numbers follow what the graph computes, not how its nodes happen to be ordered: exporters differ in that.
    """
    uses: dict[int, list[tuple[tuple, int, int, int, Axis]]] = defaultdict(list)
    for i, node in enumerate(nodes):
        for slot, tensor in enumerate(node.op.node.inputs):
            if not isinstance(tensor, gs.Constant) or slot >= len(node.op.axes) or node.op.axes[slot] is None:
                continue
            for place, leaf in enumerate(leaf for axis in node.op.axes[slot] for leaf in leaves(axis)):
                if id(leaf) not in found.taken and not is_unit(leaf) and carriers.of(leaf):
                    for use in places.uses(i, slot):
                        uses[id(leaf)].append((places.key(use[0], leaf), *use, place, leaf))
    first = sorted((min(use, key=lambda use: use[:4]) for use in uses.values()), key=lambda use: use[:4])
    numbers: Counter = Counter()
    inner: dict[str, list[tuple[Axis, str, int]]] = defaultdict(list)
    for _, i, slot, _, leaf in first:
        blocks = dict.fromkeys(places.blocks[other] for _, other, *_ in uses[id(leaf)])
        if leaf.lock is not None:
            found.add("free", leaf, _fixed_name(leaf, nodes[i], slot, carriers, found.names()))
        elif None in blocks:
            kind = places.kind(other for _, other, *_ in uses[id(leaf)])
            found.add("free", leaf, f"{kind}_{numbers[kind]}")
            numbers[kind] += 1
        else:
            for prefix, index in blocks:
                inner[f"{prefix}blocks.{index}.inner"].append((leaf, prefix, index))
    for name, members in inner.items():
        for number, (leaf, prefix, index) in enumerate(members):
            found.add("free", leaf, name if len(members) == 1 else f"{name}_{number}", prefix, index)


def _fixed_name(leaf: Axis, node: TypedNode, slot: int, carriers: Carriers, taken: set[str]) -> str:
    """Name a locked width that nothing else names: channels, kernel, packing, unknown or positions, numbered."""
    if "of graph input" in leaf.lock and id(leaf) not in carriers.counted:
        kind = "channels"
    elif leaf.lock.startswith("no axis rule"):
        kind = "unknown"
    elif node.op.type.startswith("Conv") and slot == 1:
        kind = "kernel"
    elif node.op.type in BLOCKWISE:
        kind = "packing"
    else:
        kind = "positions"
    return next(name for name in (kind, *(f"{kind}_{n}" for n in range(1, 10_000))) if name not in taken)
