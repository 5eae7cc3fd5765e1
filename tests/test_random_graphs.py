"""Random transformers: whatever a graph is made of, the three oracles hold and no width is lost."""

import os

import growth
import pytest
from grown import judge, judge_many
from growth import Attention, Block, FeedForward, Recipe, Writing

RECIPES = [
    Recipe(  # the half of it has norms over what hardly varies, which amplify rounding
        (
            Block(Attention("thirds", "halves"), FeedForward("picked_experts"), "sandwich"),
            Block(None, shared=True),
        ),
        norm="instance",
        exit="argmax",
        writing=Writing(linear="gemm"),
        heads=2,
        ffn=14,
    ),
]
"""Graphs that once failed."""
COUNT = 2000 if os.environ.get("GRAPHCLONE_LONG") else 200
FEW = 0.03


def test_oracles_hold():
    tally = judge_many(COUNT)
    assert len(tally.nodes) >= COUNT
    assert len(tally.amplified) <= FEW * COUNT


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_what_once_failed_holds(recipe):
    assert judge(recipe)


@pytest.mark.parametrize("kind", [Attention, FeedForward, Block, Recipe, Writing], ids=lambda kind: kind.__name__)
def test_every_choice_alone(kind):
    """Each value of each field holds in the simplest graph too, so that a failure above has a small relative here."""
    for name, values in growth.CHOICES[kind].items():
        for value in dict.fromkeys(values):
            judge(_simple(kind, **{name: value}))


def _simple(kind: type, /, **given) -> Recipe:
    if kind is Recipe:
        return Recipe(**given)
    if kind is Writing:
        return Recipe(writing=Writing(**given))
    if kind is Block:
        return Recipe(blocks=(Block(**given),) * 2)
    part = {"attention": Attention(**given)} if kind is Attention else {"ffn": FeedForward(**given)}
    return Recipe(blocks=(Block(**part),))
