"""Limits: which inputs are indices into a table, and how many rows it has."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.model import Model

SAME_VALUES = {
    "Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
FUSED_EMBEDDING = {0: 2, 1: 4, 8: 3}  # of com.microsoft EmbedLayerNormalization: the slot of ids, and of their table


@dataclass(frozen=True, slots=True)
class Limit:
    """size: how many rows the smallest table has that an input picks from; table: its name."""

    size: int
    table: str


def index_limits(model: Model) -> dict[str, Limit]:
    """Return the limit of each input whose values reach a Gather unchanged, also ids that are declared as floats.

    Example:
        >>> index_limits(model)
        {'ids': Limit(size=65, table='token.weight')}
    """
    found = {}
    for tensor in model.inputs:
        if tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iuf":
            tables = [table for node, slot in _readers(tensor) if (table := _table(node, slot))]
            if tables:
                found[tensor.name] = min(tables, key=lambda limit: limit.size)
    return found


def _readers(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Return the nodes and slots that read a tensor's values, also through nodes that only move them."""
    found, waiting, seen = [], [tensor], {tensor.name}
    while waiting:
        current = waiting.pop()
        for node in current.outputs:
            slots = [slot for slot, item in enumerate(node.inputs) if item is current]
            found.extend((node, slot) for slot in slots)
            if node.op in SAME_VALUES and (node.op == "Concat" or 0 in slots):
                fresh = [item for item in node.outputs if item.name not in seen]
                seen.update(item.name for item in fresh)
                waiting.extend(fresh)
    return found


def _table(node: gs.Node, slot: int) -> Limit | None:
    """Return the limit that a node sets for indices in `slot`, if it picks rows of a float table."""
    axis = 0
    if node.op == "Gather" and slot == 1:
        table = node.inputs[0]
        axis = int(node.attrs.get("axis", 0))
    elif node.op == "EmbedLayerNormalization" and slot in FUSED_EMBEDDING:
        table = node.inputs[FUSED_EMBEDDING[slot]]
    else:
        return None
    shape = table.shape
    if not shape or table.dtype is None or np.dtype(table.dtype).kind in "iub" or not isinstance(shape[axis], int):
        return None
    return Limit(shape[axis], table.name)
