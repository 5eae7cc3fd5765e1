"""Folds: what exporters compute from a checkpoint's tensors before they store it."""

from collections.abc import Collection, Iterator

import numpy as np

NORMED = (("original1", "original0"), ("weight_v", "weight_g"), ("v", "g"))
"""Leaves of a direction and its length: torch's parametrization, its older hook, and others."""


def norm_pairs(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of a direction v and of its length g.

    Example:
        >>> list(norm_pairs(["conv.weight_g", "conv.weight_v", "bias"]))
        [('conv.weight_v', 'conv.weight_g')]
    """
    for direction, length in NORMED:
        for name in sorted(names):
            stem, dot, leaf = name.rpartition(".")
            if leaf == direction and f"{stem}{dot}{length}" in names:
                yield name, f"{stem}{dot}{length}"


def norm_axes(v: np.ndarray, g: np.ndarray) -> tuple[int, ...]:
    """Return the axes over which v is normed: those along which g, of equal rank, has one entry and v several."""
    return tuple(axis for axis, size in enumerate(g.shape) if size == 1 and v.shape[axis] != 1)


def norms(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the lengths of the values over some axes, which keep one entry."""
    return np.sqrt(np.sum(np.square(values, dtype=np.float64), axis=axes, keepdims=True))


def normed(v: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return g * v / |v|."""
    return g.astype(np.float64) * v / norms(v, norm_axes(v, g))
