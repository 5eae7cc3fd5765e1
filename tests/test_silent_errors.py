"""Mistakes that no shape betrays: the smaller model itself is the judge, and sees each when its rule is gone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from breaking import (
    ANY_POSITIONS,
    BY_VALUE,
    NO_CLIPS,
    NO_DENOMINATORS,
    NO_FREEZING,
    NO_LIMITS,
    NO_REPETITION,
    NO_SCALE,
    Breaking,
    changed,
    second_ignored,
    storeless,
    unfilled,
    unfixed,
)

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import leaves
from graphclone.errors import CutError, GraphcloneError
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify.running import run

Arrays = Mapping[str, np.ndarray]
EPSILON = 1e-5
HUGE = 9223372036854775807


# the smaller models ---------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def normed(x: np.ndarray, axes: int | tuple = -1) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPSILON)


def attended(
    x,
    w: Arrays,
    heads,
    dims,
    score: Callable = lambda s: s,
    turn: Callable = lambda t: t,
    number: str = "",
    size: int = 6,
):
    """Return attention over kept heads and kept entries of a head, before the output projection."""

    def split(name: str) -> np.ndarray:
        weight = w[f"w{name}{number}"].reshape(x.shape[-1], -1, size)[:, heads][
            ..., dims if name != "v" else slice(None)
        ]
        return np.einsum("bsi,ihd->bhsd", x, weight)

    scores = score(turn(split("q")) @ turn(split("k")).swapaxes(-1, -2))
    mixed = (softmax(scores) @ split("v")).swapaxes(1, 2)
    out = w[f"wo{number}"].reshape(-1, size, x.shape[-1])[heads]
    return np.einsum("bshd,hdi->bsi", mixed, out)


# the graphs -----------------------------------------------------------------------------------------------------

FLOAT_WIDTH = """(float[B, S, 9] x) => (float[B, S, 5] y)
    <float[9, 12] w, float[12] g, float[12, 5] v, float width = {12.0}, float part = {0.0833333358168602},
     float eps = {0.00001}, int64[1] last = {-1}>
    { h = MatMul(x, w)  s = ReduceSum(h, last)  m = Div(s, width)  c = Sub(h, m)  q = Mul(c, c)
      t = ReduceSum(q, last)  r = Mul(t, part)  e = Add(r, eps)  d = Sqrt(e)  n = Div(c, d)  z = Mul(n, g)
      y = MatMul(z, v) }"""

ATTENTION = """(float[B, S, 12] x{inputs}) => (float[B, S, 12] y)
    <float[12, 18] wq, float[12, 18] wk, float[12, 18] wv, float[18, 12] wo, int64[4] apart = {{0, 0, 3, 6}},
     int64[3] joint = {{0, 0, 18}}{weights}>
    {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        q4 = Reshape(q, apart)  k4 = Reshape(k, apart)  v4 = Reshape(v, apart)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)  k0 = Transpose <perm = [0, 2, 1, 3]> (k4)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        {turn}
        kt = Transpose <perm = [0, 1, 3, 2]> (kr)  raw = MatMul(qr, kt)
        {score}
        p = Softmax(scores)  c = MatMul(p, vh)
        c4 = Transpose <perm = [0, 2, 1, 3]> (c)  merged = Reshape(c4, joint)  y = MatMul(merged, wo)
    }}"""
UNTURNED = "qr = Identity(qh)  kr = Identity(k0)"


def attention(score: str, weights: str = "", inputs: str = "", turn: str = UNTURNED, size: int = 6) -> str:
    text = ATTENTION.format(score=score, weights=weights, inputs=inputs, turn=turn)
    return text.replace("18", str(3 * size)).replace("3, 6}", f"3, {size}}}")


FUSED = """(float[B, S, 12] x) => (float[B, S, 12] y)
    <float[12, 18] wq, float[12, 18] wk, float[12, 18] wv, float[18, 12] wo>
    { q = MatMul(x, wq)  k = MatMul(x, wk)  t = MatMul(x, wv)
      c = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, t)  y = MatMul(c, wo) }"""

ROPE = """
        {speeds}
        rows = Unsqueeze(places, one)  angle = MatMul(rows, inv)
        angles = Concat <axis = -1> (angle, angle)  cos0 = Cos(angles)  sin0 = Sin(angles)
        cos = Mul(cos0, strength)  sin = Mul(sin0, strength)
        qa = Slice(qh, zero, four, last)  qb = Slice(qh, four, end, last)  qn = Neg(qb)
        qt = Concat <axis = -1> (qn, qa)  qc = Mul(qh, cos)  qs = Mul(qt, sin)  qr = Add(qc, qs)
        ka = Slice(k0, zero, four, last)  kb = Slice(k0, four, end, last)  kn = Neg(kb)
        kt0 = Concat <axis = -1> (kn, ka)  kc = Mul(k0, cos)  ks = Mul(kt0, sin)  kr = Add(kc, ks)"""
ROPE_WEIGHTS = f""", float[1, 4] speeds = {{1.0, 0.3, 0.1, 0.03}}, float strength = {{1.1}}, int64[1] zero = {{0}},
     int64[1] one = {{1}}, int64[1] four = {{4}}, int64[1] end = {{{HUGE}}}, int64[1] last = {{-1}}"""

TWO_LAYERS = """(float[B, S, 12] x{inputs}) => (float[B, S, 12] y)
    <float[12, 18] wq1, float[12, 18] wk1, float[12, 18] wv1, float[18, 12] wo1,
     float[12, 18] wq2, float[12, 18] wk2, float[12, 18] wv2, float[18, 12] wo2,
     int64[4] apart = {{0, 0, 3, 6}}, int64[3] joint = {{0, 0, 18}}{weights}>
    {{ {bias} {first} {second} }}"""
LAYER = """
    q{n} = MatMul({x}, wq{n})  k{n} = MatMul({x}, wk{n})  v{n} = MatMul({x}, wv{n})
    qf{n} = Reshape(q{n}, apart)  kf{n} = Reshape(k{n}, apart)  vf{n} = Reshape(v{n}, apart)
    qh{n} = Transpose <perm = [0, 2, 1, 3]> (qf{n})  kh{n} = Transpose <perm = [0, 2, 3, 1]> (kf{n})
    vh{n} = Transpose <perm = [0, 2, 1, 3]> (vf{n})
    raw{n} = MatMul(qh{n}, kh{n})  scores{n} = Add(raw{n}, bias)  p{n} = Softmax(scores{n})  c{n} = MatMul(p{n}, vh{n})
    t{n} = Transpose <perm = [0, 2, 1, 3]> (c{n})  m{n} = Reshape(t{n}, joint)  o{n} = MatMul(m{n}, wo{n})
    {y} = Add({x}, o{n})"""


def two_layers(bias: str, weights: str, inputs: str = "") -> str:
    layers = {"first": LAYER.format(n=1, x="x", y="x1"), "second": LAYER.format(n=2, x="x1", y="y")}
    return TWO_LAYERS.format(bias=bias, weights=weights, inputs=inputs, **layers)


TABLE = "ids = Add(apart2, three)  rows = Gather(table, ids)  bias = Transpose <perm = [2, 0, 1]> (rows)"
SHARED_BIAS = two_layers(TABLE, ", float[7, 3] table, int64 three = {3}", ", int64[S, S] apart2")
ZERO_BIAS = two_layers(
    """s = Shape(x)  n = Gather(s, one)  sizes = Concat <axis = 0> (lead, n, n)
    bias = ConstantOfShape <value = float[1] {0.0}> (sizes)""",
    ", int64[1] one = {1}, int64[2] lead = {1, 3}",
)

MASK = np.float32([[0.0, -3.0, -2.0, -1.0], [0.5, 0.0, -1.5, -2.5], [2.0, 1.0, 0.0, -2.0], [1.5, 0.5, 2.5, 0.0]])
STORED_MASK = two_layers(
    "bias = Identity(mask)", f", float[3, 4, 4] mask = {{{', '.join(map(str, [*MASK.ravel()] * 3))}}}"
).replace("[B, S, 12]", "[B, 4, 12]")

LOOKED_UP = """(int64[B, S] ids) => (float[B, S, 5] y)
    <float[7, 12] table, float[12, 5] v, int64 zero = {0}, int64 most = {MOST}>
    { near = Clip(ids, zero, most)  h = Gather(table, near)  t = Tanh(h)  y = MatMul(t, v) }"""

POSITIONS = """(float[B, S, 9] x) => (float[B, S, 5] y)
    <float[9, 12] w, float[20, 12] places, float[12, 5] v, int64 zero = {0}, int64 one = {1}>
    { h = MatMul(x, w)  s = Shape(x)  n = Gather(s, one)  r = Range(zero, n, one)  p = Gather(places, r)
      a = Add(h, p)  t = Tanh(a)  y = MatMul(t, v) }"""

GROUP_NORM = """(float[B, 9, S] x) => (float[B, 5, S] y)
    <float[12, 9, 1] w, float[12] g, float[12] b, float[5, 12, 1] v>
    { h = Conv <kernel_shape = [1]> (x, w)  n = GroupNormalization <num_groups = 4> (h, g, b)
      y = Conv <kernel_shape = [1]> (n, v) }"""

WRITTEN_GROUP_NORM = """(float[B, 9, S] x) => (float[B, 5, S] y)
    <float[12, 9, 1] w, float[12, 1] g, float[5, 12, 1] v, float[4] ones = {1, 1, 1, 1}, float[4] zeros = {0, 0, 0, 0},
     int64[3] grouped = {0, 4, -1}>
    { h = Conv <kernel_shape = [1]> (x, w)  r = Reshape(h, grouped)  i = InstanceNormalization(r, ones, zeros)
      s = Shape(h)  n = Reshape(i, s)  z = Mul(n, g)  y = Conv <kernel_shape = [1]> (z, v) }"""


# their judges ---------------------------------------------------------------------------------------------------

EVERY = slice(None)
SOME = [0, 2, 5]


def narrow_norm(w: Arrays, f: Arrays) -> np.ndarray:
    kept = [0, 2, 3, 7, 8, 11]
    return (normed(f["x"] @ w["w"][:, kept]) * w["g"][kept]) @ w["v"][kept]


def scaled(size: float, then: Callable = lambda s: s) -> Callable[[Arrays, Arrays], np.ndarray]:
    return lambda w, f: attended(f["x"], w, EVERY, SOME, lambda s: then(s / size))


def alibi(w: Arrays, f: Arrays) -> np.ndarray:
    slopes = 0.5 ** np.array([1, 3]).reshape(2, 1, 1)
    return attended(f["x"], w, [0, 2], EVERY, lambda s: s + slopes * f["distance"])


def relative(w: Arrays, f: Arrays) -> np.ndarray:
    bias = w["table"][f["apart2"] + 3][..., [0, 2]].transpose(2, 0, 1)
    x = f["x"]
    for number in "12":
        x = x + attended(x, w, [0, 2], EVERY, lambda s: s + bias, number=number)
    return x


def apart(w: Arrays, f: Arrays) -> np.ndarray:
    x = f["x"] + attended(f["x"], w, [0, 2], EVERY, number="1")
    return x + attended(x, w, EVERY, EVERY, number="2")


def masked(w: Arrays, f: Arrays) -> np.ndarray:
    x = f["x"] + attended(f["x"], w, [0, 2], EVERY, lambda s: s + MASK, number="1")
    return x + attended(x, w, EVERY, EVERY, lambda s: s + MASK, number="2")


def looked_up(w: Arrays, f: Arrays) -> np.ndarray:
    return np.tanh(w["table"][[0, 1, 2, 4]][f["ids"].clip(0)]) @ w["v"]


def rotary(inverse: Callable[[np.ndarray, Arrays], np.ndarray]) -> Callable[[Arrays, Arrays], np.ndarray]:
    def judge(w: Arrays, f: Arrays) -> np.ndarray:
        pairs = [0, 2, 3]
        angles = f["places"][:, None] * inverse(w["speeds"][:, pairs], f)
        angles = np.concatenate([angles, angles], -1)

        def turn(x: np.ndarray) -> np.ndarray:
            half = np.concatenate([-x[..., 3:], x[..., :3]], -1)
            return 1.1 * (x * np.cos(angles) + half * np.sin(angles))

        return attended(f["x"], w, EVERY, [0, 2, 3, 4, 6, 7], turn=turn, size=8)

    return judge


def groups(w: Arrays, f: Arrays, affine: bool = True) -> np.ndarray:
    kept = [0, 1, 2, 9, 10, 11]
    h = np.einsum("oi,bis->bos", w["w"][kept, :, 0], f["x"])
    n = normed(h.reshape(len(h), 2, -1)).reshape(h.shape)
    z = n * w["g"][kept].reshape(-1, 1) + (w["b"][kept].reshape(-1, 1) if affine else 0)
    return np.einsum("oi,bis->bos", w["v"][:, kept, 0], z)


# the cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A graph, a cut of it - (initializer, axis, size) of the width -> kept indices -, what the smaller model computes
    (None: the cut must be refused), and how to take its rule away."""

    text: str
    keep: Mapping[tuple[str, int, int], list[int]]
    judge: Callable[[Arrays, Arrays], np.ndarray] | None
    broken: Breaking
    opset: int = 20


