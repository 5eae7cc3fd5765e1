"""Bring the child's weights back into the form of the checkpoint: untransposed, unfused, without the added one."""

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import find
from graphclone.axes.typed import AxisTyping, Use
from graphclone.checkpoint.matching import Match, Part
from graphclone.computed import computed
from graphclone.cut import Cut
from graphclone.weights import Weight, weight_of


class Carrier:
    """The child's weights by the parent's uses. nodes: {id of the parent's node: the child's}."""

    def __init__(self, typing: AxisTyping, cut: Cut, nodes: Mapping[int, gs.Node]):
        self.typing = typing
        self.cut = cut
        self.nodes = nodes

    def carried(self, match: Match, original: Weight) -> tuple[Weight | None, int | None, int | None]:
        """Return the child's tensor (None where it has none), and an expert's old and new number if it is one."""
        pieces: list[np.ndarray | Weight] = []
        expert = position = None
        for part in match.parts:
            alive = self._alive(part)
            if alive is None:
                return None, None, None
            part, use, weight = alive
            if part.undo is not None:
                pieces.append(part.undo.undone(original, weight, use, self.cut))
                continue
            if part.rows is None:
                pieces.append(self._whole(part, use, weight, original, alone=len(match.parts) == 1))
                continue
            slab, expert, position = self._slab(part, use, weight)
            if slab is None:
                return None, expert, None
            pieces.append(slab)
        if len(pieces) == 1:
            return _typed(pieces[0], original), expert, position
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        make = lambda: np.concatenate([piece.load() for piece in pieces])  # noqa: E731
        return _typed(computed(shape, pieces[0].dtype, make), original), None, None

    def _alive(self, whole: Part) -> tuple[Part, Use, Weight] | None:
        """Return a use of the part's initializer, or of a twin, that is in the child: the matched one if it is."""
        for part in (whole, *whole.twins):
            others = (u for u in self.typing.uses[part.name] if u.node is not None and u is not part.use)
            for use in (part.use, *others):
                node = self.nodes.get(id(use.node))
                if node is not None and use.slot < len(node.inputs) and isinstance(node.inputs[use.slot], gs.Constant):
                    return part, use, weight_of(node.inputs[use.slot])
        return None

    def _whole(self, part: Part, use: Use, weight: Weight, original: Weight, alone: bool) -> Weight:
        order = [axis for axis, each in enumerate(use.axes) if find(each).size[0] > 1]
        sizes = [weight.shape[axis] for axis in (reversed(order) if part.swapped else order)]
        if alone:
            left = iter(sizes)
            shape = tuple(next(left) if size > 1 else 1 for size in original.shape)
        else:
            shape = tuple(sizes)
        if not part.swapped and not part.plus and shape == weight.shape:
            return weight

        def make() -> np.ndarray:
            values = weight.load()
            values = values.reshape([values.shape[axis] for axis in order])
            values = values.T if part.swapped else values
            if part.plus:
                values = (values.astype(np.float64) - part.plus).astype(values.dtype)
            return values.reshape(shape)

        return computed(shape, weight.dtype, make)

    def _slab(self, part: Part, use: Use, weight: Weight) -> tuple[Weight | None, int | None, int | None]:
        """Take the rows of a part out of the child's weight, where its leading axes and rows were cut."""
        axes = list(use.axes)
        if part.swapped:
            axes[-1], axes[-2] = axes[-2], axes[-1]
        width = len(axes) > 1
        sizes = [find(axis).size[0] for axis in axes]
        lead, rows = (sizes[:-2], sizes[-2]) if width else ([], sizes[0])
        first, start = divmod(part.rows[0], rows)
        count = part.rows[1] - part.rows[0]
        places, expert, position = [], None, None
        for axis, index in zip(axes, np.unravel_index(first, lead) if lead else (), strict=False):
            picks = self.cut.picks(axis)
            kept = np.arange(find(axis).size[0]) if picks is None else picks
            there = np.flatnonzero(kept == index)
            if not len(there):
                return None, int(index), None
            expert, position = int(index), int(there[0])
            places.append(position)
        picks = self.cut.picks(axes[-2] if width else axes[0])
        kept = np.arange(rows) if picks is None else picks
        inside = np.flatnonzero((kept >= start) & (kept < start + count))
        shape = (len(inside), *([weight.shape[-2] if part.swapped else weight.shape[-1]] if width else []))

        def make() -> np.ndarray:
            taken = weight
            for axis, place in enumerate(places):
                taken = taken.take(axis, [place])
            if not width:
                return taken.take(0, inside).load()
            taken = taken.take(len(taken.shape) - (1 if part.swapped else 2), inside)
            values = taken.load().reshape(taken.shape[-2:])
            return values.T if part.swapped else values

        return computed(shape, weight.dtype, make), expert, position


def _typed(weight: Weight, original: Weight) -> Weight:
    """Return a weight in the type of the checkpoint."""
    if weight.onnx_dtype == original.onnx_dtype:
        return weight
    return computed(weight.shape, original.dtype, lambda: weight.load().astype(original.dtype))
