"""Check every statistic against numpy on the activations themselves."""

import numpy as np
import pytest

from graphclone.calibration.data import open_data
from graphclone.calibration.run import measure
from graphclone.calibration.session import open_session
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError
from graphclone.precision import raised

SPANS = [Span("attention", "x0", "x1"), Span("ffn", "x1", "x2"), Span("block", "x0", "x2")]


def quiet(model, data, taps=(), spans=(), moments=(), **options):
    return measure(model, data, taps, spans, moments, provider="cpu", progress=False, **options)


def close(got, want, tolerance=2e-6):
    want = np.asarray(want)
    assert np.shape(got) == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def check_tap(stats, tap, rows, tolerance=2e-6):
    close(stats.mean(tap), rows.mean(0), tolerance)
    close(stats.mean_abs(tap), np.abs(rows).mean(0), tolerance)
    close(stats.mean_square(tap), (rows**2).mean(0), tolerance)
    assert np.abs(stats.variance(tap) - rows.var(0)).max() <= 2 * tolerance * (rows**2).mean(0).max()


def check_span(stats, span, x, y, tolerance=2e-6):
    norm = np.linalg.norm
    close(stats.ratio(span), (norm(y - x, axis=1) / norm(y, axis=1)).mean(), tolerance)
    assert abs(stats.cosine(span) - ((x * y).sum(1) / norm(x, axis=1) / norm(y, axis=1)).mean()) < tolerance


@pytest.mark.parametrize("infos", [True, False])
@pytest.mark.parametrize("opset", [13, 20])
def test_padding_is_left_out(attention, samples, activations, infos, opset):
    model = attention(infos=infos, opset=opset)
    real = samples["mask"].astype(bool)
    stats = quiet(model, open_data(samples, model, batch_size=3), [Tap("x0"), Tap("x1"), Tap("hidden", 2)], SPANS)
    x0, x1, x2, hidden = (tensor[real] for tensor in activations(model, samples, "x0", "x1", "x2", "hidden"))
    for tap, rows in (("x0", x0), (Tap("x1", 2), x1), (Tap("hidden", -1), hidden)):
        check_tap(stats, tap, rows)
    for span, x, y in (("attention", x0, x1), ("ffn", x1, x2), (SPANS[2], x0, x2)):
        check_span(stats, span, x, y)
    assert (stats.samples, stats.tokens, stats.batches) == (7, real.sum(), 3)
    assert stats.parent == model.fingerprint and stats.provider == "cpu" and not stats.interrupted


@pytest.mark.parametrize(
    ("tensor", "axis", "to_rows"),
    [
        ("context", 1, lambda x, real: x[real.reshape(-1)]),
        ("mixed", 3, lambda x, real: x.transpose(0, 2, 1, 3)[real].reshape(-1, 3)),
        ("mixed", 1, lambda x, real: x.transpose(0, 2, 3, 1)[real].reshape(-1, 2)),
        ("keys", 2, lambda x, real: x.transpose(0, 3, 1, 2)[real].reshape(-1, 3)),
        ("swapped", 2, lambda x, real: x[real].transpose(0, 2, 1).reshape(-1, 2)),
    ],
    ids=["flat tokens", "head dim", "heads", "transposed keys", "heads last but one"],
)
@pytest.mark.parametrize("static", [False, True])
def test_any_axis_of_any_layout(attention, samples, activations, tensor, axis, to_rows, static):
    model = attention(b=7, s=5) if static else attention()
    (x,) = activations(model, samples, tensor)
    check_tap(quiet(model, samples, [Tap(tensor, axis)]), Tap(tensor, axis), to_rows(x, samples["mask"].astype(bool)))


def test_a_given_layout_is_taken_where_sizes_are_ambiguous(graph):
    model = graph("(float[b, s, 5] x, int64[b, s] mask) => (float[s, b, 5] y) { y = Transpose<perm = [1, 0, 2]>(x) }")
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 4, 5)).astype(np.float32), "mask": np.tri(4, dtype=np.int64)}
    stats = quiet(model, [feeds], [Tap("y", 2, layout=(1, 0)), Tap("x", 2, layout=(0, 1))], mask="mask")
    rows = feeds["x"].astype(np.float64)[feeds["mask"].astype(bool)]
    check_tap(stats, "y", rows)
    check_tap(stats, "x", rows)


def test_fp16_is_reduced_in_fp32(attention, samples, activations):
    model = attention(t="float16")
    real = samples["mask"].astype(bool)
    stats = quiet(model, samples, [Tap("x0"), Tap("hidden")], SPANS[:1])
    x0, x1, hidden = (tensor[real] for tensor in activations(model, samples, "x0", "x1", "hidden"))
    check_tap(stats, "x0", x0)
    check_tap(stats, "hidden", hidden)
    check_span(stats, "attention", x0, x1, 1e-3)


