"""Fit the operator that gives logits to what they are for: the parent's probabilities.

The mean Kullback-Leibler divergence from the parent's probabilities p to the child's q = softmax(x W) is convex in W.
Its second derivative is at most half of X'X in each column (Böhning, "Multinomial logistic regression algorithm",
1992). With that bound in its place a Newton step is a least-squares fit of the probabilities' error from a matrix
factored once,

    W <- W + 2 (X'X / n + r I)^-1 X'(p - q) / n,

and never overshoots; momentum (Nesterov, 1983) makes it quick. Nothing is differentiated through the model, and only
X'(p - q), as large as W, leaves the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
import scipy.linalg

from graphclone.segments import FLOAT, Joint, run

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
STEPS = 12
PRODUCTS, LOGITS = 5e10, 2**26
"""RIDGES: towards the weights there are, as a fraction of the mean eigenvalue; each starts where the last one ended,
and the rows held out choose. STEPS: of each. PRODUCTS: of one step, LOGITS: of one batch; where there are more, every
k-th row counts."""


@dataclass(frozen=True)
class Fit:
    """weights: [K+1, N], or None where the weights there are do best. before, after: the divergence in nats per row."""

    weights: np.ndarray | None
    before: float
    after: float


def fit(probabilities: "Probabilities", gram: np.ndarray, weights: np.ndarray, intercept: bool) -> Fit:
    """Return the weights, last row the intercept, with the least divergence on the rows held out.

    gram: the sum of [x, 1]'[x, 1], [K+1, K+1]. intercept: whether the last row may move.

    Example:
        fit(Probabilities(joint, x, t, (48, 65), held, rows), moments.train, weights, intercept=False)
    """
    second = gram / gram[-1, -1]
    mean = np.trace(second[:-1, :-1]) / (len(second) - 1)
    before = best = probabilities.divergence(weights, held=True)[0]
    found = now = weights.astype(np.float64)
    for ridge in RIDGES:
        now = _climb(probabilities, second, now, weights, ridge * mean, intercept)
        after = probabilities.divergence(now, held=True)[0]
        if not after < best:
            break
        found, best = now, after
    return Fit(found.astype(np.float32) if best < before else None, before, best)


def _climb(
    probabilities: "Probabilities",
    second: np.ndarray,
    now: np.ndarray,
    anchor: np.ndarray,
    ridge: float,
    intercept: bool,
) -> np.ndarray:
    """Take the steps of one ridge."""
    used = slice(None) if intercept else slice(-1)
    pull = np.full((len(second), 1), ridge)
    pull[-1] = 0.0 if intercept else ridge
    factor = scipy.linalg.cho_factor((second + np.diag(pull[:, 0] + 1e-12))[used, used])
    ahead, momentum = now, 1.0
    for _ in range(STEPS):
        slope = probabilities.divergence(ahead, held=False)[1] - pull / 2 * (ahead - anchor)
        after = ahead.copy()
        after[used] += 2 * scipy.linalg.cho_solve(factor, slope[used])
        faster = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = after + (momentum - 1) / faster * (after - now)
        now, momentum = after, faster
    return now


@dataclass
class Probabilities:
    """A session that compares the child's probabilities with the parent's.

    joint: holds x [T, K], what the child's operator reads, and t [T, N], the parent's logits. size: (K, N). held: for
    each batch, whether it is for judging; where none is, all are. rows: of all batches. mask: the input that marks real
    tokens.
    """

    joint: Joint
    x: gs.Tensor
    t: gs.Tensor
    size: tuple[int, int]
    held: Sequence[bool]
    rows: int
    mask: str | None = None
    _session: object = field(init=False)

    def __post_init__(self) -> None:
        joint, (inputs, outputs) = self.joint, self.size
        weights = joint.given("weights", np.float32, [inputs + 1, outputs])
        ones = joint.ones(self.x)
        counted = joint.op("Cast", joint.mask(self.mask), to=FLOAT) if self.mask else ones
        x, t, counted = (self._thinned(rows) for rows in (joint.op("Concat", self.x, ones, axis=1), self.t, counted))
        taught = joint.op("LogSoftmax", t, axis=-1)
        told = joint.op("LogSoftmax", joint.op("MatMul", x, weights), axis=-1)
        p, q = joint.op("Exp", taught), joint.op("Exp", told)
        apart = joint.op("Mul", p, joint.op("Sub", taught, told))
        joint.give("divergence", joint.op("ReduceSum", joint.op("Mul", apart, counted), keepdims=0))
        joint.give("rows", joint.op("ReduceSum", counted, keepdims=0))
        error = joint.op("Mul", joint.op("Sub", p, q), counted)
        joint.give("slope", joint.op("MatMul", joint.op("Transpose", x, perm=[1, 0]), error))
        self._session = joint.open()

    def _thinned(self, rows: gs.Tensor) -> gs.Tensor:
        """Return every k-th row, so that a step's work and a batch's memory stay bounded."""
        inputs, outputs = self.size
        step = max(self.rows * inputs * outputs / PRODUCTS, self.rows / len(self.held) * outputs / LOGITS)
        if step <= 1:
            return rows
        bounds = (0, np.iinfo(np.int64).max, 0, math.ceil(step))
        return self.joint.op("Slice", rows, *(self.joint.constant([bound]) for bound in bounds))

    def divergence(self, weights: np.ndarray, held: bool) -> tuple[float, np.ndarray]:
        """Return the mean of KL(p || q) in nats, and X'(p - q) / n, [K+1, N]."""
        total: list[np.ndarray] = []
        feed = weights.astype(np.float32)
        for batch, mine in zip(self.joint.batches(), self.held, strict=True):
            if mine == held or not any(self.held):
                sums = [each.astype(np.float64) for each in run(self._session, {**batch, "weights": feed})]
                total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        apart, rows, slope = total
        return float(apart / max(rows, 1.0)), slope / max(rows, 1.0)
