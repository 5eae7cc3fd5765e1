"""The solver from Gram matrices agrees with least squares on the rows, and keeps the weights where it must."""

import numpy as np
import pytest

from passes.ridge import EXACTLY, Moments, Targets, solve


def moments_of(x, t, held=None) -> Moments:
    moments = Moments(x.shape[1])
    for rows, is_held in ((slice(None), False),) if held is None else ((slice(held, None), False), (slice(held), True)):
        z = np.hstack([x[rows], np.ones((len(x[rows]), 1)), t[rows]])
        moments.add(z.T @ z, is_held)
    return moments


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 5)) + 3.0
    return x, x @ random.standard_normal((5, 3)) + random.standard_normal(3) + 0.1 * random.standard_normal((400, 3))


@pytest.mark.parametrize("ridge", [1e-9, 1e-2])
@pytest.mark.parametrize("intercept", [True, False])
def test_it_is_ridge_regression_drawn_to_the_weights_before(rows, ridge, intercept):
    x, y = rows
    before = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    found = solve(moments_of(x, y), Targets.of(3), before, ridge, intercept).weights
    strength = ridge * (x**2).sum() / 5
    whole = np.hstack([x, np.ones((400, 1))]) if intercept else x
    drawn = np.diag([strength] * 5 + [0.0] * intercept)
    residual = y - np.hstack([x, np.ones((400, 1))]) @ before
    step = np.linalg.solve(whole.T @ whole + drawn, whole.T @ residual)
    wanted = before.astype(np.float64)
    wanted[: len(step)] += step
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "onto", [None, np.array([2, 0]), np.linalg.qr(np.random.default_rng(3).standard_normal((3, 2)))[0]]
)
def test_targets_that_are_linear_in_what_was_measured_need_not_be_measured(onto):
    random = np.random.default_rng(2)
    x, t = random.standard_normal((200, 4)), random.standard_normal((200, 6))
    weight, bias = random.standard_normal((6, 3)), random.standard_normal(3)
    y = t @ weight + bias
    y = y if onto is None else y[:, onto] if onto.ndim == 1 else y @ onto
    before = np.zeros((5, y.shape[1]), np.float32)
    implied = solve(moments_of(x, t), Targets(y.shape[1], weight, bias, onto), before, 1e-3, True)
    measured = solve(moments_of(x, y), Targets.of(y.shape[1]), before, 1e-3, True)
    assert np.allclose(implied.weights, measured.weights, atol=1e-6)
    assert implied.after == pytest.approx(measured.after, rel=1e-6)


def test_errors_are_those_of_the_rows_held_out(rows):
    x, y = rows
    found = solve(moments_of(x, y, held=100), Targets.of(3), np.zeros((6, 3), np.float32), 1e-3, True)
    got = np.hstack([x[:100], np.ones((100, 1))]) @ found.weights
    assert found.before == pytest.approx(1.0)
    assert found.after == pytest.approx(((got - y[:100]) ** 2).sum() / (y[:100] ** 2).sum(), rel=1e-4)


def test_a_fit_that_rows_held_out_do_not_confirm_stays_away():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((36, 24)), random.standard_normal((36, 2))
    found = solve(moments_of(x, y, held=9), Targets.of(2), np.zeros((25, 2), np.float32), 1e-3, True)
    assert found.weights is None
    assert "held out" in found.why


def test_a_stronger_ridge_is_tried_before_the_slice():
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 24))
    y = 0.5 * x[:, :2] + random.standard_normal((60, 2))
    assert (
        solve(moments_of(x, y, held=20), Targets.of(2), np.zeros((25, 2), np.float32), 1e-2, True).weights is not None
    )
    assert solve(moments_of(x, y, held=20), Targets.of(2), np.zeros((25, 2), np.float32), 1e-5, True).weights is None


def test_dependent_inputs_are_told(rows):
    x, y = rows
    x = np.hstack([x, x])
    found = solve(moments_of(x, y), Targets.of(3), np.zeros((11, 3), np.float32), 1e-12, True)
    assert found.weights is None
    assert "nearly dependent" in found.why


def test_nan_is_told(rows):
    x, y = rows
    found = solve(moments_of(x * np.nan, y), Targets.of(3), np.zeros((6, 3), np.float32), 1e-2, True)
    assert found.weights is None
    assert "NaN" in found.why


def test_weights_that_are_right_stay_as_they_are():
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((50, 4)), random.standard_normal((4, 2))
    before = np.vstack([weight, np.zeros((1, 2))])
    found = solve(moments_of(x, x @ weight), Targets.of(2), before, 1e-2, True)
    assert found.weights is None
    assert found.why == EXACTLY


def test_many_outputs_are_solved_in_parts(rows, monkeypatch):
    x, y = rows
    whole = solve(moments_of(x, y), Targets.of(3), np.zeros((6, 3), np.float32), 1e-2, True)
    monkeypatch.setattr("passes.ridge.COLUMNS", 2)
    parts = solve(moments_of(x, y), Targets.of(3), np.zeros((6, 3), np.float32), 1e-2, True)
    assert np.array_equal(whole.weights, parts.weights)
