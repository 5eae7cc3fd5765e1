"""Cut: which indices of each axis stay, and what that makes of the axes they are parts of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from graphclone.axes.axis import Axis, find
from graphclone.axes.typed import AxisTyping
from graphclone.blocks import Half
from graphclone.dimensions import Dimension
from graphclone.errors import CutError


@dataclass(frozen=True)
class Cut:
    """A plan resolved against a model: kept indices per atom, kept blocks per stack, dropped half blocks."""

    indices: Mapping[int, np.ndarray]  # id of the atom -> kept indices
    atoms: tuple[Axis, ...]  # keeps the ids above alive
    blocks: Mapping[str, tuple[int, ...]]  # stack prefix -> kept blocks
    dropped: tuple[Half, ...]
    shrunk: frozenset[int] = frozenset()  # ids of atoms of generated fills that become one

    def picks(self, axis: Axis) -> np.ndarray | None:
        """Return the kept positions along an axis, or None where all stay in place."""
        axis = find(axis)
        if axis.kind == "atom":
            return self.indices.get(id(axis))
        parts = [self.picks(part) for part in axis.parts]
        if all(part is None for part in parts):
            return None
        whole = [np.arange(find(p).size[0]) if k is None else k for p, k in zip(axis.parts, parts, strict=True)]
        if axis.kind == "sum":
            offsets = np.cumsum([0] + [find(p).size[0] for p in axis.parts])
            return np.concatenate([k + o for k, o in zip(whole, offsets, strict=False)])
        result = whole[0]
        for part, kept in zip(axis.parts[1:], whole[1:], strict=True):
            result = (result[:, None] * find(part).size[0] + kept[None, :]).reshape(-1)
        return result

    def size(self, axis: Axis) -> tuple[int, ...]:
        """Return the size of an axis after the cut, per probe."""
        axis = find(axis)
        if axis.kind == "atom":
            if id(axis) in self.shrunk:
                return (1,) * len(axis.size)
            kept = self.indices.get(id(axis))
            return axis.size if kept is None else (len(kept),) * len(axis.size)
        sizes = [self.size(part) for part in axis.parts]
        columns = zip(*sizes, strict=True)
        return tuple(sum(c) if axis.kind == "sum" else int(np.prod(c)) for c in columns)


def with_fills(cut: Cut, typing: AxisTyping) -> Cut:
    """Return a cut that also shrinks the axes of generated fills to one where what they broadcast against is cut."""
    shrunk = frozenset(id(find(fill)) for fill, real in typing.fills if cut.size(real) != find(real).size)
    return replace(cut, shrunk=shrunk) if shrunk else cut


def project(axis: Axis, kept: np.ndarray, dimension: Dimension, name: str) -> list[tuple[Axis, np.ndarray]]:
    """Translate positions along an axis to indices of its atoms. Raises CutError where its structure forbids them."""
    axis = find(axis)
    if axis.kind == "atom":
        return [(axis, kept)]
    found: list[tuple[Axis, np.ndarray]] = []
    if axis.kind == "sum":
        offset, taken = 0, 0
        for part in axis.parts:
            size = find(part).size[0]
            inside = kept[(kept >= offset) & (kept < offset + size)]
            if not np.array_equal(kept[taken : taken + len(inside)], inside):
                raise CutError(_pairs(dimension, name))
            if not len(inside):
                raise CutError(f"'{name}' drops a whole part of {dimension.size}; keep some of each part")
            found += project(part, inside - offset, dimension, name) if size > 1 else []
            offset, taken = offset + size, taken + len(inside)
    else:
        sizes = [find(part).size[0] for part in axis.parts]
        coordinates = np.unravel_index(kept, sizes)
        parts = [column[np.sort(np.unique(column, return_index=True)[1])] for column in coordinates]
        outer = np.ravel_multi_index(np.meshgrid(*parts, indexing="ij"), sizes).reshape(-1)
        if not np.array_equal(outer, kept):
            raise CutError(f"'{name}' must keep the same entries of every group of {sizes}, in the groups' order")
        for part, picks in zip(axis.parts, parts, strict=True):
            found += project(part, picks, dimension, name)
    merged: dict[int, tuple[Axis, np.ndarray]] = {}
    for leaf, picks in found:
        if id(leaf) in merged and not np.array_equal(merged[id(leaf)][1], picks):
            raise CutError(_pairs(dimension, name))
        merged[id(leaf)] = (leaf, picks)
    return list(merged.values())


def _pairs(dimension: Dimension, name: str) -> str:
    half = dimension.size // 2
    return (
        f"'{name}' must keep both members of each pair, in pair order: the graph rotates entry i with entry i + {half} "
        f"(write the kept i below {half} first, then each i + {half})"
    )
