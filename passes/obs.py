"""OBS: choose a set of units together, since what correlated units do need not be kept twice."""

from collections.abc import Sequence

import numpy as np

DAMPING = 1e-3
ROUNDS = 256


def choose_by_obs(second: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray], keep: int) -> np.ndarray:
    """Return the groups that stay, ascending: greedily, the group whose loss the others can best make up for goes.

    second: E[x x'] [d, d]. weight: what reads x, [d, n]. groups: positions of each unit (a head has several).
    The loss of a group S is tr(W_S' (H^-1_SS)^-1 W_S); after it the others take it over and H^-1 is downdated. Where more
    than 256 groups go, several of the cheapest go at a time. In double precision, damped by a thousandth of the mean
    eigenvalue. Source: SparseGPT (arXiv 2301.00774) for the downdates,
    SlimGPT (arXiv 2412.18110) for groups of rows.

    Example:
        >>> x = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.0, 0.0, 3.0]])  # units 0 and 1 say the same
        >>> choose_by_obs(x.T @ x / 3, np.ones((3, 1)), [np.array([i]) for i in range(3)], 2).tolist()[-1]
        2
    """
    size = len(second)
    inverse = np.linalg.inv(second + DAMPING * np.trace(second) / size * np.eye(size))
    weight = weight.astype(np.float64).copy()
    left = np.arange(len(groups))
    together = max(1, (len(groups) - keep) // ROUNDS)
    while len(left) > keep:
        losses = _losses(inverse, weight, [groups[i] for i in left])
        gone = np.argsort(losses, kind="stable")[: min(together, len(left) - keep)]
        S = np.concatenate([groups[i] for i in left[gone]])
        left = np.delete(left, gone)
        columns = inverse[:, S]
        solved = np.linalg.solve(inverse[np.ix_(S, S)], np.hstack([weight[S], columns.T]))
        weight -= columns @ solved[:, : weight.shape[1]]
        inverse -= columns @ solved[:, weight.shape[1] :]
    return left


def _losses(inverse: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return what losing each group alone costs."""
    if all(len(group) == 1 for group in groups):
        units = np.concatenate(groups)
        return np.sum(weight[units] ** 2, axis=1) / inverse[units, units]
    parts = ((weight[group], inverse[np.ix_(group, group)]) for group in groups)
    return np.array([float(np.sum(rows * np.linalg.solve(block, rows))) for rows, block in parts])
