"""Importance: from statistics to scores, and from scores to the indices and blocks that stay."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphclone.errors import CutError, InputError

Seed = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the indices of one tap, arrays of shape [size].

    mean, mean_abs, mean_square: E[x], E|x|, E[x^2]. out_norm: the norm of the weights that read each index, where asked for.
    """

    mean: np.ndarray
    mean_abs: np.ndarray
    mean_square: np.ndarray
    out_norm: np.ndarray | None = None


Score = Callable[[Evidence], np.ndarray]
Place = Callable[[int, int, Seed], np.ndarray]

SCORES: dict[str, Score] = {}
PLACES: dict[str, Place] = {}


def metric(name: str) -> Callable[[Score], Score]:
    """Register a function of Evidence as a metric; the largest scores stay.

    Example:
        >>> @metric("peak_to_mean")
        ... def peak_to_mean(evidence: Evidence) -> np.ndarray:
        ...     return evidence.mean_square / evidence.mean_abs
        >>> _ = SCORES.pop("peak_to_mean")
    """

    def register(score: Score) -> Score:
        SCORES[name] = score
        return score

    return register


def place(name: str) -> Callable[[Place], Place]:
    """Register a function of (size, keep, seed) as a metric that looks at positions alone and needs no samples.

    Example:
        >>> @place("last")
        ... def last(size: int, keep: int, seed: Seed) -> np.ndarray:
        ...     return np.arange(size - keep, size)
        >>> _ = PLACES.pop("last")
    """

    def register(choose: Place) -> Place:
        PLACES[name] = choose
        return choose

    return register


@metric("mean_abs")
def mean_abs(evidence: Evidence) -> np.ndarray:
    """Return E|x|: weight subcloning (arXiv 2312.09299, section 4.1)."""
    return evidence.mean_abs


@metric("l2")
def l2(evidence: Evidence) -> np.ndarray:
    """Return sqrt(E[x^2])."""
    return np.sqrt(evidence.mean_square)


@metric("variance")
def variance(evidence: Evidence) -> np.ndarray:
    """Return E[x^2] - E[x]^2."""
    return np.maximum(evidence.mean_square - evidence.mean**2, 0.0)


@metric("output_aware")
def output_aware(evidence: Evidence) -> np.ndarray:
    """Return sqrt(E[x^2]) * ||W_out[:, index]||: how much each index writes into what comes next (arXiv 2608.02829)."""
    if evidence.out_norm is None:
        raise CutError("the metric 'output_aware' needs weights that read the dimension, and none do; write by=l2")
    return np.sqrt(evidence.mean_square) * evidence.out_norm


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
    return np.sort(np.random.default_rng(seed).permutation(size)[:keep])


def needs_samples(name: str) -> bool:
    """Tell whether a metric needs statistics. Raises: InputError for a name that nobody registered.

    Example:
        >>> needs_samples("mean_abs"), needs_samples("uniform")
        (True, False)
    """
    if name not in SCORES and name not in PLACES:
        raise InputError(_unknown("metric", name, (*SCORES, *PLACES)))
    return name in SCORES


def score(name: str, evidence: Evidence) -> np.ndarray:
    """Return the scores of one tap's indices, fp64 [size], by a metric that needs samples.

    Raises: InputError for an unknown name or scores that are not finite.
    """
    if not needs_samples(name):
        raise InputError(f"the metric '{name}' looks at positions and gives no scores; use select")
    scores = np.asarray(SCORES[name](evidence), np.float64)
    if scores.shape != evidence.mean_abs.shape or not np.isfinite(scores).all():
        raise InputError(f"the metric '{name}' must return one finite score for each of {evidence.mean_abs.size} indices")
    return scores


def select(name: str, scores: np.ndarray | int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return the indices that stay, ascending, int64 [keep].

    name: a metric; scores: what it gave, of shape [size]; or the size, where it looks at positions alone.
    Of equal scores the lower index stays.
    Raises: CutError where `keep` is below 1 or above the size; InputError for an unknown metric.

    Example:
        >>> select("mean_abs", np.array([0.1, 0.7, 0.7, 0.3, 0.7]), 2).tolist()
        [1, 2]
        >>> select("uniform", 6, 3).tolist()
        [0, 2, 4]
    """
    size = scores if isinstance(scores, int) else len(scores)
    _check_keep(keep, size)
    if not needs_samples(name):
        return np.asarray(PLACES[name](size, keep, seed), np.int64)
    if isinstance(scores, int):
        raise InputError(f"the metric '{name}' needs samples: give --data or --stats, or write first, uniform or random")
    return _highest(scores, keep)


def middle(size: int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return the first half and the last half of what stays: blocks leave the middle (arXiv 2312.09299, section 4.2).

    Example:
        >>> middle(7, 3).tolist()
        [0, 1, 6]
    """
    head = (keep + 1) // 2
    return np.concatenate([np.arange(head), np.arange(size - (keep - head), size)])


BLOCK_PLACES: Mapping[str, Place] = {"middle": middle, "first": first, "uniform": uniform, "random": random}
BLOCK_SCORES = ("relative_magnitude", "block_influence")


def block_needs_samples(name: str) -> bool:
    """Tell whether a rule for blocks needs statistics. Raises: InputError for an unknown one.

    Example:
        >>> block_needs_samples("middle"), block_needs_samples("block_influence")
        (False, True)
    """
    if name not in BLOCK_PLACES and name not in BLOCK_SCORES:
        raise InputError(_unknown("rule for blocks", name, (*BLOCK_PLACES, *BLOCK_SCORES)))
    return name in BLOCK_SCORES


def block_score(name: str, ratio: float, cosine: float) -> float:
    """Return how much a block matters.

    ratio: E[||f(x)|| / ||x + f(x)||] (arXiv 2312.09299, section 3); cosine: E[cos(x, x + f(x))] (arXiv 2403.03853).

    Example:
        >>> block_score("block_influence", ratio=0.5, cosine=0.75)
        0.25
    """
    if not block_needs_samples(name):
        raise InputError(f"the rule '{name}' looks at positions and gives no scores; use select_blocks")
    return ratio if name == "relative_magnitude" else 1.0 - cosine


def select_blocks(name: str, scores: Sequence[float] | int, keep: int, seed: Seed = 0) -> np.ndarray:
    """Return the blocks that stay, ascending, int64 [keep]; of equal scores the earlier block stays.

    name: a rule; scores: `block_score` of each block, or the number of blocks where the rule looks at positions alone.
    Raises: CutError where `keep` is below 1 or above the number of blocks; InputError for an unknown rule.

    Example:
        >>> select_blocks("relative_magnitude", [0.9, 0.1, 0.2, 0.4], 2).tolist()
        [0, 3]
        >>> select_blocks("middle", 4, 3).tolist()
        [0, 1, 3]
    """
    size = scores if isinstance(scores, int) else len(scores)
    _check_keep(keep, size)
    if not block_needs_samples(name):
        return np.asarray(BLOCK_PLACES[name](size, keep, seed), np.int64)
    if isinstance(scores, int):
        raise InputError(f"the rule '{name}' needs samples: give --data or --stats, or write middle, first or uniform")
    return _highest(np.asarray(scores, np.float64), keep)


def _highest(scores: np.ndarray, keep: int) -> np.ndarray:
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:keep]).astype(np.int64)


def _check_keep(keep: int, size: int) -> None:
    if not 1 <= keep <= size:
        raise CutError(f"cannot keep {keep} of {size}; give a number from 1 to {size}")


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"write one of {', '.join(known)}"
    return f"no {what} is called '{name}'; {hint}"
