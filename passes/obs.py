"""OBS: choose a set of units together, since what correlated units do need not be kept twice."""

import math
from collections.abc import Sequence

import numpy as np

DAMPING = 1e-3
ROUNDS = 256
POOL = (
    4  # of so many times what a round takes, the cheapest are looked at together: of two that say the same, one stays
)


def choose_by_obs(second: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray], keep: int) -> np.ndarray:
    """Return the groups that stay, ascending: greedily, the group whose loss the others can best make up for goes.

    second: E[x x'] [d, d]. weight: what reads x, [d, n]. groups: positions of each unit (a head has several).
    The loss of a group S is tr(W_S' (H^-1_SS)^-1 W_S); after it the others take it over and H^-1 is downdated. Where
    more than 256 groups go, each round takes several, greedily among the cheapest. In double precision, damped by a
    thousandth of the mean eigenvalue. Source: SparseGPT (arXiv 2301.00774) for the downdates, SlimGPT (arXiv
    2412.18110) for groups of rows.

    Example:
        >>> x = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.0, 0.0, 3.0]])  # units 0 and 1 say the same
        >>> choose_by_obs(x.T @ x / 3, np.ones((3, 1)), [np.array([i]) for i in range(3)], 2).tolist()[-1]
        2
    """
    size = len(second)
    damping = DAMPING * np.trace(second) / size or 1.0  # where nothing was ever read, all units are alike
    inverse = np.linalg.inv(second + damping * np.eye(size))
    weight = weight.astype(np.float64).copy()
    left = np.arange(len(groups))
    together = math.ceil((len(groups) - keep) / ROUNDS)
    while len(left) > keep:
        count = min(together, len(left) - keep)
        losses = _losses(inverse, weight, [groups[i] for i in left])
        pool = np.argsort(losses, kind="stable")[: POOL * count]
        gone = pool[_cheapest(inverse, weight, [groups[i] for i in left[pool]], count)]
        _remove(inverse, weight, np.concatenate([groups[i] for i in left[gone]]))
        left = np.delete(left, gone)
    return left


def _cheapest(inverse: np.ndarray, weight: np.ndarray, pool: Sequence[np.ndarray], count: int) -> list[int]:
    """Return the numbers of the groups of a pool that go, one after another; nothing is changed."""
    positions = np.concatenate(pool)
    inverse, weight = inverse[np.ix_(positions, positions)], weight[positions]
    groups = np.split(np.arange(len(positions)), np.cumsum([len(group) for group in pool])[:-1])
    gone: list[int] = []
    while len(gone) < count:
        left = [i for i in range(len(pool)) if i not in gone]
        gone.append(left[int(np.argmin(_losses(inverse, weight, [groups[i] for i in left])))])
        _remove(inverse, weight, groups[gone[-1]])
    return gone


def _remove(inverse: np.ndarray, weight: np.ndarray, S: np.ndarray) -> None:
    """Let the other rows take over what the rows S did, in place."""
    columns = inverse[:, S]
    solved = np.linalg.solve(inverse[np.ix_(S, S)], np.hstack([weight[S], columns.T]))
    weight -= columns @ solved[:, : weight.shape[1]]
    inverse -= columns @ solved[:, weight.shape[1] :]


def _losses(inverse: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return what losing each group alone costs."""
    if all(len(group) == 1 for group in groups):
        units = np.concatenate(groups)
        return np.sum(weight[units] ** 2, axis=1) / inverse[units, units]
    parts = ((weight[group], inverse[np.ix_(group, group)]) for group in groups)
    return np.array([float(np.sum(rows * np.linalg.solve(block, rows))) for rows, block in parts])
