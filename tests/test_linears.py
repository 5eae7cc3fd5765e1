"""Linear operators are found with their weight, bias and axes, and what is left alone is named with the reason."""

import pytest

from graphclone.analysis import analyse
from graphclone.linears import find_linears, heads, left_alone


def found(model):
    return find_linears(analyse(model), model)


@pytest.mark.parametrize("body, bias, y", [
    ("y = Gemm(x, a)", None, "y"),
    ("y = Gemm<beta=0.0>(x, a)", None, "y"),
    ("y = Gemm(x, a, c)", "c", "y"),
    ("p = MatMul(x, a) y = Add(p, c)", "c", "y"),
    ("p = MatMul(x, a) y = Add(c, p)", "c", "y"),
    ("t = Transpose<perm=[1, 0]>(d) y = MatMul(x, t)", None, "y"),
    ('y = Einsum<equation="bk,kn->bn">(x, a)', None, "y"),
])  # fmt: skip
def test_products_with_an_initializer_are_found(graph, body, bias, y):
    model = graph(f"(float[B, 4] x) => (float[B, 5] y) <float[4, 5] a, float[5, 4] d, float[5] c> {{ {body} }}")
    (linear,) = found(model)
    assert (linear.x, linear.y, linear.bias) == ("x", y, bias)
    sizes = [axis.size[0] for axis in (*linear.inner, *linear.outer)]
    assert sizes == [4, 5]
    assert tuple(sizes[i] for i in linear.order) == model.weights[linear.weight].shape


def test_a_convolution_is_found_with_its_window(graph):
    model = graph("""(float[B, 3, 8, 8] x) => (float[B, 5, 4, 4] y) <float[5, 3, 2, 2] k, float[5] c> {
        y = Conv<strides=[2, 2], kernel_shape=[2, 2]>(x, k, c) }""")
    (linear,) = found(model)
    assert [axis.size[0] for axis in linear.inner] == [3, 2, 2]
    assert linear.window == {"strides": [2, 2], "kernel_shape": [2, 2]}
    assert linear.bias == "c"


@pytest.mark.parametrize("body, why", [
    ("y = Gemm<alpha=0.5>(x, a)", "alpha"),
    ("y = Gemm<beta=0.5>(x, a, c)", "beta"),
    ("i = Constant<value=int64[4] {0, 1, 2, 3}>() t = Gather(a, i) y = MatMul(x, t)", "Gather"),
    ("z = Unsqueeze(x, one) w = Conv<group=4>(z, g) y = Squeeze(w, one)", "groups"),
])  # fmt: skip
def test_others_are_left_alone_with_the_reason(graph, body, why):
    model = graph(f"""(float[B, 4] x) => (float[B, N] y)
        <float[4, 5] a, float[5] c, float[4, 1, 1] g, int64[1] one = {{2}}> {{ {body} }}""")
    assert not found(model)
    ((where, reason),) = left_alone(analyse(model), model)
    assert "node" in where
    assert why in reason


def test_a_matrix_for_each_expert_is_no_linear_operator(graph):
    """`btef, efd -> bted` is one for each e, though its axes come in the order of one from f to (e, d)."""
    model = graph("""(float[B, T, 3, 4] x) => (float[B, T, 3, 5] y) <float[3, 4, 5] w> {
        y = Einsum<equation="btef,efd->bted">(x, w) }""")
    ((_, reason),) = left_alone(analyse(model), model)
    assert not found(model) and "a matrix for each entry" in reason


def test_a_tied_head_is_found_only_where_it_parts(graph):
    model = graph("""(int64[B] ids) => (float[B, 9] y) <float[9, 4] e> {
        x = Gather(e, ids) t = Transpose<perm=[1, 0]>(e) y = MatMul(x, t) }""")
    analysis = analyse(model)
    assert not find_linears(analysis, model)
    assert "tied head" in left_alone(analysis, model)[0][1]
    assert heads(analysis, model) == {"e": "e_untied"}
    (linear,) = find_linears(analysis, model, heads(analysis, model))
    assert (linear.weight, linear.own) == ("e", "e_untied")


def test_operators_of_one_matrix_share_its_name_and_its_bias(graph):
    model = graph("""(float[B, 4] x) => (float[B, 4] y) <float[4, 4] a, float[4] c> {
        p = MatMul(x, a) q = Add(p, c) r = Tanh(q) s = MatMul(r, a) y = Add(s, c) }""")
    one, other = found(model)
    assert one.shared == other.shared
    assert one.bias == other.bias == "c"


def test_a_bias_that_others_read_too_is_none(graph):
    model = graph("""(float[B, 4] x) => (float[B, 4] y) <float[4, 4] a, float[4] c> {
        p = MatMul(x, a) q = Add(p, c) r = Tanh(q) y = Mul(r, c) }""")
    (linear,) = found(model)
    assert (linear.bias, linear.y) == (None, "p")
