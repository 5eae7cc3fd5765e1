"""Names of widths: the same for the same model, however its nodes are ordered."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from graphclone.analysis import analyse
from graphclone.axes.axis import leaves
from graphclone.graphs import constants
from graphclone.model import Model, load
from graphclone.pytorch import to_torch
from graphclone.verify import verify
from graphclone.verify.running import run
from graphclone.weights import Weight

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
    atoms = {
        name: {id(leaf) for axis in d.axes for leaf in leaves(axis)} for d in analysis.dimensions for name in d.names
    }
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


WRITTEN_OUT = """(float[B, S, 12] x, float[B, S, 12] z) => (float[B, S, 12] y) <
    float[12, 12] q, float[12, 12] k, float[12, 12] o, int64[3] split = {-1, 7, 12}, int64[1] width = {12},
    int64[1] length = {7}, int64[1] first = {0}, int64[1] second = {1}> {
    s = Shape(x)  b = Slice(s, first, second)  to = Concat <axis = 0> (b, length, width)
    e = Add(x, z)  a = MatMul(e, q)  c = MatMul(e, k)  d = Reshape(c, to)  t = Transpose <perm = [0, 2, 1]> (d)
    m = MatMul(a, t)  p = Softmax(m)  v = MatMul(p, e)  w = MatMul(v, o)  y = Add(e, w) }"""


PLAIN = """(float[B, 3, 24, 24] pixels) => (float[B, 14] y) <float[12, 3, 8, 8] w, float[15, 12] v, float[14, 15] u> {
    p = Conv(pixels, w)  m = GlobalAveragePool(p)  f = Flatten(m)  a = Tanh(f)
    h = Gemm <transB = 1> (a, v)  r = Relu(h)  y = Gemm <transB = 1> (r, u) }"""
ROUNDED = """(float[B, 3, 24, 24] pixels) => (float[B, 14] y)
    <int8[12, 3, 8, 8] w8, int8[15, 12] v8, int8[14, 15] u8, float s = {0.1}, uint8 z = {128}> {
    u = DequantizeLinear(u8, s)  q = QuantizeLinear(pixels, s, z)  v = DequantizeLinear(v8, s)
    d = DequantizeLinear(q, s, z)  w = DequantizeLinear(w8, s)
    p = Conv(d, w)  m = GlobalAveragePool(p)  f = Flatten(m)  a = Tanh(f)
    h = Gemm <transB = 1> (a, v)  r = Relu(h)  y = Gemm <transB = 1> (r, u) }"""
DYNAMIC = """(float[B, 3, 24, 24] pixels) => (float[B, 14] y)
    <int8[12, 3, 8, 8] w8, int8[15, 12] v8, int8[14, 15] u8, float s = {0.1}> {
    u = DequantizeLinear(u8, s)  v = DequantizeLinear(v8, s)
    q, t, z = DynamicQuantizeLinear(pixels)
    i = ConvInteger(q, w8, z)  c = Cast <to = 1> (i)  p = Mul(c, t)
    m = GlobalAveragePool(p)  f = Flatten(m)  a = Tanh(f)
    h = Gemm <transB = 1> (a, v)  r = Relu(h)  y = Gemm <transB = 1> (r, u) }"""


@pytest.mark.parametrize("text", [PLAIN, ROUNDED, DYNAMIC], ids=["plain", "rounded", "dynamic"])
def test_rounding_changes_no_name(graph, text: str) -> None:
    """Quantizers put scales before weights and rounding before convolutions; an image's channels stay fixed."""
    found = [(d.name, d.size, d.locked is not None) for d in analyse(graph(text)).dimensions if d.name[:3] != "pos"]
    free = [("head_0", 12, False), ("head_1", 15, False), ("head_2", 14, False)]
    assert sorted(found) == sorted([*free, ("channels", 3, True), ("kernel", 8, True), ("kernel_1", 8, True)])


def test_a_length_that_an_exporter_wrote_into_a_reshape(graph) -> None:
    model = graph(WRITTEN_OUT)
    analysis = analyse(model)
    assert analysis.typing.written == {"S": (7, "Reshape node 'Reshape_6'")}
    assert [d.name for d in analysis.dimensions if not d.locked] == [
        "hidden", "blocks.0.head_dim", "blocks.0.v_head_dim"
    ]  # fmt: skip
    assert analysis.typing.types["x"][1].lock == "axis 1 of graph input 'x'"
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal((3, 7, 12)).astype(np.float32) for name in ("x", "z")}
    given = to_torch(model)(*map(torch.from_numpy, feeds.values()))
    assert np.abs(given.detach().numpy() - run(model, [feeds])[0]["y"]).max() < 1e-5


