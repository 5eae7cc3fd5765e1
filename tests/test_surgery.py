"""What a cut edits: weights, stored sizes, denominators, names, interfaces; and what it leaves alone."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from graphclone.analysis import analyse
from graphclone.errors import CutError
from graphclone.model import Model, load
from graphclone.pipeline import Pipeline
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify.inputs import candidates
from graphclone.verify.running import difference, run
from graphclone.verify.structure import problem_of

FIXTURES = Path(__file__).parent / "fixtures" / "optimum"


def name_of(model: Model, size: int) -> str:
    """Return the name of the only dimension of a size."""
    (name,) = (dimension.name for dimension in analyse(model).dimensions if dimension.size == size)
    return name


def shape(tensor) -> list:
    return list(tensor.shape)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return load(FIXTURES / "gpt2" / "model.onnx")


# weights --------------------------------------------------------------------------------------------------------


def test_weights_are_sliced_scaled_and_replaced_in_the_child_s_order(graph):
    model = graph("""(float[B, 12] x) => (float[B, 13] y) <float[12, 14] w, float[14] b, float[14, 13] v>
        { h = MatMul(x, w)  a = Add(h, b)  t = Tanh(a)  y = MatMul(t, v) }""")
    kept = (5, 0, 9)
    bias = np.float32([1, 2, 3])
    child = apply(model, Plan(keep={name_of(model, 14): kept}, scale={"v": 2.0}, replace={"b": bias}))
    w, v = model.weights["w"].load(), model.weights["v"].load()
    assert np.array_equal(child.weights["w"].load(), w[:, kept])
    assert np.array_equal(child.weights["v"].load(), 2 * v[kept, :])
    assert np.array_equal(child.weights["b"].load(), bias)
    x = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    wanted = np.tanh(x @ w[:, kept] + bias) @ (2 * v[kept, :])
    assert difference(run(child, [{"x": x}])[0], {"y": wanted}) < 1e-6


def test_a_child_can_be_cut_again(graph):
    """What a cut adds to a graph has names of its own each time; onnxruntime refuses two nodes of one name."""
    model = graph("""(float[B, 12] x) => (float[B, 13] y) <float[12, 14] w, int64 zero = {0}, int64 one = {1},
        int64 last = {14}, float[14, 13] v>
        { h = MatMul(x, w)  r = Range(zero, last, one)  f = Cast <to = 1> (r)  c = Cos(f)  p = Mul(h, c)  y = MatMul(p, v) }""")
    x = {"x": np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)}
    once = apply(model, Plan(keep={name_of(model, 14): (1, 2, 5, 7, 9)}))
    twice = apply(once, Plan(keep={name_of(once, 5): (0, 3, 4)}))
    wanted = apply(model, Plan(keep={name_of(model, 14): (1, 7, 9)}))
    assert difference(run(twice, [x])[0], run(wanted, [x])[0]) < 1e-6


def test_what_a_plan_cannot_change(graph):
    model = graph("(float[B, 12] x) => (float[B, 14] y) <float[12, 14] w> { y = MatMul(x, w) }")
    with pytest.raises(CutError, match="'nothing' that the graph does not have"):
        apply(model, Plan(scale={"nothing": 2.0}))
    with pytest.raises(CutError, match=r"shape \(3,\); after the cut it has \(12, 14\)"):
        apply(model, Plan(replace={"w": np.zeros(3, np.float32)}))


def test_a_vector_that_unrelated_layers_share_is_cut_for_each(graph):
    model = graph("""(float[B, 12] x, float[B, 12] z) => (float[B, 13] y, float[B, 17] u)
        <float[12] g, float[12, 13] v, float[12, 17] w>
        { a = Mul(x, g)  y = MatMul(a, v)  b = Mul(z, g)  u = MatMul(b, w) }""")
    analysis = analyse(model)
    names = {d.name: d for d in analysis.dimensions if d.size == 12}
    assert len(names) == 2
    first, second = names
    child = apply(model, Plan(keep={first: (0, 1, 2), second: (4, 5)}), analysis)
    assert sorted(w.shape for name, w in child.weights.items() if name.startswith("g")) == [(2,), (3,)]


def test_a_tied_head_stays_one_tensor(graph):
    model = graph("""(int64[B, S] ids) => (float[B, S, 17] y) <float[17, 12] table>
        { h = Gather(table, ids)  a = Tanh(h)  t = Transpose <perm = [1, 0]> (table)  y = MatMul(a, t) }""")
    child = apply(model, Plan(keep={name_of(model, 12): (3, 4, 5)}))
    assert {name: weight.shape for name, weight in child.weights.items()} == {"table": (17, 3)}


# interface ------------------------------------------------------------------------------------------------------


def test_outputs_that_declare_no_shape_get_theirs(graph):
    """onnxruntime runs such a parent and onnx's checker refuses it; the child is a file that both accept."""
    model = graph("""(float[B, S, 12] x) => (float[B, S, 13] y) <float[12, 14] w, float[14, 13] v>
        { h = MatMul(x, w)  a = Tanh(h)  y = MatMul(a, v) }""")
    model.graph.outputs[0].shape = None
    assert "shape" in problem_of(model)
    child = apply(model, Plan(keep={name_of(model, 14): (0, 3), name_of(model, 13): range(5)}))
    assert shape(child.graph.outputs[0]) == ["B", "S", 5] and not problem_of(child)
    assert model.graph.outputs[0].shape is None


