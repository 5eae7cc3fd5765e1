"""Break axis rules on purpose: the oracles must notice each, on a graph where the rule matters."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from graphclone.axes import load_rules
from graphclone.axes.registry import RULES, Rule, Typing
from graphclone.op import Op
from graphclone.verify import verify

FFN = """(float[B, S, 12] x) => (float[B, S, 15] y) <float[12, 14] w1, float[14] b1, float[14, 15] w2>
    { h = MatMul(x, w1)  a = Add(h, b1)  t = Tanh(a)  y = MatMul(t, w2) }"""

EMBEDDING = """(int64[B, S] ids) => (float[B, S, 13] y) <float[17, 12] table, float[12, 13] w>
    { h = Gather(table, ids)  y = MatMul(h, w) }"""

HEADS = """(float[B, S, 12] x) => (float[B, S, 12] y)
    <float[12, 15] wq, float[12, 15] wk, float[12, 15] wv, float[15, 12] wo, int64[4] apart = {0, 0, 3, 5},
     int64[3] joint = {0, 0, 15}>
    {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        q4 = Reshape(q, apart)  k4 = Reshape(k, apart)  v4 = Reshape(v, apart)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        scores = MatMul(qh, kh)  p = Softmax(scores)  c = MatMul(p, vh)
        c4 = Transpose <perm = [0, 2, 1, 3]> (c)  merged = Reshape(c4, joint)  y = MatMul(merged, wo)
    }"""

FUSED = """(float[B, S, 12] x) => (float[B, S, 12] y)
    <float[12, 45] wqkv, float[15, 12] wo, int64[3] parts = {15, 15, 15}>
    {
        qkv = MatMul(x, wqkv)  q, k, v = Split <axis = -1> (qkv, parts)
        c = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v)  y = MatMul(c, wo)
    }"""

ATTENTION = """(float[B, S, 12] x) => (float[B, S, 12] y) <float[12, 18] wq, float[12, 18] wk, float[12, 18] wv,
    float[18, 12] wo>
    { q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
      c = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v)  y = MatMul(c, wo) }"""

OVER_HEADS = HEADS.replace("Softmax", "Softmax <axis = 1>")

NORM = """(float[B, S, 12] x) => (float[B, S, 13] y) <float[12] g, float[12] b, float[12, 13] w>
    { n = LayerNormalization <axis = -1> (x, g, b)  y = MatMul(n, w) }"""

HALVES = """(float[B, S, 12] x) => (float[B, S, 13] y)
    <float[12, 14] w, float[14, 13] v, int64[1] zero = {0}, int64[1] seven = {7},
     int64[1] end = {9223372036854775807}, int64[1] last = {-1}>
    { h = MatMul(x, w)  a = Slice(h, zero, seven, last)  b = Slice(h, seven, end, last)
      n = Neg(b)  r = Concat <axis = -1> (n, a)  s = Sigmoid(r)  y = MatMul(s, v) }"""

LATE = HALVES.replace("seven = {7}", "seven = {6}")

GATED = """(float[B, S, 12] x) => (float[B, S, 13] y) <float[12, 14] w, float[7, 13] v, int64[2] parts = {7, 7}>
    { h = MatMul(x, w)  a, b = Split <axis = -1> (h, parts)  g = Sigmoid(a)  m = Mul(g, b)  y = MatMul(m, v) }"""

UNEVEN = """(float[B, S, 12] x) => (float[B, S, 13] y) <float[12, 14] w, float[14, 13] v, int64[2] parts = {6, 8}>
    { h = MatMul(x, w)  a, b = Split <axis = -1> (h, parts)  t = Tanh(a)  c = Concat <axis = -1> (t, b)
      y = MatMul(c, v) }"""

SQUARE = """(float[B, 12] x) => (float[B, 13] y) <float[12, 12] w, float[12, 13] v>
    { t = Transpose <perm = [1, 0]> (w)  h = MatMul(x, t)  a = Tanh(h)  y = MatMul(a, v) }"""

GEMM = """(float[B, 12] x) => (float[B, 13] y) <float[14, 12] w, float[14] b, float[13, 14] v>
    { h = Gemm <transB = 1> (x, w, b)  a = Tanh(h)  y = Gemm <transB = 1> (a, v) }"""

GROUPED = """(float[B, 6, 9] x) => (float[B, 12, 9] y) <float[6, 6, 1] w0, float[6] b0, float[12, 2, 3] w>
    { h = Conv <kernel_shape = [1]> (x, w0, b0)  y = Conv <group = 3, kernel_shape = [3], pads = [1, 1]> (h, w) }"""

EINSUM = """(float[B, S, 12] x) => (float[B, S, 12] y) <float[12, 5, 5] w, float[5, 5, 12] v>
    { h = Einsum <equation = "bsh,hij->bsij"> (x, w)  t = Tanh(h)  y = Einsum <equation = "bsij,ijh->bsh"> (t, v) }"""

ROTARY = """(float[B, 3, S, 8] x, int64[B, S] position_ids) => (float[B, 3, S, S] y)
    <float[20, 4] cos, float[20, 4] sin>
    { r = com.microsoft.RotaryEmbedding (x, position_ids, cos, sin)
      t = Transpose <perm = [0, 1, 3, 2]> (r)  y = MatMul(r, t) }"""

TOP = """(float[S, 12] x) => (float[S, 5] y) <float[12, 7] router, int64[1] five = {5}>
    { h = MatMul(x, router)  y, i = TopK(h, five) }"""

GROUPS = """(float[B, 2, S, 5] x) => (float[B, 6, S, 5] y) <float[6, 1, 5] w, int64[5] wide = {1, 1, 3, 1, 1},
    int64[4] flat = {0, 6, -1, 5}, int64[1] two = {2}>
    { u = Unsqueeze(x, two)  e = Expand(u, wide)  r = Reshape(e, flat)  y = Mul(r, w) }"""

RUNNING = """(float[B, 12] x) => (float[B, 13] y) <float[12, 14] w, float[14, 13] v, int64 axis = {1}>
    { h = MatMul(x, w)  c = CumSum(h, axis)  y = MatMul(c, v) }"""

POSITIONS = """(float[B, 12] x) => (float[B, 14] y) <float[12, 14] w, int64 zero = {0}, int64 fourteen = {14},
    int64 one = {1}>
    { h = MatMul(x, w)  r = Range(zero, fourteen, one)  f = Cast <to = 1> (r)  y = Add(h, f) }"""

MEAN = """(float[B, 12, 12] x) => (float[B, 12] y) <float[12, 12] w, int64[1] axes = {1}>
    { h = MatMul(x, w)  y = ReduceMean <keepdims = 0> (h, axes) }"""


@dataclass(frozen=True)
class Mutant:
    """A wrong rule: `change` gets what the right one says of a node."""

    op: str
    text: str
    change: Callable[[Typing], Typing]
    caught_by: str = "permutation"
    domain: str = ""
    opset: int = 20


def text(old: str, new: str) -> Callable[[Typing], Typing]:
    return lambda typing: replace(typing, text=typing.text.replace(old, new))


def joined(names: str, size: int) -> Callable[[Typing], Typing]:
    """Make one atom of a sum."""
    return lambda typing: replace(typing, text=typing.text.replace(names, "n"), sizes={**typing.sizes, "n": (size,)})


def storeless(typing: Typing) -> Typing:
    return replace(typing, stores=())


def without(kind: str) -> Callable[[Typing], Typing]:
    return lambda typing: replace(typing, stores=tuple(store for store in typing.stores if store.kind != kind))


def unfixed(typing: Typing) -> Typing:
    return replace(typing, fixed=())


def shifted(typing: Typing) -> Typing:
    """Let a slice that does not start at zero start one entry late."""
    before, after = typing.sizes["b0"][0], typing.sizes["e0"][0]
    if not before:
        return typing
    return replace(typing, sizes={**typing.sizes, "b0": (before + 1,), "e0": (after - 1,)})


def swapped(typing: Typing) -> Typing:
    """Exchange the factors of each product."""
    return replace(typing, text=re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", typing.text))


def neighbours(typing: Typing) -> Typing:
    """Pair entry 2i with 2i + 1 where halves are paired."""
    return replace(
        typing, text=typing.text.replace("(p + p)", "(p t)"), sizes={**typing.sizes, "t": (2,)}, fixed=("t",)
    )


MUTANTS = {
    "MatMul without contraction": Mutant("MatMul", FFN, text("... k n", "... j n")),
    "MatMul that returns what it contracts": Mutant("MatMul", FFN, text("-> ... m n", "-> ... m k")),
    "Gemm without contraction": Mutant("Gemm", GEMM, text("n k", "n j")),
    "Gemm whose bias is free": Mutant("Gemm", GEMM, text("n?", "q")),
    "Add whose second operand does not matter": Mutant("Add", FFN, text("..., ... ->", "..., . ->")),
    "Gather that does not tie ids to the table": Mutant(
        "Gather", EMBEDDING, lambda typing: replace(typing, indexes={})
    ),
    "LayerNormalization with free weights": Mutant("LayerNormalization", NORM, text(", d0, d0 ->", ", g0, b0 ->")),
    "Softmax that takes no statistics": Mutant("Softmax", OVER_HEADS, text("~", ""), "zero"),
    "ReduceMean over the wrong axis": Mutant(
        "ReduceMean", MEAN, text("a0 ~a1 a2, . -> a0 a2", "a0 a1 ~a2, . -> a0 a1")
    ),
    "Concat in the wrong order": Mutant("Concat", HALVES, text("(p0 + p1)", "(p1 + p0)")),
    "Concat to one new axis": Mutant("Concat", HALVES, joined("(p0 + p1)", 14)),
    "Slice off by one": Mutant("Slice", LATE, shifted),
    "Slice whose bounds stay": Mutant("Slice", HALVES, storeless, "zero"),
    "Split whose sizes stay": Mutant("Split", UNEVEN, storeless, "half cut"),
    "Split of one axis": Mutant("Split", GATED, joined("(p0 + p1)", 14)),
    "Reshape grouped from the left": Mutant("Reshape", HEADS, swapped),
    "Reshape whose target stays": Mutant("Reshape", HEADS, storeless, "half cut"),
    "Reshape whose repetition is inside": Mutant("Reshape", GROUPS, swapped),
    "Transpose that ignores perm": Mutant("Transpose", SQUARE, text("-> a1 a0", "-> a0 a1")),
    "MultiHeadAttention with the parent's heads": Mutant(
        "MultiHeadAttention", FUSED, storeless, "zero", "com.microsoft"
    ),
    "Attention with the parent's heads": Mutant("Attention", ATTENTION, storeless, "zero", opset=23),
    "Attention whose scale follows the cut": Mutant("Attention", ATTENTION, without("scale"), "zero", opset=23),
    "Attention that returns keys": Mutant("Attention", ATTENTION, text("-> b q (g v)", "-> b q (g d)"), opset=23),
    "RotaryEmbedding that pairs neighbours": Mutant("RotaryEmbedding", ROTARY, neighbours, domain="com.microsoft"),
    "Conv whose group count stays": Mutant("Conv", GROUPED, storeless, "half cut"),
    "Conv whose groups are inside": Mutant("Conv", GROUPED, swapped),
    "Einsum with exchanged letters": Mutant("Einsum", EINSUM, text("-> b s i j", "-> b s j i")),
    "TopK that forgets how many it takes": Mutant("TopK", TOP, lambda typing: replace(typing, minimum={}), "half cut"),
    "CumSum in any order": Mutant("CumSum", RUNNING, lambda typing: replace(typing, fixed=())),
    "Range that keeps counting": Mutant("Range", POSITIONS, storeless),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_rule_passes(graph, name):
    mutant = MUTANTS[name]
    assert verify(graph(mutant.text, mutant.opset)).ok


@pytest.mark.parametrize("name", MUTANTS)
def test_the_wrong_rule_is_caught(graph, monkeypatch, name):
    mutant = MUTANTS[name]
    model = graph(mutant.text, mutant.opset)
    load_rules()
    right = RULES[mutant.domain, mutant.op]
    changed = []

    def wrong(op: Op) -> Typing:
        typing = right.read(op)
        changed.append(mutant.change(typing) != typing)
        return mutant.change(typing)

    monkeypatch.setitem(RULES, (mutant.domain, mutant.op), Rule(mutant.op, mutant.domain, wrong))
    report = verify(model)
    assert any(changed)
    assert mutant.caught_by in [check.name for check in report.failed], str(report)
