"""Recognise tensors that an exporter folded into others, and take them out of the child's again.

A normed weight g * v / |v| arrives as its product, a batch norm as the scale and the bias of the convolution before it,
a table of relative positions as what was gathered from it, a logarithm as its exponential. Each is found by value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphclone.axes.axis import find
from graphclone.axes.typed import Use
from graphclone.computed import computed
from graphclone.cut import Cut
from graphclone.folds import norm_axes, norm_pairs, normed, norms
from graphclone.weights import Weight

FEW = 64
"""Fibres of a gathered table that are compared."""
TOLERANCE = 1e-4
STATISTICS = ("running_mean", "running_var", "weight", "bias")


class Undo(Protocol):
    """How a tensor follows from the child's weight: `use` is the parent's of the initializer that holds it."""

    def undone(self, original: Weight, weight: Weight, use: Use, cut: Cut) -> Weight: ...


@dataclass(frozen=True)
class Sliced:
    """A tensor that the child's weight no longer tells, cut as axis `place` of the weight along its own `axis`."""

    axis: int
    place: int

    def undone(self, original: Weight, weight: Weight, use: Use, cut: Cut) -> Weight:
        picks = cut.picks(use.axes[self.place])
        return original if picks is None else original.take(self.axis, picks)


@dataclass(frozen=True)
class Aligned:
    """A tensor of which the weight is a function, entry by entry, cut along every axis as the weight is."""

    def undone(self, original: Weight, weight: Weight, use: Use, cut: Cut) -> Weight:
        places = (axis for axis in use.axes if find(axis).size[0] > 1)
        for axis, size in enumerate(original.shape):
            picks = cut.picks(next(places)) if size > 1 else None
            original = original if picks is None else original.take(axis, picks)
        return original


@dataclass(frozen=True)
class Length:
    """The norms of a weight over all but `axes`."""

    axes: tuple[int, ...]

    def undone(self, original: Weight, weight: Weight, use: Use, cut: Cut) -> Weight:
        others = tuple(axis for axis in range(len(weight.shape)) if axis not in self.axes)
        shape = tuple(size if axis in self.axes else 1 for axis, size in enumerate(weight.shape))
        return computed(shape, original.dtype, lambda: norms(weight.load(), others).astype(original.dtype))


@dataclass(frozen=True, eq=False)
class Unscaled:
    """A weight whose first axis the exporter multiplied by `factor`, and to which it added `offset`."""

    factor: np.ndarray
    offset: np.ndarray

    def undone(self, original: Weight, weight: Weight, use: Use, cut: Cut) -> Weight:
        picks = cut.picks(use.axes[0])
        factor, offset = (self.factor, self.offset) if picks is None else (self.factor[picks], self.offset[picks])
        column = (-1, *(1,) * (len(original.shape) - 1))

        def make() -> np.ndarray:
            values = weight.load().astype(np.float64).reshape(len(factor), *weight.shape[1:])
            return ((values - offset.reshape(column)) / factor.reshape(column)).astype(original.dtype)

        return computed(weight.shape, original.dtype, make)


Found = tuple[str, str, Undo | None]
"""A tensor, the initializer that it is folded into, and the way back (None: it is the initializer)."""


def find_folded(
    tensors: Mapping[str, Weight], missing: Sequence[str], stored: Mapping[str, Weight], free: Sequence[str]
) -> Iterator[Found]:
    """Yield what `missing` tensors have become in the `free` initializers.

    Example:
        list(find_folded(checkpoint.tensors, ["conv.weight_g", "conv.weight_v"], {"w": weight}, ["w"]))
    """
    missing, free = set(missing), list(free)
    for finder in (_lengths, _batch_norms, _gathered, _mapped):
        for tensor, name, undo in list(finder(tensors, missing, stored, free)):
            missing.discard(tensor)
            yield tensor, name, undo


def _lengths(tensors, missing, stored, free) -> Iterator[Found]:
    """Find g * v / |v|, the norm over all axes along which g has one entry."""
    for direction, length in norm_pairs(missing):
        v, g = (np.asarray(tensors[each].load(), np.float64) for each in (direction, length))
        if g.ndim != v.ndim:
            continue
        whole, over = normed(v, g), norm_axes(v, g)
        for place in free:
            if stored[place].shape == whole.shape and _close(stored[place].load(), whole):
                yield direction, place, None
                yield length, place, Length(tuple(axis for axis in range(v.ndim) if axis not in over))
                break


