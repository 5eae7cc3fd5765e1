"""Parts of models run side by side, from held tensors, and give what the whole models give."""

import numpy as np
import pytest

from graphclone.calibration.session import open_session
from graphclone.errors import InputError
from graphclone.segments import Joint, Stream, run
from graphclone.weights import Weight

CHAIN = """(float[B, 4] x) => (float[B, 6] y) <float[4, 5] a, float[5, 6] b> {
    p = MatMul(x, a) q = Relu(p) r = MatMul(q, b) y = Tanh(r) }"""


def feeds(shape, count: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def whole(model, batch, *names):
    return open_session(model, threads=1, outputs=names).run(list(names), dict(batch))


def value(joint: Joint, stream: Stream, tensor: str) -> list[np.ndarray]:
    joint.give("found", joint.tensor(stream, tensor))
    session = joint.open()
    return [run(session, batch)[0] for batch in joint.batches()]


def test_a_part_from_a_held_tensor_gives_what_the_whole_gives(graph):
    model, batches = graph(CHAIN), feeds((2, 4))
    stream = Stream("s", model, batches)
    stream.hold("p")
    stream.hold("q")
    stream.forget("p")
    assert list(stream.held) == ["q"]
    found = value(Joint([stream]), stream, "y")
    for got, batch in zip(found, batches, strict=True):
        assert np.allclose(got, whole(model, batch, "y")[0], atol=1e-6)


def test_a_part_needs_only_the_weights_behind_what_is_held(graph):
    stream = Stream("s", graph(CHAIN), feeds((2, 4)))
    stream.hold("q")
    joint = Joint([stream])
    joint.give("found", joint.tensor(stream, "r"))
    assert [item.name for item in joint.open().get_inputs()] == ["s/q"]


def test_two_models_with_the_same_names_are_kept_apart(graph):
    models = graph(CHAIN, seed=0), graph(CHAIN, seed=1)
    batches = feeds((2, 4))
    one, other = (Stream(name, model, batches) for name, model in zip(("one", "other"), models, strict=True))
    joint = Joint([one, other])
    joint.give("gap", joint.op("Sub", joint.tensor(one, "y"), joint.tensor(other, "y")))
    session = joint.open()
    for batch, plain in zip(joint.batches(), batches, strict=True):
        wanted = whole(models[0], plain, "y")[0] - whole(models[1], plain, "y")[0]
        assert np.allclose(run(session, batch)[0], wanted, atol=1e-6)


def test_a_changed_weight_counts_from_the_next_part_on(graph):
    model, batches = graph(CHAIN), feeds((2, 4), 1)
    stream = Stream("s", model, batches)
    before = value(Joint([stream]), stream, "r")[0]
    constant = next(t for node in model.graph.nodes for t in node.inputs if t.name == "b")
    constant._values = Weight.of(2 * constant._values.load())
    assert np.allclose(value(Joint([stream]), stream, "r")[0], 2 * before, atol=1e-5)


def test_one_of_two_outputs_may_be_held(graph):
    model = graph("""(float[B, 4] x) => (float[B, 2] y) <float[4, 4] a> {
        p = MatMul(x, a) u, v = Split<axis=1, num_outputs=2>(p) y = Add(u, v) }""")
    one, other = (Stream(name, model, feeds((2, 4), 1)) for name in ("one", "other"))
    for stream in (one, other):
        stream.hold("u")
    joint = Joint([one, other])
    joint.give("sum", joint.op("Add", joint.tensor(one, "y"), joint.tensor(other, "y")))
    found = run(joint.open(), next(joint.batches()))[0]
    assert np.allclose(found, 2 * whole(model, one.feeds[0], "y")[0], atol=1e-6)


def test_a_branch_takes_what_it_needs_from_outside(graph):
    model = graph("""(float[B, 4] x) => (float[B, 4] y) <float[4, 4] a, bool on = {1}> {
        p = MatMul(x, a)
        q = If (on) <
            then_branch = t () => (float[B, 4] z) { z = Relu(p) },
            else_branch = e () => (float[B, 4] w) { w = Tanh(p) }>
        y = Exp(q) }""")
    stream = Stream("s", model, feeds((2, 4), 1))
    wanted = whole(model, stream.feeds[0], "y")[0]
    assert np.allclose(value(Joint([stream]), stream, "y")[0], wanted, atol=1e-6)
    stream.hold("p")
    assert np.allclose(value(Joint([stream]), stream, "y")[0], wanted, atol=1e-6)


def test_a_tensor_that_is_not_there_is_told(graph):
    stream = Stream("s", graph(CHAIN), feeds((2, 4), 1))
    with pytest.raises(InputError, match="nothing"):
        value(Joint([stream]), stream, "nothing")


@pytest.mark.parametrize("mask, attended", [(None, True), ("m", True), ("m", False)])
def test_a_gram_matrix_is_that_of_the_rows_that_count(graph, mask, attended):
    model = graph("(float[B, T, 4] x, int64[B, T] m) => (float[B, T, 5] y) <float[4, 5] a> { y = MatMul(x, a) }")
    random = np.random.default_rng(0)
    x, real = random.standard_normal((2, 3, 4)).astype(np.float32), np.array([[1, 1, 0], [1, 0, 0]])
    x[1, 2] = np.nan if mask else 0.0
    stream = Stream("s", model, [{"x": x, "m": real if attended else 1 - real}], masks={"m": attended})
    joint = Joint([stream])
    joint.give(
        "gram",
        joint.gram([joint.rows(joint.tensor(stream, "x"), 4), None, joint.rows(joint.tensor(stream, "y"), 5)], mask),
    )
    session = joint.open()
    found = run(session, next(joint.batches()))[0]
    rows = x.reshape(-1, 4)[real.reshape(-1) == 1] if mask else x.reshape(-1, 4)
    weight = model.weights["a"].load()
    z = np.hstack([rows, np.ones((len(rows), 1)), rows @ weight])
    assert np.allclose(found, z.T @ z, atol=1e-4)


@pytest.mark.parametrize("attributes", [
    {"strides": [2, 2], "kernel_shape": [2, 2]},
    {"strides": [1, 2], "kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "dilations": [2, 1]},
    {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
])  # fmt: skip
def test_unfolded_patches_times_the_kernel_are_the_convolution(graph, attributes):
    rows, columns = attributes["kernel_shape"]
    model = graph(
        f"(float[B, 3, 8, 8] x) => (float[B, 5, H, W] y) <float[5, 3, {rows}, {columns}] k> {{ y = Conv(x, k) }}"
    )
    model.graph.nodes[0].attrs.update(attributes)
    model.graph.outputs[0].shape = None
    stream = Stream("s", model, feeds((2, 3, 8, 8), 1))
    joint = Joint([stream])
    patches = joint.unfolded(joint.tensor(stream, "x"), 3, attributes, (rows, columns))
    joint.give("patches", patches)
    joint.give("wanted", joint.rows(joint.tensor(stream, "y"), 5, channels_at_one=True))
    session = joint.open()
    got, wanted = run(session, next(joint.batches()))
    kernel = model.weights["k"].load().transpose(1, 2, 3, 0).reshape(-1, 5)
    assert np.allclose(got @ kernel, wanted, atol=1e-4)
