"""Refit: set each linear operator of the child by least squares, so that it gives what the parent gave."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
from rich.console import Console
from rich.progress import Progress

from graphclone.axes.axis import Axis, find
from graphclone.blocks import Block, Half, Stack
from graphclone.calibration.data import open_data
from graphclone.calibration.masks import chosen_masks
from graphclone.calibration.statistics import Statistics
from graphclone.dimensions import axis_key
from graphclone.errors import InputError
from graphclone.linears import Linear, find_linears, last_writer, sum_of
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Cut, Plan, resolve
from graphclone.segments import GramSegment, Segment
from graphclone.surgery import carry_out
from graphclone.weights import Weight

HOLDOUT = 5


@dataclass(frozen=True)
class Refit:
    """Fit linear operators in topological order, from the child's own inputs to the parent's outputs on what is kept.

    An operator that writes into the residual stream is fitted so that the child's stream equals the parent's at the
    entry of the next kept block; so it absorbs the blocks removed in between.
    ridge: towards the plain slice, as a fraction of the mean eigenvalue of the inputs' second moments.
    absorb: whether writers answer for removed blocks. drift: fit to the child's own inputs (else to the parent's).
    only: all operators, or `readouts` (the last writer of each half block alone: what no norm follows).
    Each fit must lower the error on held-out samples, else the slice stays. Source: arXiv 2608.02829 (compensation on the
    parent's inputs), ReplaceMe (arXiv 2505.02819: absorbing removed blocks).

    Example:
        refit{ridge=0.01}
    """

    name = "refit"
    ridge: float = 1e-2
    absorb: bool = True
    drift: bool = True
    only: str = "all"

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if self.only not in ("all", "readouts"):
            raise InputError(f"refit: only={self.only} is not known; write all or readouts")
        cut = resolve(plan, context.analysis)
        whole = all(len(cut.blocks[s.prefix]) == len(s.blocks) for s in context.analysis.stacks)
        if not cut.indices and whole and not cut.dropped:
            return plan
        if context.data is None:
            raise InputError("refit runs parent and child on samples; give them with --data")
        run = _Run(self, parent, plan, cut, context)
        run.fit()
        context.notes.extend(run.notes)
        kept = {name: factor for name, factor in plan.scale.items() if name not in run.fitted}
        return plan.with_(replace={**plan.replace, **run.fitted}, scale=kept)


@dataclass
class _Streams:
    """Per batch, what later segments start from: the tensors computed so far, by name."""

    parent: list[dict[str, np.ndarray]] = field(default_factory=list)
    child: list[dict[str, np.ndarray]] = field(default_factory=list)


class _Run:
    def __init__(self, options: Refit, parent: Model, plan: Plan, cut: Cut, context: Context):
        self.options = options
        self.parent = parent
        self.cut = cut
        self.context = context
        self.analysis = context.analysis
        self.child = carry_out(cut, parent, context.analysis, plan, renumber=False)
        self.linears = find_linears(context.analysis, parent)
        self.feeds = [dict(batch.feeds) for batch in open_data(context.data, parent)]
        self.mask = self._mask()
        self.streams = _Streams([{} for _ in self.feeds], [{} for _ in self.feeds])
        self.fitted: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.fallbacks = 0
        gone = [b for s in self.analysis.stacks for b in s.blocks if b.index not in cut.blocks[s.prefix]]
        self.bypassed = {part.exit: part.entry for part in (*gone, *cut.dropped)}

    def _mask(self) -> str | None:
        masks = chosen_masks(self.parent, None, self.feeds[0])
        return masks[0] if len(masks) == 1 else None

    # order ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        inside = {n for s in self.analysis.stacks for b in s.blocks for h in b.halves for n in h.nodes}
        with Progress(console=Console(stderr=True), disable=not self.context.progress) as progress:
            task = progress.add_task("refitting", total=len(self.linears))
            for stack in self.analysis.stacks:
                self._advance([], stack.points[0], stack.points[0])
                kept = [stack.blocks[i] for i in self.cut.blocks[stack.prefix]]
                for block, following in zip(kept, [*kept[1:], None]):
                    self._block(stack, block, following)
                    progress.update(task, advance=self._count(block))
            tail = [linear for linear in self.linears if linear.number not in inside and self._is_behind(linear)]
            self._fit_group(tail, {})
            progress.update(task, completed=len(self.linears))
        if self.fallbacks:
            self.notes.append(f"refit: {self.fallbacks} fits did not lower the held-out error and stay plain slices")

    def _in_child(self, name: str) -> str:
        """Return the child's tensor for one of the parent's: the exit of a dropped span is its entry."""
        while name in self.bypassed:
            name = self.bypassed[name]
        return name

    def _count(self, block: Block) -> int:
        inside = {n for half in block.halves for n in half.nodes}
        return sum(linear.number in inside for linear in self.linears)

    def _is_behind(self, linear: Linear) -> bool:
        last = max((n for s in self.analysis.stacks for b in s.blocks for h in b.halves for n in h.nodes), default=-1)
        return linear.number > last

    def _block(self, stack: Stack, block: Block, following: Block | None) -> None:
        """Fit the operators of one kept block, then move both streams to the next kept block's entry."""
        halves = [half for half in block.halves if half not in self.cut.dropped]
        targets: dict[str, tuple[str, str]] = {}  # y of a writer -> (sum in the child, tensor of the parent it aims at)
        for position, half in enumerate(halves):
            joined = sum_of(half, self.analysis)
            writer = last_writer(half, joined, self.linears, self.analysis) if joined else None
            if writer is None:
                continue
            after = halves[position + 1] if position + 1 < len(halves) else following
            aim = self._aim(stack, half, after) if self.options.absorb else joined
            targets[writer.y] = (joined, aim or joined)
        inside = {n for half in halves for n in half.nodes}
        self._fit_group([linear for linear in self.linears if linear.number in inside], targets)
        end = following.entry if following is not None else stack.points[-1]
        self._advance(stack.points, end, self._in_child(end))

    def _aim(self, stack: Stack, half: Half, after: Half | Block | None) -> str | None:
        """Return the parent's tensor that a half block's sum should equal: that of the last half before what follows."""
        order = [h for block in stack.blocks for h in block.halves]
        entry = after.entry if after is not None else None
        before = [h for h in order if h.exit == entry] if entry is not None else order[-1:]
        return sum_of(before[-1], self.analysis) if before else sum_of(half, self.analysis)

    def _advance(self, points: Sequence[str], parent_end: str, child_end: str) -> None:
        """Compute the parent's stream at one tensor and the child's at another; both go by the parent's name."""
        for model, held, end in ((self.parent, self.streams.parent, parent_end), (self.child, self.streams.child, child_end)):
            starts = list(held[0])
            segment = Segment(model, starts, [end])
            for feeds, known in zip(self.feeds, held):
                value = segment.run({**feeds, **known})[end]
                for name in set(known) & set(points):
                    del known[name]
                known[end] = value

    # one group --------------------------------------------------------------------------------------------------

    def _fit_group(self, linears: Sequence[Linear], targets: Mapping[str, tuple[str, str]]) -> None:
        """Fit operators between where the streams stand and the next point, in order."""
        chosen = [n for n in linears if self.options.only == "all" or n.y in targets]
        wanted = list(dict.fromkeys(name for n in chosen for name in [targets[n.y][1] if n.y in targets else n.y]))
        inputs = [] if self.options.drift else [n.x for n in chosen]
        if not chosen:
            return
        segment = Segment(self.parent, list(self.streams.parent[0]), [*wanted, *(i for i in inputs if i not in wanted)])
        given = [segment.run({**feeds, **known}) for feeds, known in zip(self.feeds, self.streams.parent)]
        for linear in chosen:
            name = targets[linear.y][1] if linear.y in targets else linear.y
            goals = [self._project(batch[name], linear.outer) for batch in given]
            inner = [self._project(batch[linear.x], linear.inner) for batch in given] if inputs else None
            self._fit(linear, goals, targets.get(linear.y), inner)

    def _project(self, values: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
        """Return the parent's rows on what the child keeps of the last axes, [T, N']."""
        lead = values.ndim - len(axes)
        for i, axis in enumerate(axes):
            basis = self.context.bases.get(axis_key(axis))
            if basis is not None:
                values = np.moveaxis(np.tensordot(values, basis, (lead + i, 0)), -1, lead + i)
            elif (picks := self.cut.picks(axis)) is not None:
                values = np.take(values, picks, lead + i)
        return values.reshape(int(np.prod(values.shape[:lead])), -1).astype(np.float32)

    def _fit(self, linear: Linear, goals: Sequence[np.ndarray], target, inner: Sequence[np.ndarray] | None) -> None:
        width = int(np.prod([self.cut.size(axis)[0] for axis in linear.inner]))
        outputs = goals[0].shape[1]
        train, held = _Moments.zero(width, outputs), _Moments.zero(width, outputs)
        for i, moments in enumerate(self._grams(linear, goals, target, width, outputs, inner)):
            group = held if len(self.feeds) > 1 and i % HOLDOUT == HOLDOUT - 1 else train
            group.add(moments)
        if not held.rows:
            held = train
        weight, bias, place = self._current(linear)
        before = np.vstack([weight, bias[None]])
        after = solve(train, before, self.options.ridge, linear.bias is not None)
        if after is None or held.error(after) > held.error(before):
            self.fallbacks += 1
            return
        place(after)

    def _grams(self, linear, goals, target, width, outputs, inner) -> Iterator[tuple]:
        if inner is not None and target is None:
            for x, y in zip(inner, goals):
                rows = np.hstack([x.astype(np.float64), np.ones((len(x), 1))])
                yield rows.T @ rows, rows.T @ y, float((y.astype(np.float64) ** 2).sum())
            return
        minus, plus = ([self._in_child(target[0])], [linear.y]) if target is not None else ([], [])
        mask = self.mask if self._rows_are_tokens(linear) else None
        starts = list(self.streams.child[0])
        segment = GramSegment(self.child, starts, self._in_child(linear.x), width, outputs, minus, plus, mask)
        for feeds, known, goal in zip(self.feeds, self.streams.child, goals):
            yield segment.run({**feeds, **known, "refit_target": goal})

    def _rows_are_tokens(self, linear: Linear) -> bool:
        if self.mask is None:
            return False
        node = self.analysis.typing.nodes[linear.number]
        axes = node.op.axes[0][: len(node.op.axes[0]) - len(linear.inner)]
        sizes = [find(axis).size for axis in self.analysis.typing.types[self.mask]]
        rows = tuple(int(np.prod([axis.size[p] for axis in axes])) for p in range(2))
        return rows == tuple(int(np.prod([size[p] for size in sizes])) for p in range(2))

    def _current(self, linear: Linear):
        """Return the child's weight [K, N] and bias [N], and a function that puts new ones in their place."""
        places = {
            t.name: (node, slot)
            for node in self.child.graph.nodes
            for slot, t in enumerate(node.inputs)
            if t.name in (linear.weight, linear.bias)
        }
        node, slot = places[linear.weight]
        stored = node.inputs[slot]._values.load()
        inverse = np.argsort(linear.order)
        flat = stored.transpose(inverse)
        shape = flat.shape
        width = int(np.prod(shape[: len(linear.inner)]))
        weight = flat.reshape(width, -1).astype(np.float64)
        bias_place = places.get(linear.bias) if linear.bias else None
        old_bias = bias_place[0].inputs[bias_place[1]]._values.load() if bias_place else None
        bias = np.zeros(weight.shape[1]) if old_bias is None else old_bias.astype(np.float64).reshape(-1)

        def place(both: np.ndarray) -> None:
            new = both[:-1].reshape(shape).transpose(linear.order).astype(stored.dtype)
            self._put(linear.weight, node, slot, np.ascontiguousarray(new))
            if old_bias is not None:
                self._put(linear.bias, *bias_place, both[-1].reshape(old_bias.shape).astype(old_bias.dtype))

        return weight, bias, place

    def _put(self, name: str, node, slot: int, value: np.ndarray) -> None:
        constant = node.inputs[slot]
        constant._values = Weight.of(value)
        self.fitted[name] = value


@dataclass
class _Moments:
    """Sums over rows: of x x', x y' (the last entry of x is one), of y y's trace; and how many rows."""

    gram: np.ndarray
    cross: np.ndarray
    energy: float = 0.0

    @staticmethod
    def zero(width: int, outputs: int) -> "_Moments":
        return _Moments(np.zeros((width + 1, width + 1)), np.zeros((width + 1, outputs)))

    @property
    def rows(self) -> float:
        return self.gram[-1, -1]

    def add(self, moments: tuple[np.ndarray, np.ndarray, float]) -> None:
        self.gram += moments[0]
        self.cross += moments[1]
        self.energy += moments[2]

    def error(self, weights: np.ndarray) -> float:
        """Return the squared error of y = x W + b over the rows."""
        return self.energy - 2 * np.sum(self.cross * weights) + np.sum(weights * (self.gram @ weights))


def solve(moments: _Moments, before: np.ndarray, ridge: float, intercept: bool) -> np.ndarray | None:
    """Return the ridge solution [K+1, N], drawn towards the weights before; None where it is not finite.

    ridge: a fraction of the mean eigenvalue of the inputs' second moments; the intercept is not drawn.
    """
    size = len(before) if intercept else len(before) - 1
    gram = moments.gram[:size, :size].copy()
    residual = (moments.cross - moments.gram @ before)[:size]
    strength = ridge * np.trace(moments.gram[:-1, :-1]) / max(len(before) - 1, 1)
    gram[np.arange(len(before) - 1), np.arange(len(before) - 1)] += max(strength, 1e-12)
    if intercept:
        gram[-1, -1] += 1e-9 * max(moments.rows, 1.0)
    try:
        step = scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram), residual)
    except (scipy.linalg.LinAlgError, ValueError):
        return None
    if not np.isfinite(step).all():
        return None
    result = before.copy()
    result[:size] += step
    return result