HEAD = {("wq", 1, 6): SOME}
HEADS = {("wq", 1, 3): [0, 2]}
PAIRS = {("wq", 1, 4): [0, 2, 3]}
SLOPES = """r = Range(one, four, one)  f = Cast <to = 1> (r)  s = Pow(half, f)  u = Unsqueeze(s, tail)
        b = Mul(u, distance)  scores = Add(raw, b)"""
SHAPE_SCALE = "s = Shape(qh)  n = Gather(s, minus)  f = Cast <to = 1> (n)  d = Sqrt(f)  scores = Div(raw, d)"
PLACES = ", float[S] places"
LINEAR = "inv = Div(speeds, factor)"
DYNAMIC = """sh = Shape(x)  length = Gather(sh, one0)  lf = Cast <to = 1> (length)  base = Add(lf, ten)
        powers = Pow(base, speeds)  inv = Reciprocal(powers)"""
YARN = """rest = Sub(unit, ramp)  slow = Div(speeds, factor)  a = Mul(slow, rest)  b = Mul(speeds, ramp)
        inv = Add(a, b)"""
RAMP = np.float32([[1.0, 0.6, 0.2, 0.0]])


def rope(speeds: str, extra: str = "") -> str:
    return attention("scores = Identity(raw)", ROPE_WEIGHTS + extra, PLACES, ROPE.format(speeds=speeds), size=8)