# stored sizes ---------------------------------------------------------------------------------------------------


def test_what_shape_reports_keeps_scales_as_they_were(graph):
    """A scale computed from a size keeps the parent's value; the Reshape beside it gets the new size."""
    model = graph("""(float[B, S, 12] x) => (float[B, S, 3, 5] y)
        <float[12, 15] w, int64 last = {3}, int64[4] to = {0, 0, 3, 5}>
        { h = MatMul(x, w)  r = Reshape(h, to)  s = Shape(r)  d = Gather(s, last)  f = Cast <to = 1> (d)
          q = Sqrt(f)  y = Div(r, q) }""")
    child = apply(model, Plan(keep={name_of(model, 5): (1, 4)}))
    x = np.random.default_rng(0).standard_normal((2, 7, 12)).astype(np.float32)
    w = model.weights["w"].load().reshape(12, 3, 5)[:, :, [1, 4]]
    wanted = np.einsum("bsd,dhe->bshe", x, w) / np.sqrt(5)
    assert difference(run(child, [{"x": x}])[0], {"y": wanted.astype(np.float32)}) < 1e-6


def test_what_is_computed_for_its_shape_alone_still_runs(graph):
    """Windows of tokens whose values nobody reads: the Reshape that counts them stores the width all the same."""
    model = graph("""(float[N, 4, 8] x) => (float[M, 2, 6] y)
        <float[8, 10] w, float[10, 6] u, int64[4] split = {-1, 2, 2, 10}, int64[3] windows = {-1, 2, 10},
        int64[1] first = {0}, int64[2] rest = {2, -1}>
        { h = MatMul(x, w)  p = Reshape(h, split)  t = Transpose <perm = [0, 2, 1, 3]> (p)
          r = Reshape(t, windows)  n = Shape(r)  c = Gather(n, first)  to = Concat <axis = 0> (c, rest)
          k = Reshape(t, to)  y = MatMul(k, u) }""")
    name = name_of(model, 10)
    child = apply(model, Plan(keep={name: (1, 4, 7)}))
    feeds = [{"x": np.ones((n, 4, 8), np.float32)} for n in (2, 3)]
    assert [result["y"].shape for result in run(child, feeds)] == [(4, 2, 6), (6, 2, 6)]


