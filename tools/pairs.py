"""Time two things in alternating pairs, so that what else the machine does falls on both."""

import time
from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000


def compare(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of both, in alternating pairs; which of a pair goes first alternates as well.

    Two more pairs come before and are not counted.
    """
    times = np.zeros((pairs, 2))
    for pair in range(-2, pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            times[max(pair, 0), which] = time.perf_counter() - start
    return times[:, 0], times[:, 1]


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median.

    Example:
        >>> interval(np.ones(20))
        (1.0, 1.0)
    """
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)