def test_bf16_that_onnxruntime_has_no_kernels_for_is_measured_in_fp32(attention, samples, activations):
    model = attention(t="bfloat16")
    with pytest.raises(InputError, match="NOT_IMPLEMENTED"):
        open_session(model)
    stats = quiet(model, samples, [Tap("hidden")])
    assert stats.parent == model.fingerprint
    (hidden,) = activations(raised(model), samples, "hidden")
    check_tap(stats, "hidden", hidden[samples["mask"].astype(bool)])


def test_squares_beyond_fp16_are_fine(graph):
    model = graph("(float16[b, 3] x) => (float16[b, 3] y) { y = Identity(x) }")
    x = np.array([[300, 1000, -60000], [1, 2, 3]], np.float16)
    check_tap(quiet(model, {"x": x}, [Tap("y")]), "y", x.astype(np.float64))


def test_a_static_batch_is_filled_and_the_filling_counts_nothing(attention, samples, activations):
    static, dynamic = attention(b=4, s=5), attention()
    real = samples["mask"].astype(bool)
    stats = quiet(static, samples, [Tap("x1"), Tap("context")], SPANS[:1])
    x0, x1, context = activations(dynamic, samples, "x0", "x1", "context")
    check_tap(stats, "x1", x1[real])
    check_tap(stats, "context", context[real.reshape(-1)])
    check_span(stats, "attention", x0[real], x1[real])
    assert (stats.samples, stats.batches, stats.tokens) == (7, 2, real.sum())


def test_without_a_mask_filling_still_counts_nothing(graph):
    text = "(float[4, 3, 5] image) => (float[4, 3, 6] y, float[4, 6] pooled) <float[5, 6] w, int64[1] axes = {1}>"
    model = graph(text + "{ y = MatMul(image, w) pooled = ReduceMax<keepdims = 0>(y, axes) }")
    image = np.random.default_rng(0).normal(size=(7, 3, 5)).astype(np.float32)
    stats = quiet(model, {"image": image}, [Tap("y"), Tap("pooled"), Tap("y", 1)], [Span("s", "y", "y")])
    y = image.astype(np.float64) @ model.weights["w"].load().astype(np.float64)
    check_tap(stats, Tap("y", -1), y.reshape(-1, 6))
    check_tap(stats, Tap("y", 1), y.transpose(0, 2, 1).reshape(-1, 3))
    check_tap(stats, "pooled", y.max(1))
    assert (stats.samples, stats.tokens) == (7, 21)
    assert (stats.ratio("s"), stats.cosine("s")) == (0.0, 1.0)


def test_tensors_without_batch_count_every_row(graph):
    model = graph(
        "(float[b, 5] x) => (float[b, 5] y) <float[3, 5] w, float[5] v> { t = Neg(w) u = Neg(v) y = Add(x, u) }"
    )
    model.outputs.append(next(node for node in model.graph.nodes if node.op == "Neg").outputs[0])
    stats = quiet(model, {"x": np.ones((4, 5), np.float32)}, [Tap("t"), Tap("u", 0)])
    check_tap(stats, "t", -model.weights["w"].load().astype(np.float64))
    check_tap(stats, "u", -model.weights["v"].load().astype(np.float64)[None])


def test_second_moments(attention, samples, activations):
    model = attention()
    real = samples["mask"].astype(bool)
    stats = quiet(model, open_data(samples, model, batch_size=3), (), (), [Moment("hidden"), Moment("context", 1)])
    hidden, context = activations(model, samples, "hidden", "context")
    rows = hidden[real]
    close(stats.second_moment("hidden"), rows.T @ rows / len(rows))
    rows = context[real.reshape(-1)]
    close(stats.second_moment(Moment("context", -1)), rows.T @ rows / len(rows))