def test_a_target_computed_from_the_sequence_still_follows_it(graph):
    model = graph("""(float[B, S, 12] x) => (float[B, S, 3, 5] y) <float[12, 15] w, int64[1] b = {0}, int64[1] s = {1},
        int64[2] tail = {3, 5}>
        { h = MatMul(x, w)  n = Shape(x)  bb = Gather(n, b)  ss = Gather(n, s)
          to = Concat <axis = 0> (bb, ss, tail)  y = Reshape(h, to) }""")
    child = apply(model, Plan(keep={name_of(model, 5): (0, 1), name_of(model, 3): (2,)}))
    for batch, length in ((2, 7), (5, 1)):
        x = np.ones((batch, length, 12), np.float32)
        assert run(child, [{"x": x}])[0]["y"].shape == (batch, length, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "s = ReduceSum <keepdims = 1> (q, last)  m = Div(s, n)",
        "s = ReduceSum <keepdims = 1> (q, last)  m = Mul(s, i)",
        "m = MatMul(q, u)",
    ],
    ids=["divided by 12", "multiplied by 1/12", "contracted with 1/12"],
)
def test_the_denominator_of_a_mean_follows_the_cut(graph, text):
    twelfth = ", ".join(["0.083333336"] * 12)
    model = graph(f"""(float[B, 9] x) => (float[B, 10] y) <float[9, 12] w, float[12, 10] v, int64[1] last = {{-1}},
        float n = {{12.0}}, float i = {{0.083333336}}, float[12, 1] u = {{{twelfth}}}>
        {{ h = MatMul(x, w)  q = Mul(h, h)  {text}  r = Sqrt(m)  z = Div(h, r)  y = MatMul(z, v) }}""")
    kept = (0, 3, 7, 8, 11)
    child = apply(model, Plan(keep={name_of(model, 12): kept}))
    x = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    h = x @ model.weights["w"].load()[:, kept]
    wanted = h / np.sqrt(np.mean(h * h, -1, keepdims=True)) @ model.weights["v"].load()[kept, :]
    assert difference(run(child, [{"x": x}])[0], {"y": wanted}) < 1e-6


def test_a_scale_that_only_depends_on_a_size_keeps_its_value(graph):
    model = graph("""(float[B, S, 12] x) => (float[B, S, S] y)
        <float[12, 9] wq, float[12, 9] wk, float scale = {0.33333334}>
        { q = MatMul(x, wq)  k = MatMul(x, wk)  t = Transpose <perm = [0, 2, 1]> (k)
          s = MatMul(q, t)  y = Mul(s, scale) }""")
    child = apply(model, Plan(keep={name_of(model, 9): (0, 1, 2)}))
    assert float(child.weights["scale"].load()) == pytest.approx(1 / 3)


# interfaces -----------------------------------------------------------------------------------------------------


def test_inputs_outputs_and_inner_tensors_declare_the_new_sizes(graph):
    model = graph("""(float[B, S, 12] x) => (float[B, S, 12] y) <float[12, 14] w, float[14, 12] v, float[B, S, 14] h>
        { h = MatMul(x, w)  y = MatMul(h, v) }""")
    proto = apply(model, Plan(keep={name: (0, 1, 2) for name in [name_of(model, 14)]})).to_proto()
    onnx.checker.check_model(proto, full_check=True)
    inner = {
        item.name: [d.dim_value or d.dim_param for d in item.type.tensor_type.shape.dim]
        for item in proto.graph.value_info
    }
    assert inner.get("h", ["B", "S", 3]) == ["B", "S", 3]


def test_a_symbol_of_a_size_that_the_cut_changed_is_declared_no_more(graph):
    """onnxruntime gives tensors that declare the same symbol each other's memory."""
    model = graph("""(float[B, 12] x) => (float[B, 12] y) <float[12, 21] w, float[21, 12] v, int64[2] apart = {-1, 7},
        int64[2] together = {-1, 21}>
        { h = MatMul(x, w)  a = Reshape(h, apart)  r = Relu(a)  t = Reshape(r, together)  y = MatMul(t, v) }""")
    for name, shape in (("h", ["B", 21]), ("a", ["3*B", 7]), ("r", ["3*B", 7])):
        model.graph.tensors()[name].dtype, model.graph.tensors()[name].shape = np.dtype(np.float32), shape
    child = apply(model, Plan(keep={name_of(model, 3): (0, 2)})).graph.tensors()
    assert (child["h"].shape, child["a"].shape, child["r"].shape) == (["B", 14], [None, 7], [None, 7])


def test_a_float_input_and_output_are_cut_with_their_dimension(graph):
    model = graph("(float[B, S, 12] x) => (float[B, S, 12] y) <float[12] g> { y = Mul(x, g) }")
    child = apply(model, Plan(keep={name_of(model, 12): (0, 5)}))
    assert shape(child.inputs[0]) == shape(child.outputs[0]) == ["B", "S", 2]