BATCH_OF_ANOTHER = """(int64[A, S] read, int64[B, T] ids) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 18] q, float[12, 18] k, float[18, 12] o, int64[2] split = {3, 6},
    int64[1] free = {-1}, int64[3] joined = {0, 0, 18}, int64[1] first = {0}, int64[1] second = {1}> {
    x = Gather(table, ids)  e = Gather(table, read)  s = Shape(ids)  b = Slice(s, first, second)
    to = Concat <axis = 0> (b, free, split)
    a = MatMul(x, q)  c = Reshape(a, to)  d = Transpose <perm = [0, 2, 1, 3]> (c)
    f = MatMul(e, k)  g = Reshape(f, to)  h = Transpose <perm = [0, 2, 3, 1]> (g)
    l = Transpose <perm = [0, 2, 1, 3]> (g)
    m = MatMul(d, h)  p = Softmax(m)  n = MatMul(p, l)  t = Transpose <perm = [0, 2, 1, 3]> (n)  u = Reshape(t, joined)
    v = MatMul(u, o)  y = Add(x, v) }"""


def test_a_batch_that_groups_what_was_read_by_another_name(graph) -> None:
    model = graph(BATCH_OF_ANOTHER)
    analysis = analyse(model)
    assert {d.name: d.locked for d in analysis.dimensions} == dict.fromkeys(
        ["hidden", "blocks.0.cross_heads", "blocks.0.cross_head_dim", "vocab"]
    )
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


GROUPED = """(int64[B, T] ids) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 30] q, float[12, 10] k, float[12, 14] v, float[42, 12] o,
    int64[5] groups = {0, 0, 2, 3, 5}, int64[4] keys = {0, 0, 2, 5}, int64[4] values = {0, 0, 2, 7},
    int64[3] all = {0, 0, 42}> {
    x = Gather(table, ids)
    a = MatMul(x, q)  c = Reshape(a, groups)  e = MatMul(x, k)  f = Reshape(e, keys)
    g = MatMul(x, v)  h = Reshape(g, values)
    m = Einsum <equation = "btkgd,bskd->bkgts"> (c, f)  p = Softmax(m)
    n = Einsum <equation = "bkgts,bskd->btkgd"> (p, h)  u = Reshape(n, all)  w = MatMul(u, o)  y = Add(x, w) }"""

ONE_HEAD_OF_KEYS = """(int64[B, T] ids) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 15] q, float[12, 5] k, float[12, 7] v, float[21, 12] o,
    int64[4] heads = {0, 0, 3, 5}, int64[3] all = {0, 0, 21}> {
    x = Gather(table, ids)  a = MatMul(x, q)  c = Reshape(a, heads)  f = MatMul(x, k)  h = MatMul(x, v)
    m = Einsum <equation = "bthd,bsd->bhts"> (c, f)  p = Softmax(m)
    n = Einsum <equation = "bhts,bsd->bthd"> (p, h)  u = Reshape(n, all)  w = MatMul(u, o)  y = Add(x, w) }"""

SINK = """(int64[B, T] ids) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 15] q, float[12, 15] k, float[12, 15] v, float[15, 12] o, float[1, 3, 1, 1] sink,
    int64[4] heads = {0, 0, 3, 5}, int64[3] all = {0, 0, 15}, int64[1] start = {0}, int64[1] end = {-1},
    int64[1] last = {-1}, int64[1] one = {1}, int64[1] three = {3}, int64[1] zero = {0}, int64[1] two = {2}> {
    x = Gather(table, ids)  a = MatMul(x, q)  c = Reshape(a, heads)  e = MatMul(x, k)  f = Reshape(e, heads)
    g = MatMul(x, v)  h = Reshape(g, heads)
    m = Einsum <equation = "bthd,bshd->bhts"> (c, f)  s = Shape(m)  rows = Slice(s, zero, three)
    size = Concat <axis = 0> (rows, one)  beside = Expand(sink, size)  both = Concat <axis = -1> (m, beside)
    p = Softmax(both)  r = Slice(p, start, end, last)
    n = Einsum <equation = "bhts,bshd->bthd"> (r, h)  u = Reshape(n, all)  w = MatMul(u, o)  y = Add(x, w) }"""