def test_encoder_and_decoder_have_masks_of_their_own(graph):
    text = """(float[b, s, 6] x, float[b, t, 6] y, int64[b, s] mask, int64[b, t] decoder_mask) => (float[b, t, 6] z) {
        first = Neg(x) second = Neg(y)
        m = Cast<to = 1>(mask) n = Cast<to = 1>(decoder_mask) p = Softmax(m) q = Softmax(n)
        third = Abs(second) z = Identity(third) }"""
    model = graph(text)
    random = np.random.default_rng(0)
    feeds = {
        "x": random.normal(size=(3, 4, 6)).astype(np.float32),
        "y": random.normal(size=(3, 5, 6)).astype(np.float32),
        "mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]),
        "decoder_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    stats = quiet(model, [feeds], [Tap("first"), Tap("second"), Tap("third")])
    check_tap(stats, "first", -feeds["x"].astype(np.float64)[feeds["mask"] > 0])
    check_tap(stats, "second", -feeds["y"].astype(np.float64)[feeds["decoder_mask"] > 0])


def test_small_changes_of_large_states_keep_their_digits(graph):
    model = graph("(float[b, 6] x, float[b, 6] f) => (float[b, 6] y) { y = Add(x, f) }")
    random = np.random.default_rng(0)
    x = 100 * random.normal(size=(50, 6)).astype(np.float32)
    f = 0.05 * random.normal(size=(50, 6)).astype(np.float32)
    stats = quiet(model, {"x": x, "f": f}, (), [Span("s", "x", "y")])
    y = (x + f).astype(np.float64)
    norm = np.linalg.norm
    x = x.astype(np.float64)
    close(stats.ratio("s"), (norm(y - x, axis=1) / norm(y, axis=1)).mean(), 1e-6)
    turn = 1 - ((x * y).sum(1) / norm(x, axis=1) / norm(y, axis=1)).mean()
    assert abs((1 - stats.cosine("s")) - turn) < 1e-3 * turn


def test_batches_of_different_lengths(attention, activations):
    model = attention()
    random = np.random.default_rng(0)
    batches = [
        {"ids": random.integers(0, 23, shape), "mask": np.ones(shape, np.int64)} for shape in ((3, 5), (2, 9), (4, 1))
    ]
    stats = quiet(model, batches, [Tap("x1"), Tap("context", 1)])
    runs = [activations(model, feeds, "x1", "context") for feeds in batches]
    check_tap(stats, "x1", np.concatenate([x1.reshape(-1, 6) for x1, _ in runs]))
    check_tap(stats, "context", np.concatenate([context for _, context in runs]))


@pytest.mark.parametrize("spans", [True, False])
def test_sizes_that_are_equal_in_the_first_batch_only(graph, spans):
    model = graph(
        "(float[b, s, 3] x, float[b, t, 3] y) => (float[b, s, 3] u, float[b, t, 3] v) { u = Neg(x) v = Neg(y) }"
    )
    random = np.random.default_rng(0)
    batches = [
        {"x": random.normal(size=(2, s, 3)).astype(np.float32), "y": random.normal(size=(2, t, 3)).astype(np.float32)}
        for s, t in ((5, 5), (4, 7), (6, 1))
    ]
    for tensor in (*model.inputs, *model.outputs):
        tensor.shape = ["b", None, 3]
    wanted = [Span("s", "x", "u"), Span("t", "y", "v")] if spans else []
    stats = quiet(model, batches, [] if spans else [Tap("u"), Tap("v")], wanted)
    if spans:
        assert (stats.ratio("s"), stats.ratio("t")) == (2.0, 2.0)
        assert (stats.spans["s"].count, stats.spans["t"].count) == (30, 26)
    else:
        check_tap(stats, "u", -np.concatenate([feeds["x"].reshape(-1, 3) for feeds in batches]).astype(np.float64))
        check_tap(stats, "v", -np.concatenate([feeds["y"].reshape(-1, 3) for feeds in batches]).astype(np.float64))


def test_axes_as_attributes_before_opset_13(graph):
    model = graph("(float[4, 3, 5] x) => (float[4, 3, 5] y) { y = Neg(x) }", opset=11)
    x = np.random.default_rng(0).normal(size=(7, 3, 5)).astype(np.float32)
    stats = quiet(model, {"x": x}, [Tap("y")], [Span("s", "x", "y")])
    check_tap(stats, "y", -x.reshape(-1, 5).astype(np.float64))
    assert (stats.ratio("s"), stats.cosine("s")) == (2.0, -1.0)


def test_merged_parts_equal_one_pass(attention, samples):
    model = attention()
    taps, moments = [Tap("x0"), Tap("hidden")], [Moment("hidden")]
    batches = list(open_data(samples, model, batch_size=2))
    feeds = [batch.feeds for batch in batches]
    whole = quiet(model, feeds, taps, SPANS, moments)
    parts = quiet(model, feeds[:1], taps, SPANS, moments).merge(quiet(model, feeds[1:], taps, SPANS, moments))
    for key, sums in whole.taps.items():
        assert np.allclose(parts.taps[key].square, sums.square, rtol=1e-14, atol=0)
        assert parts.taps[key].count == sums.count
    for name, sums in whole.spans.items():
        assert parts.spans[name].ratio == pytest.approx(sums.ratio, rel=1e-14)
    assert (parts.samples, parts.tokens, parts.batches) == (whole.samples, whole.tokens, whole.batches)


def test_the_model_is_not_changed_and_its_outputs_are_not_computed(attention, samples):
    model = attention()
    before = model.fingerprint
    quiet(model, samples, [Tap("x0")])
    assert model.fingerprint == before
    assert [output.name for output in model.outputs] == ["logits"]


BROKEN = """(float[b, s, 4] x, int64[b, s] mask) => (float[b, s, 4] z)
{ m = Cast<to = 1>(mask) p = Softmax(m) root = Sqrt(x) y = Neg(root) z = Identity(y) }"""


def test_nan_is_found_at_the_first_tensor_in_the_graph(graph):
    model = graph(BROKEN)
    good = {"x": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3), np.int64)}
    bad = {"x": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3), np.int64)}
    bad["x"][1, 2, 0] = -1
    with pytest.raises(InputError, match=r"'root' holds NaN or Inf.* in batch 1"):
        quiet(model, [good, bad], [Tap("z"), Tap("y"), Tap("root"), Tap("x")])
    with pytest.raises(InputError, match="'y' holds NaN"):
        quiet(model, [bad], (), [Span("s", "y", "z")])
    with pytest.raises(InputError, match="'y' holds NaN"):
        quiet(model, [bad], (), (), [Moment("y")])