def test_caches_are_cut_dropped_and_renumbered(gpt2):
    child = apply(gpt2, Plan(keep={"blocks.*.heads": (3, 1), "blocks.*.head_dim": (0, 1, 2)}, blocks={"": (0, 2)}))
    caches = {tensor.name: shape(tensor) for tensor in child.inputs if tensor.name.startswith("past_key_values")}
    assert [name.split(".")[1] for name in caches] == ["0", "0", "1", "1"]
    assert {(sizes[1], sizes[3]) for sizes in caches.values()} == {(2, 3)}
    assert [t.name for t in child.outputs if t.name.startswith("present")] == [
        f"present.{block}.{kind}" for block in (0, 1) for kind in ("key", "value")
    ]


FUSED_BLOCK = """
    q_{i} = MatMul(n_{i}, layer_{i}_q)  k_{i} = MatMul(n_{i}, layer_{i}_k)  v_{i} = MatMul(n_{i}, layer_{i}_v)
    a_{i}, present_{i}_key, present_{i}_value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
        (q_{i}, k_{i}, v_{i}, past_{i}_key, past_{i}_value, last, length)
    o_{i} = MatMul(a_{i}, layer_{i}_o)
    m_{i}, , , s_{i} = com.microsoft.SkipSimplifiedLayerNormalization (x_{i}, o_{i}, layer_{i}_g)
    u_{i} = MatMul(m_{i}, layer_{i}_u)  r_{i} = Relu(u_{i})  d_{i} = MatMul(r_{i}, layer_{i}_d)
    n_{j}, , , x_{j} = com.microsoft.SkipSimplifiedLayerNormalization (s_{i}, d_{i}, layer_{i}_f)"""


def fused_blocks() -> str:
    """Return a decoder of three fused blocks."""
    numbers = range(3)
    past = ", ".join(f"float[B, 2, P, 8] past_{i}_{kind}" for i in numbers for kind in ("key", "value"))
    given = ", ".join(f"float[B, 2, L, 8] present_{i}_{kind}" for i in numbers for kind in ("key", "value"))
    sizes = {"q": "12, 32", "k": "12, 16", "v": "12, 16", "o": "32, 12"}
    sizes |= {"g": "12", "u": "12, 20", "d": "20, 12", "f": "12"}
    weights = ", ".join(f"float[{size}] layer_{i}_{name}" for i in numbers for name, size in sizes.items())
    blocks = "".join(FUSED_BLOCK.format(i=i, j=i + 1) for i in numbers)
    return (
        f"(int64[B, T] ids, int32[B] last, int32 length, {past}) => (float[B, T, 12] y, {given})"
        f"<float[17, 12] table, float[12] first, {weights}>"
        f"{{ x_0 = Gather(table, ids)  n_0 = SimplifiedLayerNormalization(x_0, first) {blocks} y = Identity(n_3) }}"
    )


@pytest.mark.parametrize("steps", ["width{head_dim=4 by=first}", None])
def test_heads_are_cut_in_the_steps_that_an_operator_admits(graph, steps):
    """onnxruntime groups queries of heads that are a multiple of 8."""
    model = graph(fused_blocks().replace("12, 32", "12, 64").replace("12, 16", "12, 32").replace("32, 12", "64, 12")
                  .replace(", 8]", ", 16]"))  # fmt: skip
    child = apply(model, Plan(keep={"blocks.*.head_dim": range(8)}))
    assert shape(child.inputs[3]) == ["B", 2, "P", 8]
    with pytest.raises(CutError, match=r"GroupQueryAttention node .* takes .* (give|keep) 8"):
        Pipeline.parse(steps).plan(model) if steps else apply(model, Plan(keep={"blocks.*.head_dim": range(4)}))


def test_caches_of_fused_blocks_go_with_them(graph):
    model = graph(fused_blocks())
    child = apply(model, Plan(blocks={"": (0, 2)}))
    assert [t.name for t in child.inputs][3:] == [f"past_{i}_{kind}" for i in (0, 1) for kind in ("key", "value")]
    assert [t.name for t in child.outputs][1:] == [f"present_{i}_{kind}" for i in (0, 1) for kind in ("key", "value")]
    assert sum(node.op == "GroupQueryAttention" for node in child.graph.nodes) == 2


