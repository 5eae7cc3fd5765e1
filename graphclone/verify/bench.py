"""The bench every oracle works on: one model, its perturbed copy, its feeds and what the copy makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find, free_leaves, is_fill, is_static, leaves
from graphclone.axes.contractions import is_weight
from graphclone.axes.typed import Use
from graphclone.cut import Cut, with_fills
from graphclone.model import Model
from graphclone.surgery import carry_out
from graphclone.verify.inputs import Feeds
from graphclone.verify.rounding import rounds, unrounded
from graphclone.verify.running import Outputs, run
from graphclone.verify.weights import perturbed

LARGE_BYTES = 1 << 30  # of weights in fp32; an oracle holds up to three versions of them
JUDGED_BLOCKS = 4


@dataclass(frozen=True)
class Bench:
    """model: as it is. analysis: of it. copy: the same with perturbed weights in fp32. probes: feeds of the copy.
    blocks: what is judged, per stack; the first few of a model too large to hold in several versions.
    outputs: what these blocks of the copy make of each probe."""

    model: Model
    analysis: Analysis
    copy: Model
    probes: tuple[Feeds, ...]
    blocks: Mapping[str, tuple[int, ...]]
    outputs: tuple[Outputs, ...] = ()

    @staticmethod
    def of(model: Model, analysis: Analysis, probes: Sequence[Feeds], seed: int = 0) -> "Bench":
        """Perturb a model and run the copy on the probes."""
        copy = perturbed(model, seed)
        dtypes = {tensor.name: tensor.dtype for tensor in copy.inputs}
        fitted = tuple(
            {name: array.astype(dtypes[name], copy=False) for name, array in feeds.items()} for feeds in probes
        )
        large = 4 * sum(weight.size for weight in model.weights.values()) > LARGE_BYTES
        bench = Bench(model, analysis, copy, fitted, _blocks(analysis, JUDGED_BLOCKS if large else None))
        return replace(bench, outputs=tuple(bench.run(bench.whole(copy), fitted)))

    def run(self, model: Model, probes: Sequence[Feeds]) -> list[Outputs]:
        """Return a model's outputs, its activations not rounded: what is the same in theory is then the same."""
        return run(unrounded(model), probes)

    @property
    def notes(self) -> str:
        """What a reader should know of how this model is judged."""
        found = ["" if self.is_whole else " in the first blocks, because the model is large"]
        return "".join([*found, ", activations not rounded" if rounds(self.copy) else ""])

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are judged."""
        return self.blocks == _blocks(self.analysis)

    def whole(self, copy: Model) -> Model:
        """Return the judged blocks of a copy of the model, otherwise uncut."""
        return copy if self.is_whole else carry_out(self.cut({}), self.model, self.analysis, onto=copy)

    def child(self, cut: Cut) -> Model:
        """Return the cut carried out on the perturbed copy."""
        return carry_out(cut, self.model, self.analysis, onto=self.copy)

    def cut(self, indices: Mapping[Axis, np.ndarray]) -> Cut:
        """Return a cut that keeps the judged blocks and, of the given atoms, these indices."""
        cut = Cut({id(atom): kept for atom, kept in indices.items()}, tuple(indices), self.blocks, ())
        return with_fills(cut, self.analysis.typing)

    def feeds(self, cut: Cut, feeds: Feeds) -> tuple[Feeds, Feeds]:
        """Return what parent and child are fed so that both mean the same: ids of kept rows, cut float inputs."""
        parent, child = dict(feeds), dict(feeds)
        typing = self.analysis.typing
        for name, axis in typing.index_axes.items():
            kept = cut.picks(axis)
            if kept is not None:
                place = np.full(find(axis).size[0], -1, np.int64)
                place[kept] = np.arange(len(kept))
                whole = feeds[name].astype(np.int64)  # some frameworks declare ids as floats
                ids = place[whole]
                ids = np.where(ids < 0, whole % len(kept), ids)
                child[name] = np.asarray(ids, feeds[name].dtype)
                parent[name] = np.asarray(kept[ids], feeds[name].dtype)
        for name, array in child.items():
            if array.dtype.kind not in "iubUSO":
                child[name] = self._taken(cut, typing.types.get(name), array)
        return parent, child

    def expected(self, cut: Cut, outputs: Outputs) -> Outputs:
        """Return the child's outputs that the parent's mean: axes that the cut touches taken, positions renumbered."""
        typing, result = self.analysis.typing, {}
        for name, array in outputs.items():
            axis = typing.position_outputs.get(name)
            kept = None if axis is None else cut.picks(axis)
            if kept is not None and len(kept) == find(axis).size[0]:
                array = np.argsort(kept)[array].astype(array.dtype)
            result[name] = self._taken(cut, typing.types.get(name), array)
        return result

    def _taken(self, cut: Cut, axes: Sequence[Axis] | None, array: np.ndarray) -> np.ndarray:
        for position, axis in enumerate(axes or ()):
            kept = picks(cut, axis, array.shape[position])
            if kept is not None:
                array = array.take(kept, position)
        return np.ascontiguousarray(array) if array.ndim else array

    def atoms(self) -> list[Axis]:
        """Return every atom that may be cut and that float weights, float inputs or a dimension carry."""
        typing, weights = self.analysis.typing, self.model.weights
        axes: list[Axis] = [axis for dimension in self.analysis.dimensions for axis in dimension.axes]
        for name, uses in typing.uses.items():
            if name in weights:
                axes += [axis for use in uses if is_weight(use) for axis in use.axes]
        for tensor in self.model.inputs:
            axes += typing.types.get(tensor.name) or ()
        return list({id(leaf): leaf for axis in axes for leaf in free_leaves(axis) if not is_fill(leaf)}.values())

    @property
    def indices(self) -> list[Use]:
        """The uses of initializers that are no weights: positions, sizes, conditions."""
        return [use for uses in self.analysis.typing.uses.values() for use in uses if not is_weight(use)]

    def name(self, atom: Axis) -> str:
        """Return how a person calls an atom: its dimensions, or an initializer that carries it."""
        names = [
            d.name for d in self.analysis.dimensions if any(atom is leaf for axis in d.axes for leaf in leaves(axis))
        ]
        if names:
            return names[0] if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
        for name, uses in self.analysis.typing.uses.items():
            for use in uses:
                for position, axis in enumerate(use.axes):
                    if any(atom is leaf for leaf in leaves(axis)):
                        return f"axis {position} of '{name}' ({atom.size[0]} entries)"
        return f"an axis of {atom.size[0]}"


def _blocks(analysis: Analysis, count: int | None = None) -> dict[str, tuple[int, ...]]:
    return {stack.prefix: tuple(block.index for block in stack.blocks[:count]) for stack in analysis.stacks}


def picks(cut: Cut, axis: Axis, actual: int) -> np.ndarray | None:
    """Return the kept positions along an axis that has `actual` entries at run time, or None where all stay."""
    axis = find(axis)
    if is_static(axis) or axis.kind == "atom":
        return cut.picks(axis)
    if all(id(leaf) not in cut.indices for leaf in leaves(axis)):
        return None
    dynamic = [part for part in axis.parts if not is_static(find(part))]
    fixed = [find(part).size[0] for part in axis.parts if is_static(find(part))]
    rest = actual // int(np.prod(fixed)) if axis.kind == "product" else actual - sum(fixed)
    if len(dynamic) > 1:
        return None
    parts = []
    for part in axis.parts:
        size = rest if part is dynamic[0] else find(part).size[0]
        kept = picks(cut, part, size)
        parts.append((size, np.arange(size) if kept is None else kept))
    result = parts[0][1]
    offset = parts[0][0]
    for size, kept in parts[1:]:
        if axis.kind == "product":
            result = (result[:, None] * size + kept[None, :]).reshape(-1)
        else:
            result = np.concatenate([result, kept + offset])
            offset += size
    return result
