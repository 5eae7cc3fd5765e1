"""Importance: from statistics to scores, and from scores to the indices and blocks that stay."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Tap
from graphclone.errors import CutError, InputError

Seed = int | Sequence[int]
Score = Callable[[Statistics, Tap | str], np.ndarray]
Place = Callable[[int, int, Seed], np.ndarray]


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to choose what stays: by scores of what was measured, or by positions alone.

    score: (statistics, tap) -> scores of shape [size], the largest stay. place: (size, keep, seed) -> indices.
    """

    name: str
    score: Score | None = None
    place: Place | None = None

    @property
    def measured(self) -> bool:
        """Whether it needs samples."""
        return self.score is not None

    def __call__(self, statistics: Statistics, tap: Tap | str) -> np.ndarray:
        """Return the scores of one tap, fp64 [size]. Raises: InputError where there are none, or one is not finite."""
        if self.score is None:
            raise InputError(f"the metric '{self.name}' looks at positions and gives no scores")
        scores = np.asarray(self.score(statistics, tap), np.float64)
        if not np.isfinite(scores).all():
            raise InputError(f"the metric '{self.name}' gives scores that are not finite; calibrate again")
        return scores


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Scores that decided what stays, for whoever asks why.

    name: of the dimension, or of a stack's blocks as `encoder.blocks`. metric: as `mean_abs`. scores: of shape [size].
    kept: the indices that stay.
    """

    name: str
    metric: str
    scores: np.ndarray
    kept: np.ndarray


METRICS: dict[str, Metric] = {}


def metric(name: str) -> Callable[[Score], Score]:
    """Register a function of (statistics, tap) as a metric.

    Example:
        >>> @metric("offset")
        ... def offset(statistics: Statistics, tap: Tap) -> np.ndarray:
        ...     return abs(statistics.mean(tap))
        >>> METRICS.pop("offset").measured
        True
    """

    def register(score: Score) -> Score:
        METRICS[name] = Metric(name, score=score)
        return score

    return register


def place(name: str) -> Callable[[Place], Place]:
    """Register a function of (size, keep, seed) as a metric that looks at positions alone and needs no samples.

    Example:
        >>> @place("last")
        ... def last(size: int, keep: int, seed: Seed) -> np.ndarray:
        ...     return np.arange(size - keep, size)
        >>> METRICS.pop("last").measured
        False
    """

    def register(choose: Place) -> Place:
        METRICS[name] = Metric(name, place=choose)
        return choose

    return register


@metric("mean_abs")
def mean_abs(statistics: Statistics, tap: Tap | str) -> np.ndarray:
    """Return E|x|: weight subcloning (arXiv 2312.09299, section 4.1)."""
    return statistics.mean_abs(tap)


@metric("l2")
def l2(statistics: Statistics, tap: Tap | str) -> np.ndarray:
    """Return sqrt(E[x^2])."""
    return np.sqrt(statistics.mean_square(tap))


@metric("variance")
def variance(statistics: Statistics, tap: Tap | str) -> np.ndarray:
    """Return E[x^2] - E[x]^2."""
    return statistics.variance(tap)


@metric("output_aware")
def output_aware(statistics: Statistics, tap: Tap | str, weight: np.ndarray | None = None) -> np.ndarray:
    """Return sqrt(E[x^2]) * ||W_out[:, index]||: how much each index writes into what comes next (arXiv 2608.02829).

    weight: the matrix that reads the tap, of shape [outputs, size]; without one every norm is 1.
    """
    energy = np.sqrt(statistics.mean_square(tap))
    return energy if weight is None else energy * np.linalg.norm(np.asarray(weight, np.float64), axis=0)


@metric("obs")
def obs(statistics: Statistics, tap: Tap | str) -> np.ndarray:
    """Return sqrt(E[x^2]): what `obs` ranks by where no matrix reads the dimension; `passes/obs.py` has the rest."""
    return np.sqrt(statistics.mean_square(tap))


@place("first")
def first(size: int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return the first indices."""
    return np.arange(keep)