CASES = {
    "float-width norm": Case(FLOAT_WIDTH, {("w", 1, 12): [0, 2, 3, 7, 8, 11]}, narrow_norm, NO_DENOMINATORS),
    "default scale of an operator": Case(FUSED, HEAD, scaled(6**0.5), NO_SCALE, 23),
    "scale computed from a shape": Case(
        attention(SHAPE_SCALE, ", int64 minus = {-1}"), HEAD, scaled(6**0.5), NO_FREEZING
    ),
    "scale that equals a root of the width": Case(
        attention("scores = Div(raw, root)", ", float root = {2.4494898}"), HEAD, scaled(6**0.5), BY_VALUE
    ),
    "softcap that equals the width": Case(
        attention("d = Div(raw, cap)  t = Tanh(d)  scores = Mul(t, cap)", ", float cap = {6.0}"),
        HEAD,
        scaled(6.0, lambda s: 6 * np.tanh(s)),
        BY_VALUE,
    ),
    "ALiBi slopes": Case(
        attention(
            SLOPES,
            ", int64 one = {1}, int64 four = {4}, float half = {0.5}, int64[2] tail = {1, 2}",
            ", float[S, S] distance",
        ),
        HEADS,
        alibi,
        changed("Range", storeless),
    ),
    "relative position table, heads": Case(
        SHARED_BIAS, {("wq1", 1, 3): [0, 2]}, relative, changed("Add", second_ignored)
    ),
    "relative position table, distances": Case(SHARED_BIAS, {("table", 0, 7): [0, 1, 2, 4]}, None, ANY_POSITIONS),
    "zero bias shared by layers": Case(ZERO_BIAS, {("wq1", 1, 3): [0, 2]}, apart, changed("ConstantOfShape", unfilled)),
    "mask stored once for all layers": Case(STORED_MASK, {("wq1", 1, 3): [0, 2]}, masked, NO_REPETITION),
    "ids clipped to the vocabulary": Case(
        LOOKED_UP.replace("MOST", "6"), {("table", 0, 7): [0, 1, 2, 4]}, looked_up, NO_CLIPS
    ),
    "ids clipped below the vocabulary": Case(
        LOOKED_UP.replace("MOST", "2"), {("table", 0, 7): [0, 1, 2, 4]}, None, NO_LIMITS
    ),
    "linear RoPE": Case(
        rope(LINEAR, ", float factor = {2.0}"), PAIRS, rotary(lambda s, f: s / 2), changed("Slice", storeless)
    ),
    "dynamic RoPE": Case(
        rope(DYNAMIC, ", int64 one0 = {1}, float ten = {10.0}"),
        PAIRS,
        rotary(lambda s, f: 1 / (f["x"].shape[1] + 10.0) ** s),
        changed("Slice", storeless),
    ),
    "YaRN": Case(
        rope(YARN, ", float factor = {4.0}, float unit = {1.0}, float[1, 4] ramp = {1.0, 0.6, 0.2, 0.0}"),
        PAIRS,
        rotary(lambda s, f: s / 4 * (1 - RAMP[:, [0, 2, 3]]) + s * RAMP[:, [0, 2, 3]]),
        changed("Slice", storeless),
    ),
    "learned positions, width": Case(
        POSITIONS,
        {("w", 1, 12): SOME},
        lambda w, f: np.tanh(f["x"] @ w["w"][:, SOME] + w["places"][: f["x"].shape[1], SOME]) @ w["v"][SOME],
        changed("Add", second_ignored),
    ),
    "learned positions, order": Case(
        POSITIONS, {("places", 0, 20): list(range(1, 20))}, None, changed("Gather", unfixed)
    ),
    "group norm": Case(GROUP_NORM, {("w", 0, 4): [0, 3]}, groups, changed("GroupNormalization", storeless), 21),
    "group norm written out": Case(
        WRITTEN_GROUP_NORM, {("w", 0, 4): [0, 3]}, lambda w, f: groups(w, f, False), changed("Reshape", storeless)
    ),
}


