"""Sequences of tensors: what is known of their number becomes plain operators, the rest is left and says why."""

import numpy as np
import pytest

from graphclone.analysis import analyse
from graphclone.verify import verify
from graphclone.verify.running import difference, run

HEADS = """(float[B, S, 12] x) => (float[B, S, 14] y) <float[12, 30] w, int64[3] parts = {10, 10, 10}, int64 ten = {10},
    int64 one = {1}, int64 last = {-1}, float[20, 14] v>"""
MADE = {
    "parts that a constant lists": "p = MatMul(x, w)  s = SplitToSequence <axis = 2> (p, parts)",
    "tensors put together": "p = MatMul(x, w)  a, b, c = Split <axis = 2> (p, parts)  s = SequenceConstruct(a, b, c)",
}
READ = "q = SequenceAt(s, one)  r = SequenceAt(s, last)  t = SequenceConstruct(q, r)  "
ENDS = "u = ConcatFromSequence <axis = 2> (t)  y = MatMul(u, v)"


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("opset", [11, 20])
def test_what_lies_behind_a_sequence_can_be_cut(graph, made, opset):
    if opset < 13:
        made = made.replace(
            "<axis = 2> (p, parts)  s = SequenceC", "<axis = 2, split = [10, 10, 10]> (p)  s = SequenceC"
        )
    model = graph(f"{HEADS} {{ {made} {READ} {ENDS} }}", opset=opset)
    assert not {"SplitToSequence", "SequenceConstruct", "SequenceAt"} & {node.op for node in model.graph.nodes}
    assert {d.size for d in analyse(model).dimensions if not d.locked} >= {10, 14}
    assert verify(model).ok
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    w, v = model.weights["w"].load(), model.weights["v"].load()
    assert difference(run(model, [{"x": x}])[0], {"y": (x @ w)[..., 10:] @ v}) < 1e-6


@pytest.mark.parametrize("opset", [11, 20])
@pytest.mark.parametrize(
    "text",
    [
        "s = SplitToSequence <axis = 1, keepdims = 0> (x)  y = ConcatFromSequence <axis = 1, new_axis = 1> (s)",
        "t = Neg(x)  a = Neg(t)  s = SplitToSequence <axis = 1> (a, two)  y = ConcatFromSequence <axis = 1> (s)",
        "s = SplitToSequence <axis = 1> (x, two)  n = SequenceLength(s)  f = Cast <to = 1> (n)  y = Mul(x, f)",
    ],
)
def test_pieces_of_a_declared_size_are_counted(graph, text, opset):
    model = graph(f"(float[B, 5, 12] x) => (float[B, 5, 12] y) <int64 two = {{2}}> {{ {text} }}", opset=opset)
    assert not any("Sequence" in node.op for node in model.graph.nodes)
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    assert difference(run(model, [{"x": x}])[0], {"y": x * 3 if "Length" in text else x}) < 1e-6


def test_a_sequence_as_long_as_the_data_is_left_and_says_why(graph):
    model = graph("""(float[B, S, 12] x) => (float[T, 12] y) <float[12, 12] w>
        { h = MatMul(x, w)  s = SplitToSequence <axis = 1, keepdims = 0> (h)
          y = ConcatFromSequence <axis = 0> (s) }""")
    typing = analyse(model).typing
    assert any(node.op == "SplitToSequence" for node in model.graph.nodes)
    assert "no axis rule for SplitToSequence node" in typing.types["h"][2].lock
