"""A gate off is a half block gone, a gate on changes nothing."""

import numpy as np
import pytest

import graphclone
from graphclone.analysis import analyse
from graphclone.calibration.session import open_session
from graphclone.errors import CutError
from graphclone.gates import GATES, gated
from graphclone.plan import Plan
from graphclone.resolution import half_names
from graphclone.surgery import apply

zoo = pytest.importorskip("zoo")

FAMILIES = ["gpt2", *(pytest.param(family, marks=pytest.mark.long) for family in ("bert", "t5", "vit", "llama"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_off_is_a_half_block_gone(family):
    model, feeds = graphclone.load(zoo.export(family, "legacy17")), zoo.feeds(family)
    analysis = analyse(model)
    halves = [pair for stack in analysis.stacks for block in stack.blocks for pair in half_names(stack, block)]
    session = open_session(gated(model, [half for _, half in halves]))
    whole = session.run(None, {**feeds, GATES: np.ones(len(halves), bool)})[0]
    assert np.allclose(whole, open_session(model).run(None, feeds)[0], atol=1e-5)
    for number, (name, _) in list(enumerate(halves))[::3]:
        found = session.run(None, {**feeds, GATES: np.arange(len(halves)) != number})[0]
        assert np.abs(found - whole).max() > 1e-3
        dropped = apply(model, Plan(drop=(name,)), analysis)
        assert np.allclose(found, open_session(dropped).run(None, feeds)[0], atol=1e-4)


def test_a_sum_that_also_normalises_cannot_be_switched_off():
    model = graphclone.load(zoo.export("gpt2", "fused"))
    with pytest.raises(CutError, match="cannot switch off the branch that ends in"):
        gated(model, analyse(model).stacks[0].blocks[0].halves)