PROJECTED = """(int64[B, T] ids) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 3, 5] q, float[12, 3, 5] k, float[12, 3, 7] v, float[3, 7, 12] o,
    int64[3] long = {{0, 0, -1}}, int64[3] wide = {{0, -1, 12}}> {{
    x = Gather(table, ids)
    c = Einsum <equation = "btd,dhk->bthk"> (x, q)  f = Einsum <equation = "btd,dhk->bthk"> (x, k)
    g = Einsum <equation = "btd,dhk->bthk"> (x, v)  e = Einsum <equation = "bshk,hkd->bshd"> (g, o)
    m = Einsum <equation = "bthk,bshk->bhts"> (c, f)  p = Softmax(m)
    {mixed}  y = Add(x, w) }}"""
PROJECTED_IN_TWO_AXES = PROJECTED.format(mixed="""w = Einsum <equation = "bhts,bshd->btd"> (p, e)""")
PROJECTED_IN_ONE = PROJECTED.format(
    mixed="""n = Transpose <perm = [0, 2, 1, 3]> (p)  r = Reshape(n, long)
    u = Transpose <perm = [0, 2, 1, 3]> (e)  z = Reshape(u, wide)  w = MatMul(r, z)"""
)


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        (PROJECTED_IN_TWO_AXES, {"heads": 3, "head_dim": 5, "v_head_dim": 7}),
        (PROJECTED_IN_ONE, {"heads": 3, "head_dim": 5, "v_head_dim": 7}),
        (GROUPED, {"kv_heads": 2, "queries_per_kv": 3, "head_dim": 5, "v_head_dim": 7}),
        (ONE_HEAD_OF_KEYS, {"heads": 3, "head_dim": 5, "v_head_dim": 7}),
        (SINK, {"heads": 3, "head_dim": 5, "v_head_dim": 5}),
    ],
)
def test_heads_of_attention_however_it_is_written(graph, text: str, heads: dict[str, int]) -> None:
    model = graph(text)
    analysis = analyse(model)
    sizes = {d.name: d.size for d in analysis.dimensions if not d.locked}
    assert sizes == {"hidden": 12, "vocab": 17} | {f"blocks.0.{name}": size for name, size in heads.items()}
    assert [half.kind for stack in analysis.stacks for block in stack.blocks for half in block.halves] == ["attention"]
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


LAYER = """c{i} = Einsum <equation = "btd,dhk->bthk"> (x{i}, q{i})
    f{i} = Einsum <equation = "btd,dhk->bthk"> (x{i}, k{i})
    m{i} = Einsum <equation = "bthk,bshk->bhts"> (c{i}, f{i})  s{i} = Mul(m{i}, scale)
    a{i} = Where(mask, s{i}, forbidden)  p{i} = Softmax(a{i})
    g{i} = Einsum <equation = "btd,dhk->bthk"> (x{i}, v{i})  n{i} = Einsum <equation = "bhts,bshk->bthk"> (p{i}, g{i})
    w{i} = Einsum <equation = "bthk,hkd->btd"> (n{i}, o{i})  x{j} = Add(x{i}, w{i})
"""
FORBIDDEN = f"""(int64[B, 4] ids) => (float[B, 4, 12] x2) <
    float[17, 12] table, bool[4, 4] mask, float[1, 3, 4, 4] forbidden, float[12, 3, 5] q0, float[12, 3, 5] k0,
    float[12, 3, 5] v0, float[3, 5, 12] o0, float[12, 3, 5] q1, float[12, 3, 5] k1, float[12, 3, 5] v1,
    float[3, 5, 12] o1, float scale = {{0.001}}> {{
    x0 = Gather(table, ids)  {LAYER.format(i=0, j=1)}{LAYER.format(i=1, j=2)} }}"""


@pytest.mark.parametrize(("number", "layers"), [(-1e9, 1), (-np.inf, 1), (0.5, 2)])
def test_heads_are_not_tied_by_what_scores_are_where_all_layers_forbid_them(graph, number: float, layers: int) -> None:
    model = graph(FORBIDDEN)
    stored = {"forbidden": np.full((1, 3, 4, 4), number, np.float32), "mask": np.tri(4, dtype=bool)}
    for constant in constants(model.graph):
        if constant.name in stored:
            constant._values = Weight.of(stored[constant.name])
    analysis = analyse(model)
    assert {len(d.blocks) for d in analysis.dimensions if d.role == "heads"} == {layers}
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


