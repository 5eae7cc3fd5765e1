"""Native constants: the child computes the scales of the framework's smaller class, and its outputs stay."""

import numpy as np
import onnxruntime
import pytest
import torch
import zoo

from graphclone import native
from graphclone.analysis import analyse
from graphclone.axes.tables import find_tables, frequencies, slopes
from graphclone.errors import CutError
from graphclone.model import Model, load
from graphclone.plan import Plan
from graphclone.surgery import apply

ROUTES = ("dynamo20", "dynamo23", "legacy17")
CASES = [
    *((name, "head_dim", route) for name in ("gpt2", "bert", "vit") for route in ROUTES),
    *((name, role, "legacy17") for name in ("whisper", "deberta_v2", "bart") for role in ("head_dim",)),
    *((name, "hidden", "legacy17") for name in ("gemma2", "t5", "bart", "gpt2", "llama")),
    *((name, "head_dim", "dynamo20") for name in ("whisper", "deberta_v2")),
    *((name, "hidden", "dynamo20") for name in ("gemma2", "t5")),
    ("t5", "head_dim", "legacy17"),
    ("opt", "head_dim", "legacy17"),
    ("bloom", "head_dim", "legacy17"),
    ("swin", "head_dim", "legacy17"),
    ("bert", "head_dim", "fused"),
]
LONG = {"bart", "opt", "bloom", "swin"}
MARKED = [pytest.param(*case, marks=pytest.mark.long) if case[0] in LONG else case for case in CASES]


def run(model: Model, feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options)
    return session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})


def relative(got, want) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