@place("uniform")
def uniform(size: int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return evenly spaced indices: Weight Selection (arXiv 2311.18823).

    Example:
        >>> uniform(8, 4).tolist(), uniform(8, 3).tolist()
        ([0, 2, 4, 6], [0, 4, 7])
    """
    if size % keep == 0:
        return np.arange(0, size, size // keep)
    return np.round(np.linspace(0, size - 1, keep)).astype(np.int64)


@place("random")
def random(size: int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return random indices; one seed gives the same ones."""
    return np.random.default_rng(seed).permutation(size)[:keep]


def middle(size: int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return the first half and the last half of what stays: blocks leave the middle (arXiv 2312.09299, section 4.2).

    Example:
        >>> middle(7, 3).tolist()
        [0, 1, 6]
    """
    head = (keep + 1) // 2
    return np.concatenate([np.arange(head), np.arange(size - (keep - head), size)])


def relative_magnitude(statistics: Statistics, span: str) -> float:
    """Return E[||f(x)|| / ||x + f(x)||] of a block (arXiv 2312.09299, section 3)."""
    return statistics.ratio(span)


def block_influence(statistics: Statistics, span: str) -> float:
    """Return 1 - E[cos(x, x + f(x))] of a block (ShortGPT, arXiv 2403.03853)."""
    return 1.0 - statistics.cosine(span)


BLOCK_RULES: Mapping[str, Metric] = {
    rule.name: rule
    for rule in (
        Metric("middle", place=middle),
        Metric("relative_magnitude", score=relative_magnitude),
        Metric("block_influence", score=block_influence),
        Metric("uniform", place=uniform),
        Metric("first", place=first),
    )
}


def select(name: str, size: int, keep: int, *, scores: np.ndarray | None = None, seed: Seed = 0) -> np.ndarray:
    """Return the indices that stay by a metric, ascending, int64 [keep]; of equal scores the lower index stays.

    scores: of shape [size], from a metric that is measured.
    Raises: CutError where `keep` is below 1 or above the size; InputError for an unknown metric or missing scores.

    Example:
        >>> select("mean_abs", 5, 2, scores=np.array([0.1, 0.7, 0.7, 0.3, 0.7])).tolist()
        [1, 2]
        >>> select("uniform", 6, 3).tolist()
        [0, 2, 4]
    """
    return _select(_named(METRICS, name, "importance metric"), size, keep, scores, seed)


def choose_blocks(
    name: str, total: int, keep: int, scores: Sequence[float] | None = None, seed: Seed = 0
) -> tuple[int, ...]:
    """Return the blocks that stay by a rule, ascending; of equal scores the earlier block stays.

    scores: of each block, from a rule that is measured.
    Raises: CutError where `keep` is below 1 or above `total`; InputError for an unknown rule or missing scores.

    Example:
        >>> choose_blocks("relative_magnitude", 4, 2, [0.9, 0.1, 0.2, 0.4])
        (0, 3)
        >>> choose_blocks("middle", 4, 3)
        (0, 1, 3)
    """
    return tuple(_select(_named(BLOCK_RULES, name, "rule for blocks"), total, keep, scores, seed).tolist())


def _select(rule: Metric, size: int, keep: int, scores: Sequence[float] | np.ndarray | None, seed: Seed) -> np.ndarray:
    if not 1 <= keep <= size:
        raise CutError(f"cannot keep {keep} of {size}; give a number from 1 to {size}")
    if rule.place is not None:
        return np.sort(np.asarray(rule.place(size, keep, seed), np.int64))
    if scores is None:
        raise InputError(
            f"'{rule.name}' is measured on samples; give --data or --stats, or choose by position (uniform)"
        )
    scores = np.asarray(scores, np.float64)
    if scores.shape != (size,) or not np.isfinite(scores).all():
        raise InputError(f"'{rule.name}' needs one finite score for each of {size}, and got shape {list(scores.shape)}")
    return np.sort(np.argsort(-scores, kind="stable")[:keep]).astype(np.int64)


def _named(rules: Mapping[str, Metric], name: str, what: str) -> Metric:
    if name in rules:
        return rules[name]
    close = difflib.get_close_matches(name, rules, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(rules)}"
    raise InputError(f"no {what} is called '{name}'; {hint}")
