"""OBS: units that say the same are not all kept, and not all dropped."""

import numpy as np
import pytest

from passes import obs


@pytest.mark.parametrize("rounds", [5, 256])
def test_of_two_units_that_say_the_same_one_stays(rounds, monkeypatch):
    monkeypatch.setattr(obs, "ROUNDS", rounds)
    random, count = np.random.default_rng(0), 40
    x, weight = random.normal(size=(700, count)), random.normal(size=(count, 9))
    x, weight = np.hstack([x, x]), np.vstack([weight, weight])
    kept = obs.choose_by_obs(x.T @ x / len(x), weight, [np.array([i]) for i in range(2 * count)], count)
    assert sorted(kept % count) == list(range(count))


def test_one_group_at_a_time_is_the_exact_greedy_choice():
    random = np.random.default_rng(1)
    x = random.normal(size=(500, 12)) @ random.normal(size=(12, 12))
    second, weight = x.T @ x / len(x), random.normal(size=(12, 5))
    groups = [np.arange(3 * i, 3 * i + 3) for i in range(4)]

    def lost(kept):
        damped = second + obs.DAMPING * np.trace(second) / 12 * np.eye(12)
        rows = np.concatenate([groups[i] for i in kept])
        refitted = np.linalg.solve(damped[np.ix_(rows, rows)], damped[rows] @ weight)
        return np.trace(weight.T @ damped @ weight) - np.trace(refitted.T @ damped[rows] @ weight)

    chosen = [0, 1, 2, 3]
    for _ in range(2):
        chosen = min(([i for i in chosen if i != gone] for gone in chosen), key=lost)
    assert obs.choose_by_obs(second, weight, groups, 2).tolist() == chosen


def test_units_that_nothing_ever_reached_are_all_alike():
    assert len(obs.choose_by_obs(np.zeros((6, 6)), np.ones((6, 2)), [np.array([i]) for i in range(6)], 4)) == 4