def error(model: Model, case: Case) -> float:
    """Return how far the child is from the smaller model; of a cut that must be refused, whether it was not."""
    analysis = analyse(model)
    try:
        child = apply(model, Plan(keep=named(analysis, case.keep)), analysis)
    except CutError:
        return float("inf") if case.judge else 0.0
    if case.judge is None:
        return float("inf")
    feeds = fed(model)
    weights = {name: np.asarray(weight.load(), np.float64) for name, weight in model.weights.items()}
    try:
        got = run(child, [feeds])[0]["y"]
    except (GraphcloneError, ValueError):
        return float("inf")
    want = case.judge(weights, feeds)
    return float(np.abs(got - want).max() / np.abs(want).max()) if got.shape == want.shape else float("inf")


def named(analysis: Analysis, keep: Mapping[tuple[str, int, int], list[int]]) -> dict[str, tuple[int, ...]]:
    """Return a plan's names of widths that are given as (initializer, axis, size)."""
    found = {}
    for (weight, axis, size), kept in keep.items():
        atoms = {id(leaf) for use in analysis.typing.uses[weight] for leaf in leaves(use.axes[axis])}
        names = [d.name for d in analysis.dimensions if d.size == size and atoms & _atoms(d.axes)]
        found |= {name: tuple(kept) for name in names[:1]}
    if not found:
        raise CutError("there is no such width")
    return found


def _atoms(axes) -> set[int]:
    return {id(leaf) for axis in axes for leaf in leaves(axis)}


def fed(model: Model) -> dict[str, np.ndarray]:
    """Return inputs of batch 2 and length 4, at which a stale group count still divides."""
    random = np.random.default_rng(3)
    sizes = {"B": 2, "S": 4}
    feeds = {}
    for tensor in model.inputs:
        shape = [sizes.get(size, size) for size in tensor.shape]
        values = random.standard_normal(shape).astype(np.float32)
        feeds[tensor.name] = random.integers(-3, 4, shape) if np.dtype(tensor.dtype).kind == "i" else values
    return feeds


@pytest.mark.parametrize("name", CASES)
def test_the_child_is_the_smaller_model(graph, name):
    case = CASES[name]
    assert error(graph(case.text, case.opset), case) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_without_its_rule_it_is_not(graph, monkeypatch, name):
    case = CASES[name]
    case.broken(monkeypatch)
    assert error(graph(case.text, case.opset), case) > 1e-3
