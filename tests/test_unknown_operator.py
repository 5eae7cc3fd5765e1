"""An operator nobody has heard of locks what it touches, by name; everything else works; one line teaches it."""

import importlib.metadata
import sys

import numpy as np
import onnx
import pytest

from graphclone.analysis import Analysis, analyse
from graphclone.axes import load_rules
from graphclone.axes.registry import RULES, rule
from graphclone.axes.solver import type_axes
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify import verify

BLOCK = """
    g{n} = LayerNormalization <axis = -1> ({x}, gain{n})
    q{n} = MatMul(g{n}, wq{n})  k{n} = MatMul(g{n}, wk{n})  v{n} = MatMul(g{n}, wv{n})
    c{n} = com.microsoft.MultiHeadAttention <num_heads = 3> (q{n}, k{n}, v{n})  o{n} = MatMul(c{n}, wo{n})
    a{n} = Add({x}, o{n})  h{n} = MatMul(a{n}, up{n})  {act}  d{n} = MatMul(t{n}, down{n})  {y} = Add(a{n}, d{n})"""
WEIGHTS = ", ".join(
    f"float[12] gain{n}, float[12, 15] wq{n}, float[12, 15] wk{n}, float[12, 15] wv{n}, float[15, 12] wo{n}, "
    f"float[12, 14] up{n}, float[14] scale{n}, float[14, 12] down{n}"
    for n in (0, 1, 2)
)
KNOWN, UNKNOWN = "t{n} = Tanh(h{n})", "t{n} = my.ops.MyScale(h{n}, scale{n})"
LOCKED = "no axis rule for my.ops.MyScale node"


def text(declared: str = ", float[B, S, 14] t1") -> str:
    """Return three blocks, the second with an operator of its own domain; `declared`: the shape of its output."""
    tensors = ("x", "x1", "x2", "y")
    blocks = "".join(
        BLOCK.format(n=n, x=tensors[n], y=tensors[n + 1], act=(UNKNOWN if n == 1 else KNOWN).format(n=n))
        for n in (0, 1, 2)
    )
    return f"(float[B, S, 12] x) => (float[B, S, 12] y) <{WEIGHTS}{declared}> {{ {blocks} }}"


@pytest.fixture
def model(graph):
    return lambda *arguments: graph(text(*arguments))


@pytest.fixture
def rules():
    """Put the table of rules back afterwards."""
    load_rules()
    kept = dict(RULES)
    yield
    RULES.clear()
    RULES.update(kept)


def locks(analysis: Analysis) -> dict[str, str]:
    return {d.name: d.locked for d in analysis.dimensions if d.locked}


def test_it_is_locked_by_name(model):
    analysis = analyse(model())
    assert [where for where in analysis.typing.unknown if "MyScale" in where]
    found = locks(analysis)
    assert set(found) == {"blocks.1.ffn", "unknown", "unknown_1"}
    assert all(LOCKED in reason for reason in found.values())


def test_everything_else_is_cut(model):
    parent = model()
    analysis = analyse(parent)
    keep = {"hidden": tuple(range(8)), "blocks.0.ffn": (0, 2, 5), "blocks.1.heads": (2,), "blocks.2.head_dim": (1, 3)}
    child = apply(parent, Plan(keep=keep, blocks={"": (0, 1)}), analysis)
    assert child.weights["up1"].shape == (8, 14) and child.weights["scale1"].shape == (14,)
    assert child.weights["up0"].shape == (8, 3) and child.weights["wq1"].shape == (8, 5)
    assert analyse(child).dimension("hidden").size == 8


def test_without_a_declared_shape_the_reason_is_still_its_name(model):
    """What adds to a tensor of unknown shape cannot be cut; the reason names the operator, not those that follow it."""
    found = locks(analyse(model("")))
    assert "hidden" in found
    assert all(LOCKED in reason for reason in found.values())
    assert "blocks.0.ffn" not in found and "blocks.0.heads" not in found


