"""A plan that keeps everything changes nothing, and a plan carried out twice gives the same bytes."""

from pathlib import Path

import numpy as np
import pytest

from graphclone.analysis import analyse
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify.running import first_run, run

EXPORTS = sorted((Path(__file__).parent / "fixtures" / "optimum").glob("*/*.onnx"))
NAMES = [f"{path.parent.name}-{path.stem}" for path in EXPORTS]


def keeping_everything(analysis) -> Plan:
    kept = {d.name: tuple(range(d.size)) for d in analysis.dimensions}
    return Plan(keep=kept, blocks={s.prefix.rstrip("."): tuple(range(len(s.blocks))) for s in analysis.stacks})


def halving(analysis) -> Plan:
    kept = {}
    for dimension in analysis.dimensions:
        if dimension.locked is None and dimension.role in ("hidden", "ffn", "heads") and dimension.size > 1:
            kept[dimension.name] = tuple(range(1, dimension.size, 2))
    return Plan(keep=kept)


@pytest.mark.parametrize("path", EXPORTS, ids=NAMES)
def test_keeping_everything_leaves_weights_and_outputs_bit_identical(path, tmp_path):
    parent = load(path)
    analysis = analyse(parent)
    child = apply(parent, keeping_everything(analysis), analysis)
    child.save(tmp_path / "child.onnx")
    child = load(tmp_path / "child.onnx")

    assert list(child.weights) == list(parent.weights)
    for name, weight in parent.weights.items():
        assert child.weights[name].onnx_dtype == weight.onnx_dtype
        assert np.array_equal(child.weights[name].load(), weight.load(), equal_nan=weight.dtype.kind == "f")

    _, probes, _ = first_run(parent, analysis)
    for got, wanted in zip(run(child, probes), run(parent, probes), strict=True):
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            assert np.array_equal(got[name], array), name


@pytest.mark.parametrize("path", EXPORTS, ids=NAMES)
def test_an_empty_plan_keeps_every_node(path):
    parent = load(path)
    child = apply(parent, Plan())
    assert [(node.name, node.op) for node in child.graph.nodes] == [(node.name, node.op) for node in parent.graph.nodes]
    assert child.metadata == parent.metadata


@pytest.mark.parametrize("path", EXPORTS[-2:], ids=NAMES[-2:])
def test_a_plan_carried_out_twice_gives_the_same_bytes(path, tmp_path):
    written = []
    for folder in ("first", "second"):
        parent = load(path)
        analysis = analyse(parent)
        (tmp_path / folder).mkdir()
        apply(parent, halving(analysis), analysis).save(tmp_path / folder / "child.onnx")
        written.append((tmp_path / folder / "child.onnx").read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) < path.stat().st_size


def test_the_parent_is_not_changed():
    parent = load(EXPORTS[0])
    before = parent.fingerprint
    apply(parent, halving(analyse(parent)))
    assert parent.fingerprint == before
