"""Names of widths: the same for the same model, however its nodes are ordered."""

import random
from pathlib import Path

import pytest

from graphclone.analysis import analyse
from graphclone.axes.axis import leaves
from graphclone.model import Model, load

FIXTURES = Path(__file__).parent / "fixtures"
SHUFFLED = ["jax/scan", "optimum/bart/decoder_model", "optimum/gpt2/model", "paddle/vit", "tf/bert"]
TWO_HEADS = """(int64[B, S] ids) => (float[B, S, 5] far, float[B, S, 5] near) <
    float[11, 8] table, float[8, 6] enter, float[6, 6] up, float[6, 6] down, float[6, 7] a, float[7, 5] b,
    float[6, 7] c, float[7, 5] d> {
    e = Gather(table, ids)  x = MatMul(e, enter)  u = MatMul(x, up)  r = Relu(u)  v = MatMul(r, down)  y = Add(x, v)
    u2 = MatMul(y, up)  r2 = Relu(u2)  v2 = MatMul(r2, down)  z = Add(y, v2)
    p = MatMul(z, a)  near = MatMul(p, b)  q = MatMul(z, c)  far = MatMul(q, d) }"""


def carriers(model: Model) -> dict[str, set[tuple[str, int]]]:
    """Return which axes of which initializers each name speaks of."""
    analysis = analyse(model)
    atoms = {name: {id(leaf) for axis in d.axes for leaf in leaves(axis)} for d in analysis.dimensions for name in d.names}
    carried = [
        (name, place, {id(leaf) for leaf in leaves(axis)})
        for name, uses in analysis.typing.uses.items()
        for use in uses
        for place, axis in enumerate(use.axes)
    ]
    return {name: {(weight, place) for weight, place, found in carried if found & ours} for name, ours in atoms.items()}


def shuffle(model: Model, seed: int) -> None:
    """Put the nodes into a random order in which each still follows what it reads."""
    draw = random.Random(seed)
    nodes = list(model.graph.nodes)
    waiting = {id(node): {id(p) for t in node.inputs for p in t.inputs} for node in nodes}
    model.graph.nodes.clear()
    while nodes:
        ready = [node for node in nodes if not waiting[id(node)]]
        node = draw.choice(ready)
        nodes.remove(node)
        model.graph.nodes.append(node)
        for others in waiting.values():
            others.discard(id(node))


@pytest.mark.parametrize("fixture", SHUFFLED)
def test_names_do_not_depend_on_the_order_of_nodes(fixture: str) -> None:
    model = load(FIXTURES / f"{fixture}.onnx")
    known = carriers(model)
    shuffle(model, 1)
    assert carriers(model) == known


def test_heads_are_numbered_by_the_outputs_they_lead_to(graph) -> None:
    named = carriers(graph(TWO_HEADS))
    assert {"head_0": {("c", 1), ("d", 0)}, "head_1": {("a", 1), ("b", 0)}}.items() <= named.items()
    assert named["stem_0"] == {("table", 1), ("enter", 0)}
