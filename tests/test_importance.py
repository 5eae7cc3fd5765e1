"""Check metrics, choices and ties by hand."""

import numpy as np
import pytest

from graphclone.calibration.statistics import SpanSums, Statistics, TapSums
from graphclone.errors import CutError, InputError
from graphclone.importance import BLOCK_RULES, METRICS, choose_blocks, metric, output_aware, place, select


@pytest.fixture
def stats():
    value, absolute, square = np.array([0.0, 4.0, -8.0]), np.array([6.0, 4.0, 8.0]), np.array([20.0, 8.0, 34.0])
    spans = {"a": SpanSums("x", "y", 2.0, 1.0, 0.5)}
    return Statistics("f", "cpu", taps={("t", 1): TapSums(2, 2.0, value, absolute, square)}, spans=spans)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("mean_abs", [3, 2, 4]),
        ("l2", np.sqrt([10, 4, 17])),
        ("variance", [10, 0, 1]),
        ("output_aware", np.sqrt([10, 4, 17])),
    ],
)
def test_scores(stats, name, scores):
    assert METRICS[name].measured
    assert np.allclose(METRICS[name](stats, "t"), scores)


def test_output_aware_looks_at_the_weights(stats):
    weight = np.array([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    assert np.allclose(output_aware(stats, "t", weight), np.sqrt([10, 4, 17]) * [5, 2, 1])


def test_scores_of_blocks(stats):
    assert BLOCK_RULES["relative_magnitude"].score(stats, "a") == 0.5
    assert BLOCK_RULES["block_influence"].score(stats, "a") == 0.25


def test_the_largest_scores_stay_and_ties_go_to_the_lower_index():
    scores = np.array([0.5, 2.0, 0.5, 2.0, 0.5])
    assert select("l2", 5, 3, scores=scores).tolist() == [0, 1, 3]
    assert select("l2", 5, 4, scores=scores).tolist() == [0, 1, 2, 3]
    assert select("l2", 5, 5, scores=scores).tolist() == [0, 1, 2, 3, 4]
    assert select("l2", 5, 1, scores=scores).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "size", "keep", "kept"),
    [
        ("first", 7, 3, [0, 1, 2]),
        ("uniform", 12, 4, [0, 3, 6, 9]),
        ("uniform", 11, 4, [0, 3, 7, 10]),
        ("uniform", 7, 1, [0]),
        ("uniform", 7, 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_positions(name, size, keep, kept):
    assert select(name, size, keep).tolist() == kept


@pytest.mark.parametrize("name", ["first", "uniform", "random"])
@pytest.mark.parametrize(("size", "keep"), [(1, 1), (13, 12), (768, 385), (50, 7)])
def test_choices_are_distinct_and_ascending(name, size, keep):
    kept = select(name, size, keep, seed=5)
    assert len(kept) == keep and (np.diff(kept) > 0).all() and 0 <= kept[0] and kept[-1] < size


def test_random_depends_on_the_seed_alone():
    assert np.array_equal(select("random", 90, 30, seed=1), select("random", 90, 30, seed=1))
    assert not np.array_equal(select("random", 90, 30, seed=1), select("random", 90, 30, seed=2))


@pytest.mark.parametrize(
    ("name", "keep", "kept"),
    [
        ("middle", 4, (0, 1, 5, 6)),
        ("middle", 5, (0, 1, 2, 5, 6)),
        ("middle", 1, (0,)),
        ("middle", 7, (0, 1, 2, 3, 4, 5, 6)),
        ("first", 2, (0, 1)),
        ("uniform", 3, (0, 3, 6)),
    ],
)
def test_blocks_by_position(name, keep, kept):
    assert choose_blocks(name, 7, keep) == kept


@pytest.mark.parametrize("name", ["relative_magnitude", "block_influence"])
def test_blocks_that_do_little_go(name):
    assert choose_blocks(name, 5, 3, [0.4, 0.1, 0.1, 0.2, 0.1]) == (0, 1, 3)


def test_a_metric_of_ones_own(stats):
    @metric("largest_mean")
    def largest_mean(statistics, tap):
        return np.abs(statistics.mean(tap))

    @place("last")
    def last(size, keep, seed):
        return np.arange(size - keep, size)

    try:
        scores = METRICS["largest_mean"](stats, "t")
        assert select("largest_mean", 3, 2, scores=scores).tolist() == [1, 2]
        assert select("last", 5, 2).tolist() == [3, 4]
    finally:
        del METRICS["largest_mean"], METRICS["last"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: select("mean_asb", 4, 2),
            InputError,
            "no importance metric is called 'mean_asb'; did you mean 'mean_abs'",
        ),
        (lambda: select("zebra", 4, 2), InputError, "there are mean_abs, l2, variance, output_aware, obs, first"),
        (lambda: select("l2", 4, 2), InputError, "'l2' is measured on samples; give --data or --stats"),
        (lambda: select("l2", 4, 2, scores=np.ones(3)), InputError, "one finite score for each of 4"),
        (lambda: select("l2", 2, 1, scores=np.array([1, np.nan])), InputError, "one finite score"),
        (lambda: select("first", 4, 5), CutError, "cannot keep 5 of 4; give a number from 1 to 4"),
        (lambda: select("first", 4, 0), CutError, "cannot keep 0 of 4"),
        (
            lambda: choose_blocks("midle", 4, 2),
            InputError,
            "no rule for blocks is called 'midle'; did you mean 'middle'",
        ),
        (lambda: choose_blocks("block_influence", 4, 2), InputError, "measured on samples"),
        (lambda: METRICS["first"](None, "t"), InputError, "looks at positions"),
    ],
)
def test_what_cannot_be_chosen(call, error, message):
    with pytest.raises(error, match=message):
        call()
