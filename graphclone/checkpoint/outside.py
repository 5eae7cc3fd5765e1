"""Cut the tensors that the graph does not contain, by what their sizes mean elsewhere in the checkpoint."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find
from graphclone.checkpoint.matching import Match
from graphclone.cut import Cut
from graphclone.dtypes import is_float
from graphclone.errors import CutError
from graphclone.weights import Weight

RECOMPUTED = re.compile(r"inv_freq|rotary_emb")
"""Names of what a class computes from its config, whether or not a checkpoint holds it."""


Meanings = dict[bytes, np.ndarray | None]
"""What a size may mean: the indices that stay, by their bytes, and None where all do."""


class Outside:
    """Cut what the graph does not contain by what its sizes mean elsewhere in the checkpoint."""

    def __init__(self, analysis: Analysis, cut: Cut, matches: Mapping[str, Match]):
        self._of_cut = cut
        self._matches = matches
        self._anywhere = self._meanings(axis for each in matches.values() for p in each.parts for axis in p.use.axes)
        self._hidden = self._meanings(d.axes[0] for d in analysis.dimensions if d.role == "hidden")

    def cut(self, name: str, weight: Weight) -> Weight:
        """Return the tensor as it is, or cut along each axis. Raises: CutError where a size has several meanings."""
        if not is_float(weight.onnx_dtype) or RECOMPUTED.search(name) or _is_mask(weight):
            return weight
        shape = tuple(weight.shape)
        for axis, size in enumerate(shape):
            meanings = self._beside(name, shape, axis) or self._of(name, weight, size)
            if all(picks is None for picks in meanings.values()):
                continue
            if len(meanings) > 1:
                raise CutError(
                    f"'{name}' {list(weight.shape)} is not in the graph, and its axis {axis} of {size} could be cut in "
                    f"{len(meanings)} ways; export the model with it, or remove it from the checkpoint"
                )
            weight = weight.take(axis, next(iter(meanings.values())))
        return weight

    def _beside(self, name: str, shape: tuple[int, ...], axis: int) -> Meanings:
        """Return what an axis means in a tensor of the same module and shape, as `weight_integer` beside `weight`."""
        found: Meanings = {}
        module = f"{name.rpartition('.')[0]}."
        for other, match in self._matches.items():
            part = match.parts[0]
            axes = list(part.use.axes)
            if part.swapped:
                axes[-2:] = axes[:-3:-1]
            sizes = tuple(find(each).size[0] for each in axes)
            whole = len(match.parts) == 1 and part.rows is None and part.undo is None
            if whole and other.startswith(module) and "." not in other[len(module) :] and sizes == shape:
                found |= self._meanings([axes[axis]])[sizes[axis]]
        return found

    def _of(self, name: str, weight: Weight, size: int) -> Meanings:
        """A bias goes with the outputs of the weight beside it, what lies outside of blocks with the hidden size."""
        module, _, leaf = name.rpartition(".")
        beside = self._matches.get(f"{module}.weight")
        if leaf == "bias" and beside is not None and len(beside.parts) == 1 and len(weight.shape) == 1:
            meanings = self._meanings(beside.parts[0].use.axes).get(size, {})
            if len(meanings) == 1:
                return meanings
        if size in self._hidden and not re.search(r"\.\d+\.", name):
            return self._hidden[size]
        return self._anywhere.get(size, {})

    def _meanings(self, axes: Iterable[Axis]) -> dict[int, Meanings]:
        found: dict[int, Meanings] = {}
        for axis in axes:
            picks = self._of_cut.picks(axis)
            found.setdefault(find(axis).size[0], {})[b"" if picks is None else picks.tobytes()] = picks
        return found


def _is_mask(weight: Weight) -> bool:
    """Tell whether a tensor is a causal mask that old checkpoints carry: (1, 1, n, n)."""
    return len(weight.shape) == 4 and weight.shape[:2] == (1, 1) and weight.shape[2] == weight.shape[3]
