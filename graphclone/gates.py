"""Switch residual branches off by an input, so that one session measures every choice of blocks."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.blocks import Half
from graphclone.errors import CutError
from graphclone.flow import is_fused_sum
from graphclone.model import Model
from graphclone.weights import Weight

GATES = "graphclone_gates"


def gated(model: Model, halves: Sequence[Half]) -> Model:
    """Return a copy with a boolean input `graphclone_gates` [len(halves)]: where false, a half's exit is its entry.

    Raises: CutError where a branch ends in a node that also normalises, or lies in a branch of an If.

    Example:
        session = open_session(gated(model, halves)); session.run(None, {**feeds, "graphclone_gates": np.array([...])})
    """
    copy = model.copy()
    graph = copy.graph
    tensors = {t.name: t for node in graph.nodes for t in node.outputs} | {t.name: t for t in graph.inputs}
    gates = gs.Variable(GATES, np.bool_, [len(halves)])
    graph.inputs.append(gates)
    added: dict[int, list[gs.Node]] = {}
    for number, half in enumerate(halves):
        exit = tensors.get(half.exit)
        if exit is None or half.entry not in tensors or is_fused_sum(exit.inputs[0]):
            raise CutError(f"cannot switch off the branch that ends in '{half.exit}'; list the blocks to keep instead")
        producer = exit.inputs[0]
        position = next(i for i, tensor in enumerate(producer.outputs) if tensor is exit)
        raw = gs.Variable(f"{half.exit}_ungated", exit.dtype)
        producer.outputs[position] = raw
        index = gs.Constant(f"{GATES}_index_{number}", Weight.of(np.array(number, np.int64)))
        gate = gs.Variable(f"{GATES}_{number}", np.bool_)
        pick = gs.Node("Gather", f"{GATES}_pick_{number}", {"axis": 0}, [gates, index], [gate])
        choose = gs.Node("Where", f"{GATES}_choose_{number}", {}, [gate, raw, tensors[half.entry]], [exit])
        added.setdefault(id(producer), []).extend((pick, choose))
    graph.nodes[:] = [placed for node in graph.nodes for placed in (node, *added.get(id(node), ()))]
    return copy