def test_nan_in_padding_does_no_harm(graph):
    model = graph(BROKEN)
    x = np.random.default_rng(0).uniform(1, 2, (5, 3, 4)).astype(np.float32)
    mask = np.ones((5, 3), np.int64)
    mask[1, 2] = mask[4, 0] = 0
    x[1, 2] = x[4, 0] = -1
    spans = [Span("s", "x", "y")]
    stats = quiet(model, open_data({"x": x, "mask": mask}, model, batch_size=2), [Tap("y")], spans, [Moment("y")])
    rows = x.astype(np.float64)[mask > 0]
    check_tap(stats, "y", -np.sqrt(rows))
    check_span(stats, "s", rows, -np.sqrt(rows))
    close(stats.second_moment("y"), np.sqrt(rows).T @ np.sqrt(rows) / len(rows))


def test_ids_outside_their_table_are_named(attention, samples):
    model = attention()
    samples["ids"][4, 1] = 23
    with pytest.raises(InputError, match=r"'ids' in batch 1 of the data holds 23.*'table' has 23 rows.*0 to 22"):
        quiet(model, open_data(samples, model, batch_size=3), [Tap("x0")])


def test_what_onnxruntime_rejects_names_the_batch(graph):
    model = graph("(float[b, n] x, float[m, k] w) => (float[b, k] y) { y = MatMul(x, w) }")
    feeds = {"x": np.ones((2, 3), np.float32), "w": np.ones((4, 5), np.float32)}
    with pytest.raises(InputError, match=r"onnxruntime cannot run batch 0: .*MatMul.*'w' float32 \[4, 5\]"):
        quiet(model, [feeds], [Tap("y")])


@pytest.mark.parametrize(
    ("taps", "spans", "message"),
    [
        ([Tap("nowhere")], (), "cannot measure 'nowhere': the graph has no such tensor"),
        ([Tap("x0", 3)], (), r"cannot measure axis 3 of 'x0', whose shape is \['batch', 'length', 6\]"),
        ((), [Span("a", "x0", "x1"), Span("a", "x1", "x2")], "two spans are called 'a'"),
    ],
)
def test_what_cannot_be_measured(attention, samples, taps, spans, message):
    with pytest.raises(InputError, match=message):
        quiet(attention(), samples, taps, spans)


@pytest.mark.parametrize(
    ("mask", "message"),
    [("maks", "--mask names 'maks', which is no input; the model has 'x', 'mask'"), ("x", "--mask names 'x'.*shape")],
)
def test_what_cannot_be_a_mask(graph, mask, message):
    with pytest.raises(InputError, match=message):
        quiet(
            graph(BROKEN), [{"x": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3), int)}], [Tap("y")], mask=mask
        )


def test_the_bar_says_where_it_runs_and_how_far_it_is(attention, samples, capsys):
    measure(attention(), samples, [Tap("x0")], provider="cpu")
    shown = capsys.readouterr().err
    assert "calibrating on CPU" in shown and "1/1 batches" in shown and "samples/s" in shown


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_a_window_as_long_as_the_batch_is_no_batch(graph, activations, sizes):
    """Windows of an image stand in front of their tokens; the file does not say how large any of these sizes is."""
    model = graph("""(float[B, 4, 6] x) => (float[B, 4, 7] y) <float[6, 5] w, float[5, 7] v, int64[3] apart = {-1, 2, 6},
        int64[3] together = {-1, 4, 7}>
        { windows = Reshape(x, apart)  h = MatMul(windows, w)  out = MatMul(h, v)  y = Reshape(out, together) }""")
    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((size, 4, 6)).astype(np.float32)} for size in sizes]
    stats = quiet(model, batches, [Tap("h", 2)])
    rows = [activations(model, feeds, "h")[0].reshape(-1, 5) for feeds in batches]
    check_tap(stats, Tap("h", 2), np.concatenate(rows))