ROTARY = """(int64[B, T] ids, int32[B] last, int32 length) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 96] q, float[12, 32] k, float[12, 32] v, float[96, 12] o,
    float[40, 8] c, float[40, 8] s> {
    x = Gather(table, ids)  a = MatMul(x, q)  e = MatMul(x, k)  g = MatMul(x, v)
    n = com.microsoft.GroupQueryAttention <num_heads = 6, kv_num_heads = 2, do_rotary = 1>
        (a, e, g, , , last, length, c, s)
    w = MatMul(n, o)  y = Add(x, w) }"""


def test_a_head_that_an_operator_turns_is_named_by_all_its_indices(graph) -> None:
    named = {d.name: d.size for d in analyse(graph(ROTARY)).dimensions if not d.locked}
    heads = {"blocks.0.kv_heads": 2, "blocks.0.queries_per_kv": 3, "blocks.0.head_dim": 16}
    assert named == {"hidden": 12, "vocab": 17} | heads


def test_the_length_of_ids_is_a_number_of_positions(graph) -> None:
    model = graph(
        "(int64[B, 7] ids, float[B, 7, 3] x) => (float[B, 7, 5] y)"
        " <float[17, 5] table, float[7, 5] places, float[3, 5] w> {"
        " e = Gather(table, ids)  p = Add(e, places)  c = MatMul(x, w)  y = Add(p, c) }"
    )
    assert {d.name: d.size for d in analyse(model).dimensions if d.locked} == {"positions": 7}


GRID = """(float[B, 3, 4, 6] x) => (float[B, 3, 4, 12] y) <float[6, 12] enter, float[12, 10] wq, float[12, 10] wk,
    float[12, 14] wv, float[14, 12] wo, int64[3] flat = {0, -1, 10}, int64[3] values = {0, -1, 14},
    int64[4] grid = {-1, 3, 4, 14}> {
    e = MatMul(x, enter)  q4 = MatMul(e, wq)  k4 = MatMul(e, wk)  v4 = MatMul(e, wv)
    q = Reshape(q4, flat)  k = Reshape(k4, flat)  v = Reshape(v4, values)  t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul(q, t)  p = Softmax(s)  m = MatMul(p, v)  back = Reshape(m, grid)  o = MatMul(back, wo)  y = Add(e, o) }"""


def test_positions_may_be_those_of_a_grid(graph) -> None:
    named = {d.name: d.size for d in analyse(graph(GRID)).dimensions if d.name.startswith("blocks")}
    assert named == {"blocks.0.head_dim": 10, "blocks.0.v_head_dim": 14}


BATCHES_APART = """(float[A, T, 12] x, float[B, S, 12] memory) => (float[A, T, 12] y) <
    float[12, 15] wq, float[12, 15] wk, float[12, 15] wv, float[15, 12] wo, int64[4] apart = {0, 0, 3, 5},
    int64[2] first = {0, 1}, int64[1] last = {3}, int64[1] rest = {-1}, int64[3] joined = {0, 0, 15}> {
    q = MatMul(x, wq)  q4 = Reshape(q, apart)  qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    k = MatMul(memory, wk)  k4 = Reshape(k, apart)  kt = Transpose <perm = [0, 2, 1, 3]> (k4)
    v = MatMul(memory, wv)  v4 = Reshape(v, apart)  vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    qs = Shape(qt)  qb = Gather(qs, first)  qn = ReduceProd <keepdims = 1> (qb)  qd = Gather(qs, last)
    ks = Shape(kt)  kb = Gather(ks, first)  kn = ReduceProd <keepdims = 1> (kb)  kd = Gather(ks, last)
    qz = Concat <axis = 0> (qn, rest, qd)  q3 = Reshape(qt, qz)  kz = Concat <axis = 0> (kn, rest, kd)
    k3 = Reshape(kt, kz)  v3 = Reshape(vt, kz)  kf = Transpose <perm = [0, 2, 1]> (k3)
    s = MatMul(q3, kf)  p = Softmax(s)  c = MatMul(p, v3)  c4 = Reshape(c, qs)
    ct = Transpose <perm = [0, 2, 1, 3]> (c4)  c2 = Reshape(ct, joined)  o = MatMul(c2, wo)  y = Add(x, o) }"""


def test_batches_named_apart_are_one_also_where_they_are_joined_with_heads(graph) -> None:
    """Keras on TensorFlow names the batch of each input apart, and tf2onnx multiplies an einsum's with its heads."""
    model = graph(BATCHES_APART)
    found = {d.name: d for d in analyse(model).dimensions if d.locked is None}
    assert found["blocks.0.cross_heads"].size == 3 and found["blocks.0.cross_head_dim"].size == 5
    assert verify(model).ok
