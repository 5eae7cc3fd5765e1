"""Check that made-up feeds are feeds that the model runs."""

import numpy as np
import pytest

from graphclone.calibration.session import open_session
from graphclone.calibration.synthesis import synthesise


def test_they_run(attention):
    model = attention()
    feeds = synthesise(model, {"length": 9})
    assert feeds["ids"].shape == feeds["mask"].shape == (3, 9)
    assert feeds["ids"].max() < 23 and feeds["ids"].std() > 2
    assert (feeds["mask"] == 1).all()
    open_session(model).run(None, feeds)


def test_one_sample_is_padded(attention):
    mask = synthesise(attention(), {"batch": 2, "length": 7}, padded=True)["mask"]
    assert mask.tolist() == [[1] * 7, [1] * 5 + [0] * 2]


def test_types_limits_and_computed_sizes(graph):
    model = graph(
        "(float16[b, 3] x, bool[b] flags, int32[b, s] codes, int64[s] position_ids, float[b, p, 4] past, "
        "int64[b, m] all) => (float16[b, 3] y) { y = Neg(x) }"
    )
    model.inputs[-1].shape = ["b", "p + s"]
    feeds = synthesise(model, {"b": 2, "p": 6}, upper={"codes": 50}, seed=3)
    assert [feeds[name].dtype for name in ("x", "flags", "codes")] == [np.float16, bool, np.int32]
    assert feeds["flags"].all() and feeds["codes"].max() > 5
    assert feeds["past"].shape == (2, 6, 4) and feeds["all"].shape == (2, 6 + feeds["codes"].shape[1])
    assert feeds["position_ids"].tolist() == list(range(feeds["codes"].shape[1]))
    again = synthesise(model, {"b": 2, "p": 6}, upper={"codes": 50}, seed=3)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)


@pytest.mark.parametrize("size", ["__import__('os')", "a if b else c", "a +", "f(x)"])
def test_names_of_sizes_are_only_names(graph, size):
    model = graph("(float[b, 3] x) => (float[b, 3] y) { y = Neg(x) }")
    model.inputs[0].shape = [size, 3]
    assert synthesise(model)["x"].shape == (3, 3)
