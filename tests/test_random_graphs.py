"""Random transformers: whatever a graph is made of, the three oracles hold and no width is lost."""

import os

import growth
import onnxruntime
import pytest
from growth import Attention, Block, FeedForward, Recipe, Writing, grow
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import first_lock, free_leaves
from graphclone.calibration.session import RUNTIME_ERRORS
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.verify import verify
from graphclone.verify.report import Report

LONG = bool(os.environ.get("GRAPHCLONE_LONG"))
COUNT = 2000 if LONG else 200
ROUNDING = 2e-4


def fields(kind: type, **others) -> st.SearchStrategy:
    choices = {name: st.sampled_from(values) for name, values in growth.CHOICES[kind].items()}
    return st.builds(kind, **choices, **others)


ATTENTIONS = st.one_of(st.none(), *[fields(Attention)] * 5)
BLOCKS = fields(Block, attention=ATTENTIONS, ffn=fields(FeedForward))
RECIPES = fields(Recipe, writing=fields(Writing), blocks=st.lists(BLOCKS, min_size=1, max_size=2).map(tuple))


@settings(
    max_examples=COUNT,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
@given(RECIPES)
def test_oracles_hold(recipe):
    grown = grow(recipe)
    model = Model.from_proto(grown.proto)
    analysis = analyse(model)
    assert analysis.typing.unknown == []
    assert locked(analysis, grown.widths) == {}
    try:
        report = verify(model, analysis=analysis)
    except InputError:
        assume(runs(grown.proto))
        raise
    assert holds(report), str(report)


def holds(report: Report) -> bool:
    """Tell whether all passed, give or take the rounding that random weights amplify: a mistake is far larger."""
    return all(check.figure is not None and check.figure < ROUNDING for check in report.failed)


def locked(analysis: Analysis, widths: list[tuple[str, int]]) -> dict[str, str | None]:
    """Return the widths of which nothing can be cut, with the reasons."""
    uses = analysis.typing.uses
    return {
        f"axis {axis} of {name}": first_lock(uses[name][0].axes[axis])
        for name, axis in widths
        if not any(free_leaves(use.axes[axis]) for use in uses[name])
    }


def runs(proto) -> bool:
    """Tell whether onnxruntime takes the graph as it was grown: its shape inference refuses a few legal ones."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS:
        return False
    return True


@pytest.mark.parametrize("kind", [Attention, FeedForward, Block, Recipe, Writing], ids=lambda kind: kind.__name__)
def test_every_choice_alone(kind):
    """Each value of each field holds in the simplest graph too, so that a failure above has a small relative here."""
    for name, values in growth.CHOICES[kind].items():
        for value in dict.fromkeys(values):
            recipe = _simple(kind, **{name: value})
            grown = grow(recipe)
            if not runs(grown.proto):
                continue
            model = Model.from_proto(grown.proto)
            analysis = analyse(model)
            assert locked(analysis, grown.widths) == {}, recipe
            report = verify(model, analysis=analysis)
            assert holds(report), f"{recipe}\n{report}"


def _simple(kind: type, /, **given) -> Recipe:
    if kind is Recipe:
        return Recipe(**given)
    if kind is Writing:
        return Recipe(writing=Writing(**given))
    if kind is Block:
        return Recipe(blocks=(Block(**given),) * 2)
    part = {"attention": Attention(**given)} if kind is Attention else {"ffn": FeedForward(**given)}
    return Recipe(blocks=(Block(**part),))
