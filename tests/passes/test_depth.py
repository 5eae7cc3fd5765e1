"""Depth: a number of blocks, or a list of them."""

import pytest

from graphclone.errors import CutError
from graphclone.pipeline import Pipeline


def test_a_number_and_a_list_are_not_both_meant(make):
    assert Pipeline.parse("depth{blocks=[0,2]}").plan(make()).blocks == {"": (0, 2)}
    with pytest.raises(CutError, match="give one of the two"):
        Pipeline.parse("depth{layers=3 blocks=[0,2]}").plan(make())