def half(name: str, role: str) -> dict[str, list[int]]:
    sizes = {n: size for n, size in zoo.dimensions(name).items() if n.split(".")[-1] in (role, f"cross_{role}")}
    return {n: zoo.choose(name, n, max(1, size * 2 // 3)) for n, size in sizes.items()}


def every_second_pair(size: int) -> list[int]:
    """Return every second pair, or the first alone where their number is odd."""
    pairs = size // 2
    kept = list(range(0, pairs, 2 if pairs % 2 == 0 else pairs))
    return kept + [entry + pairs for entry in kept]


@pytest.mark.parametrize(("name", "role", "route"), MARKED)
def test_outputs_stay_and_scales_are_those_of_the_smaller_class(name, role, route, monkeypatch):
    parent = load(zoo.export(name, route))
    keep = half(name, role)
    plan, analysis = Plan(keep={n: tuple(kept) for n, kept in keep.items()}), analyse(parent)
    feeds = zoo.feeds(name, padded=True)
    plain = run(apply(parent, plan, analysis), feeds)
    assert relative(run(apply(parent, plan, analysis, native_constants=True), feeds), plain) < 1e-5
    monkeypatch.setattr(native._Folder, "scale_weights", lambda self, requests: None)
    unfolded = run(apply(parent, plan, analysis, native_constants=True), feeds)
    with torch.no_grad():
        framework = zoo.native(name, keep, native_scales=True)(*map(torch.from_numpy, feeds.values()))
    assert relative(unfolded, [tensor.numpy() for tensor in framework]) < 1e-5
    changes = (name, role) not in {("t5", "head_dim"), ("gpt2", "hidden"), ("llama", "hidden")}
    assert (relative(unfolded, plain) > 1e-5) == changes


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("llama", "dynamo20"),
        ("llama", "legacy17"),
        ("qwen3", "legacy17"),
        ("falcon", "dynamo20"),
        ("modernbert", "legacy17"),
    ],
)
def test_rope_keeps_every_second_pair_or_says_which_table(name, route):
    parent = load(zoo.export(name, route))
    analysis = analyse(parent)
    names = [n for n in zoo.dimensions(name) if n.endswith("head_dim")]
    size = zoo.dimensions(name)[names[0]]
    plan = Plan(keep=dict.fromkeys(names, tuple(every_second_pair(size))))
    feeds = zoo.feeds(name, padded=True)
    folded = run(apply(parent, plan, analysis, native_constants=True), feeds)
    assert relative(folded, run(apply(parent, plan, analysis), feeds)) < 1e-5
    first = tuple(range(3)) + tuple(range(size // 2, size // 2 + 3))
    with pytest.raises(CutError, match=r"inv_freq|rotary.* is a table of frequencies"):
        apply(parent, Plan(keep=dict.fromkeys(names, first)), analysis, native_constants=True)


def test_slopes_follow_the_number_of_heads():
    parent = load(zoo.export("bloom", "legacy17"))
    analysis = analyse(parent)
    apply(parent, Plan(keep={"blocks.*.heads": (0, 1)}), analysis, native_constants=True)
    with pytest.raises(CutError, match="table of slopes"):
        apply(parent, Plan(keep={"blocks.*.heads": (0, 2)}), analysis, native_constants=True)


def test_tables_are_known_by_their_values():
    angles = np.arange(6)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    assert frequencies(np.sin(angles)) is not None and frequencies(np.cos(angles)) is not None
    assert frequencies(np.random.default_rng(0).standard_normal((6, 4))) is None
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_learned_vectors_are_no_tables():
    for name in ("gpt2", "t5", "swin"):
        assert not list(find_tables(analyse(load(zoo.export(name, "legacy17"))).typing)), name


def test_blocks_and_widths_together_with_a_tied_embedding():
    parent = load(zoo.export("gemma2", "legacy17"))
    analysis = analyse(parent)
    keep = {
        n: tuple(zoo.choose("gemma2", n, size * 2 // 3)) for n, size in zoo.dimensions("gemma2").items() if "ffn" in n
    }
    plan = Plan(keep={**keep, "hidden": tuple(range(1, 40, 2))}, blocks={"": (0, 3)})
    feeds = zoo.feeds("gemma2", padded=True)
    child = apply(parent, plan, analysis, native_constants=True)
    assert relative(run(child, feeds), run(apply(parent, plan, analysis), feeds)) < 1e-5
    assert native.has_native_constants(child) and child.weights["model.embed_tokens.weight"].shape[1] == 20


FUSED = {
    "Attention": "a = com.microsoft.Attention<num_heads=3>(x, w, b)",
    "MultiHeadAttention": """
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, b)""",
    "biased MultiHeadAttention": """
        q0 = MatMul(x, wq)
        q = Add(q0, bq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        a = com.microsoft.MultiHeadAttention<num_heads=3, scale=0.5>(q, k, v)""",
}
WEIGHTS = (
    "float[12, 36] w, float[36] b, float[12, 12] wq, float[12, 12] wk, float[12, 12] wv, float[12] bq, float[12, 12] o"
)


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_takes_its_default_scale(name, graph):
    text = (
        f"(float[B, S, 12] x) => (float[B, S, 12] y) <{WEIGHTS}> {{ {FUSED[name]}\n p = MatMul(a, o)\n y = Add(p, x) }}"
    )
    parent = graph(text)
    analysis = analyse(parent)
    plan = Plan(keep={"blocks.0.head_dim": (1, 3)})
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, 12)).astype(np.float32)}
    child = apply(parent, plan, analysis, native_constants=True)
    assert relative(run(child, feeds), run(apply(parent, plan, analysis), feeds)) < 1e-5
    scale = next(n for n in child.graph.nodes if n.op.endswith("Attention")).attrs.get("scale")
    assert scale == (None if "biased" not in name else pytest.approx(2**-0.5))


def test_a_norm_without_weights_cannot_take_the_ratio(graph):
    block = """
        q0 = MatMul(x, wq)
        n = ReduceSumSquare<keepdims=1>(q0, last)
        r = Sqrt(n)
        q = Div(q0, r)
        k = MatMul(x, wk)
        t = Transpose<perm=[0, 2, 1]>(k)
        s0 = MatMul(q, t)
        s = Mul(s0, half)
        p = Softmax(s)
        v = MatMul(x, wv)
        a = MatMul(p, v)
        f = MatMul(a, o)
        y = Add(f, x)"""
    weights = (
        "int64[1] last = {-1}, float half = {0.5}, float[12, 4] wq, float[12, 4] wk, float[12, 12] wv, float[12, 12] o"
    )
    parent = graph(f"(float[B, S, 12] x) => (float[B, S, 12] y) <{weights}> {{ {block} }}")
    analysis = analyse(parent)
    plan = Plan(keep={"blocks.0.head_dim": (1, 3)})
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, 12)).astype(np.float32)}
    child = apply(parent, plan, analysis, native_constants=True)  # the keys take it
    assert relative(run(child, feeds), run(apply(parent, plan, analysis), feeds)) < 1e-5
    both = block.replace(
        "t = Trans", "m = ReduceSumSquare<keepdims=1>(k, last)\n u = Sqrt(m)\n w = Div(k, u)\n t = Trans"
    )
    parent = graph(f"(float[B, S, 12] x) => (float[B, S, 12] y) <{weights}> {{ {both.replace('(k)', '(w)')} }}")
    with pytest.raises(CutError, match=r"no weight can take the ratio \(Div node .* normalises it"):
        apply(parent, plan, native_constants=True)