def _batch_norms(tensors, missing, stored, free) -> Iterator[Found]:
    """Find a weight times a factor per output, and the batch norm whose factor it is."""
    stems = sorted(name.removesuffix("running_var") for name in missing if name.endswith("running_var"))
    stems = [stem for stem in stems if all(stem + leaf in tensors for leaf in STATISTICS)]
    for stem in stems:
        mean, variance, gamma, beta = (np.asarray(tensors[stem + leaf].load(), np.float64) for leaf in STATISTICS)
        for name in sorted(missing):
            for place in free:
                factor = _factor(tensors[name], stored[place]) if tensors[name].shape[:1] == gamma.shape else None
                if factor is None or not _is_norm(factor, gamma, variance):
                    continue
                bias = name.removesuffix("weight") + "bias"
                added = np.asarray(tensors[bias].load(), np.float64) if bias in tensors else np.zeros_like(mean)
                moved = (added - mean) * factor
                if stem + "bias" in missing:  # else it is found as it is: nothing was added to it
                    shifts = [n for n in free if stored[n].shape == beta.shape]
                    shift = next((n for n in shifts if _close(stored[n].load(), beta + moved)), None)
                    if shift is None:
                        continue
                    yield stem + "bias", shift, Unscaled(np.ones_like(factor), moved)
                yield name, place, Unscaled(factor, np.zeros_like(factor))
                for leaf in ("running_mean", "running_var", "weight"):
                    yield stem + leaf, place, Sliced(0, 0)
                if bias in missing:
                    yield bias, place, Sliced(0, 0)


def _is_norm(factor: np.ndarray, gamma: np.ndarray, variance: np.ndarray) -> bool:
    """Tell whether a factor is gamma / sqrt(variance + epsilon) for one small epsilon."""
    with np.errstate(all="ignore"):
        epsilon = np.square(gamma / factor) - variance
    return bool(np.all(np.isfinite(epsilon)) and np.all(np.abs(epsilon) <= 2e-3 + 1e-3 * variance))


def _factor(tensor: Weight, weight: Weight) -> np.ndarray | None:
    """Return by what each entry of the first axis was multiplied, or None where it was not."""
    if tensor.shape != weight.shape or len(tensor.shape) < 2:
        return None
    before, after = (np.asarray(each.load(), np.float64).reshape(each.shape[0], -1) for each in (tensor, weight))
    square = np.sum(before * before, axis=1)
    if not np.all(square):
        return None
    factor = np.sum(before * after, axis=1) / square
    return factor if np.all(factor) and _close(before * factor[:, None], after) else None


def _gathered(tensors, missing, stored, free) -> Iterator[Found]:
    """Find initializers made of a table's rows."""
    for name in sorted(missing):
        if len(tensors[name].shape) != 2 or min(tensors[name].shape) < 2:
            continue
        table = np.asarray(tensors[name].load(), np.float32)
        for place in free:
            if len(stored[place].shape) >= 3 and (found := _fibres(table, stored[place])) is not None:
                yield name, place, Sliced(*found)
                break


def _mapped(tensors, missing, stored, free) -> Iterator[Found]:
    """Find initializers that are a monotone function of a tensor, as -exp(x) is."""
    for name in sorted(missing):
        shape = [size for size in tensors[name].shape if size > 1]
        alike = [n for n in free if [size for size in stored[n].shape if size > 1] == shape]
        if tensors[name].size < FEW or not alike:
            continue
        order = np.argsort(np.asarray(tensors[name].load(), np.float32), axis=None)
        for place in alike:
            steps = np.diff(np.asarray(stored[place].load(), np.float64).reshape(-1)[order])
            if np.any(steps) and (np.all(steps >= 0) or np.all(steps <= 0)):
                yield name, place, Aligned()
                break


def _fibres(table: np.ndarray, weight: Weight) -> tuple[int, int] | None:
    """Return the axis of the table, and the axis of a weight along which each fibre is a row across it."""
    for axis in (1, 0):
        rows = {row.tobytes() for row in np.ascontiguousarray(table if axis else table.T) + np.float32(0)}
        if len(rows) < 2:
            continue
        for place, size in enumerate(weight.shape):
            if size != table.shape[axis] or weight.size < FEW:
                continue
            lines = np.moveaxis(np.asarray(weight.load(), np.float32), place, -1).reshape(-1, size)
            if all((line + np.float32(0)).tobytes() in rows for line in lines[:: max(1, len(lines) // FEW)]):
                return axis, place
    return None


def _close(given: np.ndarray, wanted: np.ndarray) -> bool:
    given = np.asarray(given, np.float64)
    return bool(np.abs(given - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1e-12))
