"""The report: it says what was kept and why, treats names as text, needs nothing beside it, and is written whole."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphclone.analysis import analyse
from graphclone.errors import InputError
from graphclone.importance import Ranking
from graphclone.model import Model, load
from graphclone.pipeline import Pipeline
from graphclone.plan import Plan
from graphclone.report import Origin, render, write_report
from graphclone.subclone import calibrate
from graphclone.surgery import apply
from graphclone.verify.report import Check, Report

PARENT = Path(__file__).parent.parent / "tools" / "demo_data" / "parent.onnx"
ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>\u202e\n{{ 7 * 7 }}"
PASSED = Report((Check("checker", True), Check("permutation", True, 3.2e-7, 1e-5, "15 axes", 0.4)))


class Page(HTMLParser):
    """A page's text and elements."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def parent() -> Model:
    return load(PARENT)


@pytest.fixture(scope="module")
def made(parent):
    """A child ranked by activations, and the page about it."""
    analysis = analyse(parent)
    hidden, ffn = (analysis.dimension(name).size // 2 for name in ("hidden", "blocks.0.ffn"))
    random = np.random.default_rng(0)
    feeds = [{"ids": random.integers(0, 65, (4, 24))} for _ in range(2)]
    stats = calibrate(parent, feeds, progress=False)
    steps = Pipeline.parse(f"depth{{layers=2 by=block_influence}},width{{hidden={hidden} ffn={ffn}}},rescale")
    result = steps.run(parent, stats, analysis=analysis)
    origin = Origin(result.rankings, ("one note",), 3, stats, steps.text(), ("--data", "my samples.npz"))
    source = render(parent, result.child, result.plan, analysis, origin, PASSED)
    return analysis, result, stats, source


def hostile(name: str) -> Model:
    """A linear layer that reads the graph's input; every name of its graph is `name` and a number."""
    weight = numpy_helper.from_array(np.eye(6, dtype=np.float32), f"{name}1")
    middle = numpy_helper.from_array(np.eye(6, dtype=np.float32) * 2, f"{name}2")
    nodes = [
        helper.make_node("MatMul", [f"{name}0", f"{name}1"], [f"{name}3"], name=f"{name}n"),
        helper.make_node("MatMul", [f"{name}3", f"{name}2"], [f"{name}4"], name=f"{name}m"),
    ]
    ends = [helper.make_tensor_value_info(f"{name}{i}", TensorProto.FLOAT, ["b", 6]) for i in (0, 4)]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], [weight, middle])
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_it_says_what_was_kept(made):
    analysis, result, _, source = made
    text = Page(source).text
    hidden = analysis.dimension("hidden").size
    assert f"hidden {hidden} → {hidden // 2}" in text
    assert f"{len(analysis.stacks[0].blocks)} → 2" in text
    for old in range(len(analysis.stacks[0].blocks)):
        new = next((i for i, kept in enumerate(result.plan.blocks[""]) if kept == old), None)
        assert f"block {old}: " + ("dropped" if new is None else f"kept as block {new}") in source


def test_it_says_why_by_the_scores_that_chose(made):
    _, result, stats, source = made
    names = {ranking.name for ranking in result.rankings}
    assert {"hidden", "blocks", *(f"blocks.{i}.ffn" for i in result.plan.blocks[""])} <= names
    for ranking in result.rankings:
        rest = np.setdiff1d(np.arange(len(ranking.scores)), ranking.kept)
        assert ranking.scores[ranking.kept].min() >= ranking.scores[rest].max(), ranking.name
        kept = result.plan.keep.get(ranking.name, result.plan.blocks[""])
        assert ranking.kept.tolist() == list(kept)
    assert source.count('class="area"') == len(names) - 1
    assert f"{stats.tokens:,} tokens" in source and "one note" in source and "by <code>mean_abs</code>" in source


def test_it_says_how_the_child_was_checked_and_how_to_make_it_again(made):
    _, result, stats, source = made
    text = Page(source).text
    assert "2 checks passed" in text and "3.2e-07" in text and "≤ 1.0e-05" in text and "(15 axes)" in text
    assert result.child.fingerprint in text and result.child.metadata["graphclone.parent"] in text
    assert stats.data in text
    pipeline = result.child.metadata["graphclone.pipeline"]
    assert f"graphclone run '{pipeline}' parent.onnx --data 'my samples.npz' --seed 3 -o child.onnx" in text