# names ----------------------------------------------------------------------------------------------------------


def test_kept_blocks_are_renumbered_and_remember_where_they_came_from(gpt2):
    child = apply(gpt2, Plan(blocks={"": (0, 2)}))
    blocks = {part for name in child.weights for part in name.split(".") if part.isdigit()}
    assert blocks == {"0", "1"}
    assert child.metadata["graphclone.blocks"] == "0,2"
    assert child.metadata["graphclone.parent"] == gpt2.fingerprint


def test_tables_that_all_blocks_read_are_not_numbered_as_blocks(gpt2):
    model = gpt2.copy()
    found = [node for node in model.graph.nodes if node.op == "Softmax"]
    size, wide = gs.Variable("size", np.int64), gs.Variable("wide", np.float32)
    model.graph.nodes.append(gs.Node("Size", "Size", {}, [found[0].inputs[0]], [size]))
    model.graph.nodes.append(gs.Node("Cast", "Cast", {"to": onnx.TensorProto.FLOAT}, [size], [wide]))
    tables = [gs.Variable(f"tables/Neg_{number}_output_0", np.float32) for number in range(4)]
    for number, table in enumerate(tables):
        model.graph.nodes.append(gs.Node("Neg", f"tables/Neg_{number}", {}, [wide], [table]))
    for softmax in found:
        for number, table in enumerate(tables):
            softmax_input = softmax.inputs[0]
            softmax.inputs[0] = gs.Variable(f"{softmax.name}/added_{number}", np.float32)
            added = gs.Node("Add", f"{softmax.name}/Add_{number}", {}, [softmax_input, table], [softmax.inputs[0]])
            model.graph.nodes.append(added)
    model.graph.toposort()
    child = apply(model, Plan(blocks={"": (1, 2)}))
    assert {node.name for node in child.graph.nodes if node.op == "Neg"} >= {f"tables/Neg_{n}" for n in range(4)}
    assert len({node.name for node in child.graph.nodes}) == len(child.graph.nodes)


def test_layers_that_alternate_are_not_numbered_as_blocks(graph):
    """Modules 0 and 1 make the first block, 2 and 3 the second: it is not that each is called by one more."""
    module = ("q{n} = MatMul(x{n}, b_{n}_q)  t{n} = Transpose <perm = [0, 2, 1]> (x{n})  s{n} = MatMul(q{n}, t{n}) "
              "p{n} = Softmax(s{n})  v{n} = MatMul(p{n}, x{n})  o{n} = MatMul(v{n}, b_{n}_o)  x{m} = Add(x{n}, o{n}) ",
              "h{n} = MatMul(x{n}, b_{n}_u)  r{n} = Relu(h{n})  o{n} = MatMul(r{n}, b_{n}_d)  x{m} = Add(x{n}, o{n}) ")  # fmt: skip
    lines = "".join(module[n % 2].format(n=n, m=n + 1) for n in range(4))
    weights = ", ".join(f"float[6, 6] b_{n}_{'uq'[n % 2 == 0]}, float[6, 6] b_{n}_{'do'[n % 2 == 0]}" for n in range(4))
    model = graph(
        f"(float[B, S, 5] x) => (float[B, S, 6] x4) <float[5, 6] i, {weights}> {{ x0 = MatMul(x, i) {lines} }}"
    )
    assert [len(stack.blocks) for stack in analyse(model).stacks] == [2]
    child = apply(model, Plan(blocks={"": (1,)}))
    assert set(child.weights) == {"i", "b_2_q", "b_2_o", "b_3_u", "b_3_d"}


