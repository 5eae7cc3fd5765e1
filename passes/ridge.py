"""Ridge: least squares from Gram matrices, drawn towards the weights there are, and judged on rows held out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

COLUMNS = 4096
STRENGTHS = (1, 10, 100)
WORST_CONDITION = 1e7
EXACT = 1e-7
EXACTLY = "the slice is exact"
"""COLUMNS: outputs solved at a time, which bounds memory. WORST_CONDITION: fp32 Gram matrices are right to about 1e-7.
EXACT: a mean squared error, as a share of the targets', below which there is nothing to fit."""


@dataclass
class Moments:
    """Sums of z z' over rows z = [x (K), 1, t], in double precision; rows to solve by, and rows to judge by.

    Targets are a linear function of t: y = V' [1, t]. So the targets themselves need not be as wide as t.
    """

    inputs: int
    train: np.ndarray | None = None
    held: np.ndarray | None = None

    def add(self, gram: np.ndarray, held: bool) -> None:
        """Count one batch."""
        name = "held" if held else "train"
        known = getattr(self, name)
        if known is None:
            setattr(self, name, gram.astype(np.float64))
        else:
            known += gram


@dataclass
class Solution:
    """weights: [K+1, N] in fp32, the last row the intercept, or None where nothing was fitted, and `why`.

    before, after: the mean squared error on the rows held out, as a share of the mean square of the targets.
    """

    weights: np.ndarray | None = None
    before: float = 0.0
    after: float = 0.0
    why: str = ""


def solve(moments: Moments, targets: "Targets", before: np.ndarray, ridge: float, intercept: bool) -> Solution:
    """Return W' = W + (X'X + r I)^-1 X'(Y - X W) with r = ridge * trace(X'X) / K; the intercept is not drawn to W's.

    before: the weights there are, [K+1, N]. targets: yields the columns of Y. Where the rows held out refuse a
    solution, or the matrix is ill-conditioned, a ridge ten and a hundred times as strong is tried; then the weights
    stay.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((99, 3))
        >>> z = np.hstack([x, np.ones((99, 1)), x @ np.ones((3, 2))])
        >>> moments = Moments(3); moments.add(z.T @ z, held=False)
        >>> solve(moments, Targets.of(2), np.zeros((4, 2)), 1e-9, True).weights.round(4)[:3].tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if not all(np.isfinite(gram).all() for gram in (moments.train, moments.held) if gram is not None):
        return Solution(why="its inputs or targets hold NaN or Inf")
    first = None
    for strength in STRENGTHS:
        found = _solve(moments, targets, before, strength * ridge, intercept)
        if found.weights is not None or found.why == EXACTLY:
            return found
        first = first or found
    return first


def _solve(moments: Moments, targets: "Targets", before: np.ndarray, ridge: float, intercept: bool) -> Solution:
    """Solve with one ridge, some columns at a time."""
    gram = moments.train
    judge = moments.held if moments.held is not None else gram
    size = moments.inputs
    factor = _Factor(gram[: size + 1, : size + 1], ridge, intercept)
    if factor.condition > WORST_CONDITION:
        return Solution(why=f"its inputs are nearly dependent (condition {factor.condition:.0e}); a larger ridge helps")
    errors, energy, parts = np.zeros(2), 0.0, []
    for columns, mapping in targets.columns():
        old = before[:, columns].astype(np.float64)
        new = old + factor.step(_image(gram[: size + 1, size:], columns, mapping) - gram[: size + 1, : size + 1] @ old)
        power = _power(judge[size:, size:], columns, mapping)
        cross = _image(judge[: size + 1, size:], columns, mapping)
        errors += [power + np.sum(w * (judge[: size + 1, : size + 1] @ w - 2 * cross)) for w in (old, new)]
        energy += power
        parts.append(new.astype(np.float32))
    found = Solution(None, *(max(0.0, float(error) / max(energy, 1e-300)) for error in errors))
    if not np.isfinite(errors).all():
        found.why = "the solution is not finite"
    elif found.before <= EXACT:
        found.why = EXACTLY
    elif found.after >= found.before:
        found.why = f"on samples held out its error would rise from {found.before:.3g} to {found.after:.3g}"
    else:
        found.weights = np.hstack(parts)
    return found


@dataclass(frozen=True)
class Targets:
    """The map from [1, t] to targets: the weights and bias that made them, [1 + T, N], or t itself.

    weights: [T, N] and bias [N], of the parent; onto: what the child keeps of the N columns, positions or a basis
    [N, N'].
    """

    width: int
    weights: np.ndarray | None = None
    bias: np.ndarray | None = None
    onto: np.ndarray | None = None

    @staticmethod
    def of(width: int) -> "Targets":
        """Let t [T, N] itself be the target."""
        return Targets(width)

    def columns(self) -> Iterator[tuple[slice, np.ndarray | None]]:
        """Yield a few columns at a time, as (which, the map's [1 + T, n], or None for t itself)."""
        for start in range(0, self.width, COLUMNS):
            which = slice(start, min(start + COLUMNS, self.width))
            if self.weights is None:
                yield which, None
                continue
            whole = self.onto is None or self.onto.ndim == 2
            picked = (slice(None) if self.onto is not None else which) if whole else self.onto[which]
            both = np.vstack([self.bias[picked][None], self.weights[:, picked]]).astype(np.float64)
            yield which, both @ self.onto[:, which] if self.onto is not None and self.onto.ndim == 2 else both


def _image(block: np.ndarray, columns: slice, mapping: np.ndarray | None) -> np.ndarray:
    """Return columns of sums with [1, t] as those with the targets."""
    return block[:, 1:][:, columns] if mapping is None else block @ mapping


def _power(block: np.ndarray, columns: slice, mapping: np.ndarray | None) -> float:
    """Return the sum of the targets' squares."""
    if mapping is None:
        return float(np.trace(block[1:, 1:][columns, columns]))
    return float(np.sum(mapping * (block @ mapping)))


class _Factor:
    """A factored X'X + r I with the intercept eliminated: rows are centred, then its own row follows."""

    def __init__(self, gram: np.ndarray, ridge: float, intercept: bool):
        size = len(gram) - 1
        self.intercept = intercept
        self.rows = max(float(gram[-1, -1]), 1.0)
        self.mean = gram[-1, :-1] / self.rows
        strength = max(ridge * np.trace(gram[:-1, :-1]) / max(size, 1), 1e-12)
        matrix = gram[:-1, :-1] - (np.outer(self.mean, gram[-1, :-1]) if intercept else 0.0)
        matrix[np.diag_indices(size)] += strength
        try:
            self.factor = scipy.linalg.cho_factor(matrix, lower=True)
            reciprocal, _ = scipy.linalg.lapack.dpocon(self.factor[0], np.abs(matrix).sum(axis=0).max(), uplo="L")
            self.condition = 1 / reciprocal if reciprocal > 0 else np.inf
        except (scipy.linalg.LinAlgError, ValueError):
            self.condition = np.inf

    def step(self, residual: np.ndarray) -> np.ndarray:
        """Return what to add to the weights [K+1, N] for X'(Y - X W) [K+1, N]."""
        if not self.intercept:
            return np.vstack([scipy.linalg.cho_solve(self.factor, residual[:-1]), np.zeros((1, residual.shape[1]))])
        weights = scipy.linalg.cho_solve(self.factor, residual[:-1] - np.outer(self.mean, residual[-1]))
        return np.vstack([weights, residual[-1][None] / self.rows - self.mean @ weights])