def test_a_check_that_failed_is_not_hidden(made, parent):
    analysis, result, *_ = made
    failed = Report((*PASSED.checks, Check("outputs", False, float("inf"), 1e-5, "output 'logits'")))
    text = Page(render(parent, result.child, result.plan, analysis, Origin(), failed)).text
    assert "1 of 3 checks failed" in text and "FAIL" in text and "inf" in text
    text = Page(render(parent, result.child, result.plan, analysis, Origin(), None)).text
    assert "not verified" in text and "checks passed" not in text
    assert "graphclone apply plan.json parent.onnx" in text


def test_it_needs_no_network_and_runs_no_script(made):
    elements = Page(made[-1]).elements
    assert not {"script", "link", "iframe", "img", "object", "form"} & {tag for tag, _ in elements}
    assert not any(name.startswith("on") or name in ("href", "src") for _, found in elements for name in found)
    assert "http" not in made[-1].replace("http-equiv", "") and "url(" not in made[-1]
    assert any("default-src 'none'" in (found.get("content") or "") for _, found in elements)


def test_names_of_the_graph_are_text():
    model = hostile(ATTACK)
    analysis = analyse(model)
    plan = Plan(scale={f"{ATTACK}1": 2.0}, replace={f"{ATTACK}2": np.ones((6, 6), np.float32)})
    child = apply(model, plan, analysis)
    ranking = Ranking(ATTACK, ATTACK, np.arange(4.0), np.array([2, 3]))
    checks = Report((Check(ATTACK, False, 1.0, 1e-5, ATTACK),))
    source = render(model, child, plan, analysis, Origin((ranking,), (ATTACK,), 0, None, ATTACK), checks)
    page = Page(source)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert html.escape("<script>alert(", quote=False) in source
    assert "{{ 7 * 7 }}" in page.text and "\\u202e" in page.text and "\u202e" not in source


def test_long_names_are_shortened():
    model = hostile("n" * 10_000)
    source = render(model, model, Plan(scale={"n" * 10_000 + "1": 2.0}), analyse(model), Origin(), None)
    assert "n" * 80 in source and "n" * 200 not in source


def test_a_page_is_whole_or_not_there(made, parent, tmp_path, monkeypatch):
    analysis, result, *_ = made
    path = tmp_path / "page.html"
    path.write_text("before")
    broken = replace(result.plan, keep={"hidden": (-1,)})
    with pytest.raises(Exception, match="hidden"):
        write_report(path, parent, result.child, broken, analysis)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        write_report(path, parent, result.child, result.plan, analysis)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_report(path, parent, result.child, result.plan, analysis)
    assert path.read_text(encoding="utf-8").endswith("</html>") and list(tmp_path.iterdir()) == [path]


def test_both_commands_write_it(tmp_path, capfd):
    from graphclone.cli import main

    page, plan, child = tmp_path / "page.html", tmp_path / "plan.json", tmp_path / "child.onnx"
    size = analyse(load(PARENT)).dimension("hidden").size // 2
    command = [
        "subclone",
        PARENT,
        "--hidden",
        size,
        "--by",
        "uniform",
        "--plan-out",
        plan,
        "--report",
        page,
        "-o",
        child,
    ]
    assert main(list(map(str, command))) == 0
    assert f"report    {page}" in capfd.readouterr().out
    assert "checks passed" in page.read_text(encoding="utf-8") and "by=uniform" in page.read_text(encoding="utf-8")
    page.unlink()
    assert main(list(map(str, ["apply", plan, PARENT, "--report", page, "-o", child]))) == 0
    assert "graphclone apply" in page.read_text(encoding="utf-8")
    page.unlink()
    assert main(list(map(str, [*command[:-2], "--dry-run"]))) == 0
    assert "not verified" in page.read_text(encoding="utf-8")
    onnx.checker.check_model(onnx.load(child))


def test_a_page_that_cannot_be_written_is_said_before_any_work(tmp_path, capfd):
    from graphclone.cli import main

    page = tmp_path / "none" / "page.html"
    command = ["subclone", PARENT, "--hidden", 8, "--by", "uniform", "--report", page, "-o", tmp_path / "child.onnx"]
    assert main(list(map(str, command))) == 2
    assert "there is no folder" in capfd.readouterr().err and not list(tmp_path.iterdir())
