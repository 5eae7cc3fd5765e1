"""OBS: choose a set of units together, since what correlated units do need not be kept twice."""

from collections.abc import Sequence

import numpy as np

DAMPING = 1e-3


def choose_by_obs(second: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray], keep: int) -> np.ndarray:
    """Return the groups that stay, ascending: greedily, the group whose loss the others can best make up for goes.

    second: E[x x'] [d, d]. weight: what reads x, [d, n]. groups: positions of each unit (a head has several).
    The loss of a group S is tr(W_S' (H^-1_SS)^-1 W_S); after it the others take it over and H^-1 is downdated. In double
    precision, damped by a thousandth of the mean eigenvalue. Source: SparseGPT (arXiv 2301.00774) for the downdates,
    SlimGPT (arXiv 2412.18110) for groups of rows.

    Example:
        >>> x = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.0, 0.0, 3.0]])  # units 0 and 1 say the same
        >>> choose_by_obs(x.T @ x / 3, np.ones((3, 1)), [np.array([i]) for i in range(3)], 2).tolist()[-1]
        2
    """
    size = len(second)
    inverse = np.linalg.inv(second + DAMPING * np.trace(second) / size * np.eye(size))
    weight = weight.astype(np.float64).copy()
    left = list(range(len(groups)))
    while len(left) > keep:
        losses = []
        for i in left:
            rows = weight[groups[i]]
            losses.append(float(np.sum(rows * np.linalg.solve(inverse[np.ix_(groups[i], groups[i])], rows))))
        gone = left.pop(int(np.argmin(losses)))
        S = groups[gone]
        columns = inverse[:, S]
        solved = np.linalg.solve(inverse[np.ix_(S, S)], np.hstack([weight[S], columns.T]))
        weight -= columns @ solved[:, : weight.shape[1]]
        inverse -= columns @ solved[:, weight.shape[1] :]
    return np.array(left)
