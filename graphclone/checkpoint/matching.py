"""Find each tensor of a checkpoint among a graph's initializers: by value, and by name where values do not tell.

Exporters rename most matrices, transpose them, add 1 to the weights of norms, fuse and split projections. The values
survive all of it: a tensor is an initializer, its transpose, itself plus one, a slab of a larger one (an expert, a
query projection inside a fused one), or the concatenation of several.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphclone.axes.typed import AxisTyping, Use
from graphclone.checkpoint.folded import Undo, find_folded
from graphclone.dtypes import is_float
from graphclone.model import Model
from graphclone.weights import Weight, weight_of

SAMPLES = 256
ROWS = 8
"""Elements of a row by which slabs are found."""
TOKEN = re.compile(r"[A-Za-z]+|\d+")


@dataclass(frozen=True)
class Part:
    """Where (a part of) a tensor lies in an initializer.

    use: one use of the initializer. rows: the flat range of rows it takes (all axes but the last, after `swapped`
    exchanged the last two), or None for all of it. plus: what the exporter added. undo: the way back from what the
    exporter folded the tensor into, or None. twins: other initializers that hold the same, as where blocks share it.
    """

    name: str
    use: Use
    swapped: bool = False
    rows: tuple[int, int] | None = None
    plus: float = 0.0
    undo: Undo | None = None
    twins: tuple["Part", ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Match:
    """A tensor of the checkpoint and the parts of initializers that hold it, in order along its first axis."""

    tensor: str
    parts: tuple[Part, ...]


def match(tensors: Mapping[str, Weight], model: Model, typing: AxisTyping) -> dict[str, Match]:
    """Return the matches by tensor; what the graph does not contain is left out.

    Example:
        match(read_checkpoint("gpt2").tensors, model, type_axes(model))["wte.weight"].parts[0].name
    """
    return _Matcher(tensors, model, typing).run()


class _Matcher:
    def __init__(self, tensors: Mapping[str, Weight], model: Model, typing: AxisTyping):
        self.tensors = {name: weight for name, weight in tensors.items() if is_float(weight.onnx_dtype) and weight.size}
        self.model = model
        self.typing = typing
        self.uses = {name: [use for use in uses if use.node is not None] for name, uses in typing.uses.items()}
        self.stored = {
            name: weight_of(uses[0].node.inputs[uses[0].slot])
            for name, uses in self.uses.items()
            if uses and uses[0].node.inputs[uses[0].slot]._values is not None
        }
        self.stored = {name: w for name, w in self.stored.items() if is_float(w.onnx_dtype) and w.size}
        low = [w.dtype for w in (*self.tensors.values(), *self.stored.values()) if w.dtype.itemsize < 4]
        self.dtype = min(low, key=lambda dtype: dtype.itemsize) if low else np.dtype(np.float32)

    def run(self) -> dict[str, Match]:
        index: dict[tuple, list[tuple[str, bool]]] = defaultdict(list)
        for name, weight in self.stored.items():
            index[self._key(weight)].append((name, False))
            if len(_squeezed(weight)) == 2:
                index[self._key(weight, swapped=True)].append((name, True))
        found: dict[str, Match] = {}
        for name, weight in self.tensors.items():
            part = self._choose(name, index.get(self._key(weight), ()))
            if part is None and len(_squeezed(weight)) == 1:
                part = self._choose(name, index.get(self._key(weight, plus=1.0), ()), plus=1.0)
            if part is not None:
                found[name] = Match(name, (part,))
        return self._folded(self._slabs(found))

    # whole tensors ----------------------------------------------------------------------------------------------

    def _key(self, weight: Weight, swapped: bool = False, plus: float = 0.0) -> tuple:
        """Return what two equal tensors share: the shape without ones, and a sample of values."""
        shape = _squeezed(weight)
        axes = [axis for axis, size in enumerate(weight.shape) if size > 1]
        if swapped:
            shape, axes = shape[::-1], axes[::-1]
        places = np.unravel_index(np.arange(SAMPLES) * 2654435761 % weight.size, shape or (1,))
        zero = np.zeros(SAMPLES, np.int64)
        by_axis = dict(zip(axes, places, strict=False))
        values = weight.at(tuple(by_axis.get(axis, zero) for axis in range(len(weight.shape))))
        return shape, self._lowered(values, plus).tobytes()

    def _lowered(self, values: np.ndarray, plus: float = 0.0) -> np.ndarray:
        wide = values.astype(np.float32) if values.dtype.itemsize < 8 else values
        return (wide + wide.dtype.type(plus)).astype(self.dtype).astype(np.float32) + np.float32(0)

    def _choose(self, tensor: str, candidates: Sequence[tuple[str, bool]], plus: float = 0.0) -> Part | None:
        """Return the candidate whose name and place say the most; a constant is only trusted where they agree."""
        options = [Part(name, use, swapped, None, plus) for name, swapped in candidates for use in self.uses[name]]
        if not options:
            return None
        scored = sorted(options, key=lambda part: -self._likeness(tensor, part))
        best = scored[0]
        weight = self.stored[best.name]
        if weight.size > 1 and np.ptp(self._lowered(weight.at(_spread(weight)))) == 0:
            leaf = tensor.rpartition(".")[0]
            if self._likeness(tensor, best) < 0.5 or (plus and best.name != tensor and leaf not in best.name):
                return None
        return replace(best, twins=tuple(part for part in scored[1:] if part.name != best.name))

    def _likeness(self, tensor: str, part: Part) -> float:
        wanted = TOKEN.findall(tensor)
        notes = " ".join(self.model.node_metadata.get(part.use.node.name, {}).values())
        texts = [part.name, part.use.node.name, notes]
        scores = [
            difflib.SequenceMatcher(None, wanted, TOKEN.findall(text)[-24:], autojunk=False) for text in texts if text
        ]
        tail = part.name == tensor or part.name.endswith(f".{tensor}") or tensor.endswith(f".{part.name}")
        return max((sum(b.size for b in s.get_matching_blocks()) / len(wanted) for s in scores), default=0) + 2 * tail

    # slabs ------------------------------------------------------------------------------------------------------

    def _slabs(self, found: dict[str, Match]) -> dict[str, Match]:
        """Match what is left by rows: tensors inside larger initializers, and initializers inside larger tensors."""
        missing = [name for name in self.tensors if name not in found and len(_squeezed(self.tensors[name])) >= 1]
        taken = {part.name for each in found.values() for part in each.parts}
        free = [name for name in self.stored if name not in taken and len(self.stored[name].shape) >= 1]
        if not missing or not free:
            return found
        missing.sort(key=lambda name: -len(self.tensors[name].shape))
        inside = _Rows(self.stored, free, self)
        for name in list(missing):
            parts = [p for p in inside.find(self.tensors[name]) if self._agrees(name, p, found)]
            if parts:
                place, swapped, start, count = parts[0]
                found[name] = Match(name, (Part(place, self.uses[place][0], swapped, (start, start + count)),))
                missing.remove(name)
        outside = _Rows(self.tensors, [name for name in missing if len(self.tensors[name].shape) in (1, 2)], self)
        pieces: dict[str, list[tuple[int, int, Part]]] = defaultdict(list)
        for name in free:
            for swapped in (False, True) if len(self.stored[name].shape) == 2 else (False,):
                for tensor, turned, start, count in outside.find(self.stored[name], swapped):
                    if not turned:
                        pieces[tensor].append((start, count, Part(name, self.uses[name][0], swapped)))
        for tensor, listed in pieces.items():
            listed.sort(key=lambda piece: piece[0])
            ends = [start + count for start, count, _ in listed]
            if [0, *ends[:-1]] == [start for start, _, _ in listed] and ends[-1] == self.tensors[tensor].shape[0]:
                found[tensor] = Match(tensor, tuple(part for _, _, part in listed))
        return found

    def _folded(self, found: dict[str, Match]) -> dict[str, Match]:
        """Match what the exporter computed with: normed weights, batch norms, gathered tables."""
        taken = {part.name for each in found.values() for part in each.parts}
        free = [name for name in self.stored if name not in taken]
        missing = [name for name in self.tensors if name not in found]
        for tensor, name, undo in find_folded(self.tensors, missing, self.stored, free) if free else ():
            found[tensor] = Match(tensor, (Part(name, self.uses[name][0], undo=undo),))
        return found

    def _agrees(self, tensor: str, place: tuple, found: Mapping[str, Match]) -> bool:
        """A bias inside a fused one lies where its weight does."""
        weight = found.get(f"{tensor.rpartition('.')[0]}.weight")
        if len(_squeezed(self.tensors[tensor])) > 1 or weight is None or weight.parts[0].rows is None:
            return True
        return weight.parts[0].rows == (place[2], place[2] + place[3])


class _Rows:
    """The rows of some tensors, by their first elements; `swapped` ones have their last two axes exchanged."""

    def __init__(self, weights: Mapping[str, Weight], names: Sequence[str], matcher: _Matcher):
        self.weights = weights
        self.matcher = matcher
        self.rows: dict[tuple, list[tuple[str, bool, int]]] = defaultdict(list)
        self.heads: dict[tuple[str, bool], np.ndarray] = {}
        for name in names:
            weight = weights[name]
            for swapped in (False, True) if len(weight.shape) >= 2 else (False,):
                rows, width = self._heads(weight, swapped)
                self.heads[name, swapped] = rows
                for number, row in enumerate(rows):
                    self.rows[width, row.tobytes()].append((name, swapped, number))

    def _heads(self, weight: Weight, swapped: bool) -> tuple[np.ndarray, int]:
        if len(weight.shape) < 2:
            return self.matcher._lowered(np.asarray(weight.load()).reshape(-1, 1)), 1
        axis = len(weight.shape) - (2 if swapped else 1)
        width = weight.shape[axis]
        head = weight.take(axis, range(min(ROWS, width))).load()
        head = np.swapaxes(head, -1, -2) if swapped else head
        return self.matcher._lowered(np.ascontiguousarray(head).reshape(-1, head.shape[-1])), width

    def find(self, weight: Weight, swapped: bool = False) -> list[tuple[str, bool, int, int]]:
        """Return (name, swapped, first row, rows) of each place where the rows of a weight stand in a run."""
        wanted, width = self._heads(weight, swapped)
        if not len(wanted) or (len(wanted) > 1 and (wanted == wanted[0]).all()):
            return []
        found = []
        for name, turned, start in self.rows.get((width, wanted[0].tobytes()), ()):
            whole = self.heads[name, turned]
            if len(whole) > len(wanted) and np.array_equal(whole[start : start + len(wanted)], wanted):
                found.append((name, turned, start, len(wanted)))
        return found


def _squeezed(weight: Weight) -> tuple[int, ...]:
    return tuple(size for size in weight.shape if size > 1)


def _spread(weight: Weight) -> tuple[np.ndarray, ...]:
    return np.unravel_index(np.arange(SAMPLES) * 2654435761 % weight.size, weight.shape)
