"""Check that masks are told from ids, positions and segments, and which ids have a limit."""

import numpy as np
import pytest

from graphclone.calibration.limits import Limit, index_limits
from graphclone.calibration.masks import chosen_masks, mask_inputs, sense
from graphclone.calibration.run import measure
from graphclone.calibration.taps import Tap
from graphclone.verify import verify

BERT = """(int64[b, s] input_ids, int64[b, s] token_type_ids, int64[b, s] attention_mask, int64[b, s] position_ids)
=> (float[b, s, 6] y) <float[23, 6] words, float[2, 6] types, float[17, 6] places, float[6, 6] w>
{
    axes = Constant<value = int64[1] {-1}>()
    ids = Unsqueeze(input_ids, axes)
    flat = Squeeze(ids, axes)
    a = Gather(words, flat) b0 = Gather(types, token_type_ids) c = Gather(places, position_ids)
    d = Add(a, b0) x = Add(d, c) keys = Transpose<perm = [0, 2, 1]>(x)
    scores = MatMul(x, keys)
    none = Constant<value = int64[1] {0}>()
    axis = Constant<value = int64[1] {1}>()
    padding = Equal(attention_mask, none)
    wide = Unsqueeze(padding, axis)
    low = Constant<value = float[1] {-9999}>()
    masked = Where(wide, low, scores)
    weights = Softmax(masked)
    mixed = MatMul(weights, x)
    y = MatMul(mixed, w)
}"""


def test_bert(graph):
    model = graph(BERT)
    assert mask_inputs(model) == ("attention_mask",)
    assert index_limits(model) == {
        "input_ids": Limit(23, "words"),
        "token_type_ids": Limit(2, "types"),
        "position_ids": Limit(17, "places"),
    }


def test_an_attention_operator(graph):
    model = graph(
        "(float[b, s, 6] x, int32[b, s] mask) => (float[b, s, 6] y) <float[6, 18] w, float[18] v>"
        "{ y = com.microsoft.Attention<num_heads = 2>(x, w, v, mask) }"
    )
    assert mask_inputs(model) == ("mask",)


@pytest.mark.parametrize(
    "body",
    [
        "{ p = Cast<to = 1>(ids) a = Cos(p) y = Softmax(a) }",
        "{ p = Cast<to = 1>(ids) a = MatMul(p, w) y = Softmax(a) }",
        "{ n = Shape(ids) p = Cast<to = 1>(n) y = Softmax(p) }",
        "{ p = Cast<to = 1>(ids) y = Neg(p) }",
        "{ d = Constant<value = int64[1] {4}>() v = Constant<value = float[2] {0, 1}>() "
        "p = OneHot(ids, d, v) y = Softmax(p) }",
    ],
    ids=["rotary", "projected", "shape", "no softmax", "one hot"],
)
def test_integers_that_are_no_mask(graph, body):
    assert mask_inputs(graph(f"(int64[b, 5] ids) => (float[b, 5] y) <float[5, 5] w> {body}")) == ()


def test_a_candidate_that_does_not_hold_zeros_and_ones_is_no_mask(graph):
    model = graph("(int64[b, s] lengths) => (float[b, s] y) { p = Cast<to = 1>(lengths) y = Softmax(p) }")
    assert chosen_masks(model, None, {"lengths": np.array([[1, 0, 1]])}) == ("lengths",)
    assert chosen_masks(model, None, {"lengths": np.array([[1, 2, 3]])}) == ()
    assert chosen_masks(model, "lengths", {"lengths": np.array([[1, 2, 3]])}) == ("lengths",)


def test_a_named_mask_counts(graph):
    model = graph("(float[b, s, 3] x, float[b, s] w) => (float[b, s, 3] y, float[b, s] z) { y = Neg(x) z = Neg(w) }")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    w = np.array([[1, 1, 0, 1], [0, 0, 0, 1]], np.float32)
    stats = measure(model, [{"x": x, "w": w}], [Tap("y")], provider="cpu", progress=False, mask="w")
    assert stats.tokens == 4
    assert np.allclose(stats.mean("y"), -x[w > 0].mean(0), atol=1e-6)


IGNORED = """(float[b, s, 6] x, bool[b, s] ignore) => (float[b, s, 6] y) <float[6, 6] w> {
    keys = Transpose<perm = [0, 2, 1]>(x)  scores = MatMul(x, keys)
    axis = Constant<value = int64[1] {1}>()  zero = Constant<value = float {0}>()
    low = Constant<value = float {-9999}>()
    BIAS
    wide = Unsqueeze(bias, axis)  masked = Add(scores, wide)  weights = Softmax(masked)  mixed = MatMul(weights, x)
    y = MatMul(mixed, w) }"""


@pytest.mark.parametrize(
    ("bias", "real"),
    [
        ("bias = Where(ignore, low, zero)", False),
        ("bias = Where(ignore, zero, low)", True),
        ("shown = Not(ignore)  bias = Where(shown, zero, low)", False),
        ("whole = Cast<to = 1>(ignore)  bias = Mul(whole, low)", False),
        ("f = Cast<to = 1>(ignore)  one = Constant<value = float {1}>()  d = Sub(one, f)  bias = Mul(d, low)", True),
        ("size = Shape(ignore)  fill = ConstantOfShape(size)  bias = Where(ignore, low, fill)", False),
        (
            "n = Cast<to = 7>(ignore)  o = Constant<value = int64 {0}>()  e = Equal(n, o)  bias = Where(e, low, zero)",
            True,
        ),
    ],
)
def test_which_value_of_a_mask_marks_padding(graph, bias, real):
    model = graph(IGNORED.replace("BIAS", bias))
    assert mask_inputs(model) == ("ignore",)
    assert sense(model, "ignore") is real
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    shown = np.arange(5) < np.array([[5], [2]])
    (counted,) = measure(model, [{"x": x, "ignore": shown == real}], [Tap("x", -1)]).taps.values()
    assert counted.count == 7
    assert np.allclose(counted.absolute, np.abs(x[shown]).sum(0), rtol=1e-5)


def test_verify_hides_nothing_where_ones_mark_padding(graph):
    report = verify(graph(IGNORED.replace("BIAS", "bias = Where(ignore, low, zero)").replace("-9999", "-inf")))
    assert report.ok, str(report)