def test_the_last_block_takes_a_turn_of_the_stream_along(graph):
    blocks = " ".join(
        f"c{i} = Conv(x{i}, a) r{i} = Relu(c{i}) d{i} = Conv(r{i}, b) s{i} = Add(d{i}, x{i}) "
        f"t{i} = Transpose<perm = [0, 2, 1]>(s{i}) n{i} = LayerNormalization(t{i}, g) "
        + (f"x{i + 1} = Transpose<perm = [0, 2, 1]>(n{i})" if i < 2 else "y = Identity(n2)")
        for i in range(3)
    )
    model = graph(f"""(int64[B, S] ids) => (float[B, S, 6] y)
        <float[9, 6] e, float[5, 6, 1] a, float[6, 5, 1] b, float[6] g>
        {{ h = Gather(e, ids) x0 = Transpose<perm = [0, 2, 1]>(h) {blocks} }}""")
    assert [len(stack.blocks) for stack in analyse(model).stacks] == [3]
    ids = {"ids": np.arange(8).reshape(2, 4)}
    first, last = (run(apply(model, Plan(blocks={"": kept})), [ids])[0]["y"] for kept in ((1, 2), (0, 1)))
    assert last.shape == (2, 4, 6) and np.array_equal(first, last)  # all three have the same weights


def test_a_dropped_block_leaves_no_weight_behind(gpt2):
    child = apply(gpt2, Plan(blocks={"": (0,)}))
    count = sum(weight.size for weight in child.weights.values())
    again = analyse(child)
    assert [len(stack.blocks) for stack in again.stacks] == [1]
    assert count < sum(weight.size for weight in gpt2.weights.values())


def test_a_cut_can_be_cut_again(gpt2):
    once = apply(gpt2, Plan(keep={"hidden": tuple(range(0, 32, 2)), "blocks.*.ffn": tuple(range(20))}))
    twice = apply(once, Plan(keep={"hidden": (0, 2, 4), "blocks.*.ffn": (19, 1)}))
    directly = apply(gpt2, Plan(keep={"hidden": (0, 4, 8), "blocks.*.ffn": (19, 1)}))
    for name in gpt2.weights.keys() & twice.weights.keys():
        if gpt2.weights[name].dtype.kind == "f":
            assert np.array_equal(twice.weights[name].load(), directly.weights[name].load()), name
    _, probes = next(candidates(directly, analyse(directly).typing))
    assert difference(run(twice, probes)[0], run(directly, probes)[0]) == 0


# sizes of a dynamic and a static part ---------------------------------------------------------------------------

BESIDE = """(float[B, S, 12] x) => (float[B, T, {out}] y) <float[1, 6, 12] tokens, float[12, 8] w, int64[1] six = {{6}},
    int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[2] rest = {{2, 4}},
    int64[2] whole = {{6, 12}}, int64[1] eight = {{8}}> {{
    s = Shape(x)  b = Slice(s, zero, one)  n = Slice(s, one, two)  all = Concat <axis = 0> (b, whole)
    t = Expand(tokens, all)  j = Concat <axis = 1> (x, t)  h = MatMul(j, w)  m = Add(n, six)
    {to}  y = Reshape(h, to) }}"""


def test_learned_tokens_beside_a_dynamic_sequence(graph):
    """A size that arithmetic made of both gets smaller by the difference, whatever the length is."""
    model = graph(BESIDE.format(out="2, 4", to="to = Concat <axis = 0> (b, m, rest)"))
    tokens = name_of(model, 6)
    child = apply(model, Plan(keep={tokens: (0, 2, 5)}))
    kept = load_with(model, child, lengths=(1, 4, 9))
    assert [y.shape for _, y in kept] == [(2, length + 3, 2, 4) for length in (1, 4, 9)]
    assert all(np.array_equal(np.delete(whole, [-5, -3, -2], axis=1), y) for whole, y in kept)


def load_with(model: Model, child: Model, lengths: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the outputs of both for inputs of each length."""
    draw = np.random.default_rng(0)
    feeds = [{"x": draw.standard_normal((2, length, 12)).astype(np.float32)} for length in lengths]
    return [(a["y"], b["y"]) for a, b in zip(run(model, feeds), run(child, feeds), strict=True)]


def test_a_product_of_both_is_refused(graph):
    text = BESIDE.format(out="8", to="c = Mul(b, m)  to = Concat <axis = 0> (c, eight)")
    model = graph(text.replace("B, T, 8", "T, 8"))
    with pytest.raises(CutError, match=r"Reshape node '.*' reads a size of which a part that is cut and a dynamic one"):
        apply(model, Plan(keep={name_of(model, 6): (0, 2, 5)}))