def test_an_operator_that_runs_is_verified_around(model, graph, monkeypatch):
    """onnxruntime runs it, no rule knows it."""
    load_rules()
    monkeypatch.delitem(RULES, ("", "Erf"))
    parent = graph(text().replace("my.ops.MyScale(h1, scale1)", "Erf(h1)"))
    report = verify(parent)
    assert report.ok, str(report)
    assert set(locks(analyse(parent))) == {"blocks.1.ffn", "unknown"}


def test_a_line_teaches_it(model, rules):
    from graphclone.axes import rule

    rule("MyScale", "... d, d -> ... d", domain="my.ops")

    for declared in (", float[B, S, 14] t1", ""):
        parent = model(declared)
        analysis = analyse(parent)
        assert analysis.typing.unknown == [] and locks(analysis) == {}
        child = apply(parent, Plan(keep={"blocks.1.ffn": (1, 4, 6)}), analysis)
        assert child.weights["scale1"].shape == (3,)
        assert np.array_equal(child.weights["scale1"].load(), parent.weights["scale1"].load()[[1, 4, 6]])


def test_an_installed_package_is_asked(model, rules, tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        'from graphclone.axes import rule\n\nrule("MyScale", "... d, d -> ... d", domain="my.ops")\n'
    )
    entry = importlib.metadata.EntryPoint("mine", "my_rules", "graphclone.rules")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("graphclone.axes.entry_points", lambda group: [entry] if group == "graphclone.rules" else [])
    load_rules.cache_clear()
    try:
        assert type_axes(model()).unknown == []
    finally:
        sys.modules.pop("my_rules", None)
        load_rules.cache_clear()


def test_its_domain_is_kept(model, tmp_path):
    child = apply(model(), Plan(keep={"blocks.0.ffn": (0, 1)}))
    child.save(tmp_path / "child.onnx")
    nodes = {node.op_type: node.domain for node in onnx.load(tmp_path / "child.onnx").graph.node}
    assert nodes["MyScale"] == "my.ops"
    assert isinstance(child, Model)


def test_what_the_standard_does_not_have_is_said(graph):
    """Such a file is invalid, whatever wrote it; an operator may also have been given up."""
    model = graph("(float[B, 12] x) => (float[B, 7] z) <float[12, 7] w> { y = Erfc(x)  z = MatMul(y, w) }", opset=18)
    typing = analyse(model).typing
    assert [text.partition("', ")[2] for text in typing.unknown] == [
        "because opset 18 of the ONNX standard has no such operator"
    ]
    assert "no axis rule for Erfc node" in typing.types["x"][1].lock


LOOP = """(float[B, 14] p, float[B, 14] q, int64 n) => (float[B, 14] y, float[B, 16] z) <bool c = {1}, float[14, 16] w>
    { y = Loop(n, c, q) <body = body (int64 i, bool go, float[B, 14] s) => (bool on, float[B, 14] t)
        { on = Identity(go)  a = MatMul(s, w)  b = Transpose(w)  t = MatMul(a, b) }>
      z = MatMul(p, w) }"""


def test_a_loop_locks_the_weights_its_body_reads(graph):
    """The operator behind the loop reads the weight too, and must not cut it."""
    analysis = analyse(graph(LOOP))
    assert {d.size: d.locked for d in analysis.dimensions} == {
        size: "no axis rule for Loop node 'Loop_0'" for size in (14, 16)
    }
    assert len(analysis.typing.uses["w"]) == 3


@pytest.mark.parametrize(
    "inputs, reason",
    [("x, g, g", "has an input 2 that its rule does not speak of"), ("x, g2", "has an input of unexpected rank 2")],
)
def test_inputs_that_a_rule_does_not_describe_lock_the_node(graph, rules, inputs, reason):
    """Whatever the input means, no other axis of the node may be cut without it."""
    rule("MyScale", "... d, d -> ... d", domain="my.ops")
    weights = "float[12] g, float[1, 12] g2, float[12, 7] w"
    analysis = analyse(
        graph(f"(float[B, 12] x) => (float[B, 7] z) <{weights}> {{ y = my.ops.MyScale({inputs})  z = MatMul(y, w) }}")
    )
    found = {(d.size, d.locked) for d in analysis.dimensions}
    assert found == {(7, None), (12, f"my.ops.MyScale node 'MyScale_0' {reason}")}
