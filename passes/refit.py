"""Refit: set each linear operator of the child by least squares, so that it gives what the parent gave."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from rich.console import Console
from rich.progress import Progress

from graphclone.axes.axis import Axis, find
from graphclone.blocks import Half, Stack
from graphclone.calibration.data import open_data
from graphclone.calibration.masks import chosen_masks, sense
from graphclone.calibration.session import resolve_provider, runnable
from graphclone.calibration.statistics import Statistics
from graphclone.cut import Cut
from graphclone.dimensions import axis_key
from graphclone.errors import InputError
from graphclone.graphs import constants, walk
from graphclone.linears import Linear, find_linears, heads, last_writer, left_alone, sum_of
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.segments import Joint, Stream, run
from graphclone.surgery import carry_out
from graphclone.surgery.weights import bias_name
from graphclone.weights import Weight, weight_of
from passes.likelihood import Probabilities, fit
from passes.outputs import compared_output, mask_of
from passes.ridge import EXACTLY, Moments, Solution, Targets, solve

HOLDOUT = 5
LISTED = 4
SAME = {"Identity", "Cast"}


@dataclass(frozen=True)
class Refit:
    """Fit linear operators in topological order, from the child's own inputs to the parent's outputs on what is kept.

    An operator that writes into the residual stream is fitted so that the child's stream equals the parent's at the
    entry of the next kept block; so it absorbs the blocks removed in between. Operators that share a matrix are fitted
    together, to the sum of their moments. Convolutions are linear on unfolded patches.
    ridge: towards the plain slice, as a fraction of the mean eigenvalue of the inputs' second moments.
    absorb: whether writers answer for removed blocks. drift: fit to the child's own inputs (else to the parent's).
    only: all operators, or `readouts` (the last writer of each half block alone: what no norm follows).
    bias: whether operators that have no bias get one; the framework's own class may have no place for it.
    untie: whether a tied head gets a matrix of its own, and is fitted; else it stays the embedding's slice.
    kl: whether the operator that gives logits is then fitted to the parent's probabilities (`passes.likelihood`).
    Each fit must lower the error on every fifth batch, which it has not seen, else the slice stays, and a note says so.
    Source: arXiv 2608.02829 (compensation on the parent's inputs), ReplaceMe (arXiv 2505.02819: absorbing removed
    blocks).

    Example:
        refit{ridge=0.01}
    """

    name = "refit"
    ridge: float = 1e-2
    absorb: bool = True
    drift: bool = True
    only: str = "all"
    bias: bool = False
    untie: bool = False
    kl: bool = True

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if self.only not in ("all", "readouts"):
            raise InputError(f"refit: only={self.only} is not known; write all or readouts")
        cut = resolve(plan, context.analysis)
        whole = all(len(cut.blocks[s.prefix]) == len(s.blocks) for s in context.analysis.stacks)
        if not cut.indices and whole and not cut.dropped:
            return plan
        if context.data is None:
            raise InputError("refit runs parent and child on samples; give them with --data")
        if self.untie:
            plan = plan.with_(untie={**heads(context.analysis, parent), **plan.untie})
        work = _Refitting(self, parent, plan, cut, context)
        work.run()
        kept = {name: factor for name, factor in plan.scale.items() if name not in work.fitted}
        return plan.with_(replace={**plan.replace, **work.fitted}, bias={**plan.bias, **work.biases}, scale=kept)


@dataclass(frozen=True)
class _Aim:
    """What a writer is fitted to: the sum it joins in should become the parent's tensor `goal`."""

    joined: str
    goal: str


@dataclass
class _Task:
    """Operators with the same inputs, to be solved from one Gram matrix.

    linears: one or, of a shared matrix, several uses per matrix. aims: of the uses of a writer, else empty.
    shared: whether the matrix has uses all over the graph, so that no held tensor shortens the way to them.
    """

    order: int
    linears: list[list[Linear]]
    aims: tuple[_Aim, ...] = ()

    @property
    def shared(self) -> bool:
        return len(self.linears[0]) > 1


class _Refitting:
    def __init__(self, options: Refit, parent: Model, plan: Plan, cut: Cut, context: Context):
        self.options = options
        self.plan = plan
        self.cut = cut
        self.context = context
        self.analysis = context.analysis
        main = {tensor.name for node in parent.graph.nodes for tensor in node.outputs} | {t.name for t in parent.inputs}
        gone = [b for s in self.analysis.stacks for b in s.blocks if b.index not in cut.blocks[s.prefix]]
        self.bypassed = {part.exit: part.entry for part in (*gone, *cut.dropped)}
        left = {t.name for graph in walk(self._cut(parent, plan).graph) for node in graph.nodes for t in node.outputs}
        nodes = self.analysis.typing.nodes
        found = find_linears(self.analysis, parent, plan.untie)
        found = [n for n in found if nodes[n.number].op.node.outputs[0].name in left]
        self.inner = [(n.where, "it runs in a branch or a loop") for n in found if not {n.x, n.y} <= main]
        found = [n for n in found if {n.x, n.y} <= main]
        self.linears = [n for n in found if not self._cuts_rows(n)]
        self.inner += [(n.where, "the cut takes away rows of its input") for n in found if n not in self.linears]
        self.stacks = [stack for stack in self.analysis.stacks if set(stack.points) <= main]
        provider = resolve_provider(context.provider)
        parent = runnable(parent, provider)
        self.weights = parent.weights
        self.added = self._new_biases()
        zeros = {n.weight: np.zeros(cut.size(n.outer[0])[0]) for n in self.linears if n.weight in self.added}
        child = self._cut(parent, plan.with_(bias={**plan.bias, **zeros}))
        self.places = {constant.name: constant for constant in constants(child.graph)}
        feeds = [dict(batch.feeds) for batch in open_data(context.data, parent)]
        masks = {name: sense(parent, name) for name in chosen_masks(parent, context.mask, feeds[0])}
        self.parent = Stream("parent", parent, feeds, provider, masks)
        self.child = Stream("child", child, [self._child_feeds(batch) for batch in feeds], provider)
        self.fitted: dict[str, np.ndarray] = {}
        self.biases: dict[str, np.ndarray] = {}
        self.slices: list[tuple[str, str]] = []
        self.errors: list[Solution] = []
        self.logits = self._logits()

    def _cuts_rows(self, linear: Linear) -> bool:
        """Tell whether parent and child differ in what an operator is applied to, as where a Mixer mixes tokens."""
        axes = self.analysis.typing.nodes[linear.number].op.axes[0]
        rows = (axes[0], *axes[2:]) if linear.window is not None else axes[: -len(linear.inner)]
        return any(self.cut.picks(axis) is not None or axis_key(axis) in self.context.bases for axis in rows)

    def _cut(self, onto: Model, plan: Plan) -> Model:
        return carry_out(self.cut, self.context.parent, self.analysis, plan, onto=onto, renumber=False)

    def _new_biases(self) -> set[str]:
        """Return the weights whose operators have no bias and may get one."""
        if not self.options.bias:
            return set()
        uses = self.analysis.typing.uses
        able = [n for n in self.linears if n.bias is None and len(uses[n.weight]) == 1 and len(n.outer) == 1]
        return {n.weight for n in able if n.weight not in self.plan.bias and bias_name(n.weight) not in uses}

    def _child_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the feeds on what the child keeps of their axes."""
        found = {}
        for name, values in feeds.items():
            for position, axis in enumerate(self.analysis.typing.types[name] or ()):
                onto = self._onto([axis])
                if onto is not None:
                    values = np.take(values, onto, position) if onto.ndim == 1 else np.moveaxis(
                        np.tensordot(values, onto, (position, 0)), -1, position).astype(values.dtype)  # fmt: skip
            found[name] = values
        return found

    # order ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.aims = self._aims()
        steps = [(task.order, 0, self._solve, (task,)) for task in self._tasks(self.aims)]
        for stack in self.stacks:
            first = self._number(stack.points[0])
            steps.append((first, 1, self._advance, (stack, stack.points[0])))
            for half, after in self._kept_halves(stack):
                steps.append((max(half.nodes), 1, self._advance, (stack, after)))
        with Progress(console=Console(stderr=True), disable=not self.context.progress) as progress:
            bar = progress.add_task("refitting", total=len(self.linears))
            for _, _, step, arguments in sorted(steps, key=lambda item: item[:2]):
                progress.advance(bar, step(*arguments))
            progress.update(bar, completed=len(self.linears))
        self._tell()

    def _number(self, tensor: str) -> int:
        """Return the number of the node that computes a tensor, -1 for an input."""
        nodes = enumerate(self.analysis.typing.nodes)
        return next((n for n, node in nodes if any(t.name == tensor for t in node.op.node.outputs)), -1)

    def _kept_halves(self, stack: Stack) -> list[tuple[Half, str]]:
        """Return the half blocks that stay, each with the parent's point of the stream where the next one begins."""
        kept = [h for i in self.cut.blocks[stack.prefix] for h in stack.blocks[i].halves if h not in self.cut.dropped]
        return [
            (half, after.entry if after else stack.points[-1])
            for half, after in zip(kept, [*kept[1:], None], strict=True)
        ]

    def _aims(self) -> dict[int, _Aim]:
        """Return what each last writer of a half block is fitted to, by its number."""
        found: dict[int, _Aim] = {}
        for stack in self.stacks:
            order = [half for block in stack.blocks for half in block.halves]
            for half, after in self._kept_halves(stack):
                joined = sum_of(half, self.analysis)
                writer = last_writer(half, joined, self.linears, self.analysis) if joined else None
                if writer is None:
                    continue
                last = next((h for h in reversed(order) if h.exit == after), half)
                goal = sum_of(last, self.analysis) if self.options.absorb else joined
                found[writer.number] = _Aim(joined, goal or joined)
        return found

    def _tasks(self, aims: Mapping[int, _Aim]) -> list[_Task]:
        """Group operators by the tensors they read, so that each Gram matrix is gathered once."""
        chosen = [n for n in self.linears if self.options.only == "all" or n.number in aims]
        matrices: dict[str, list[Linear]] = defaultdict(list)
        for linear in chosen:
            matrices[linear.shared].append(linear)
        groups: dict[tuple, _Task] = {}
        for uses in matrices.values():
            found = tuple(aims[n.number] for n in uses if n.number in aims)
            aimed = found if len(found) == len(uses) else ()
            key = (tuple(n.x for n in uses), str(uses[0].window), uses[0].number if aimed else None)
            groups.setdefault(key, _Task(uses[0].number, [], aimed)).linears.append(uses)
        return list(groups.values())

    def _advance(self, stack: Stack, point: str) -> int:
        """Let both streams hold the state at one of the parent's points, and let go of the states before it."""
        sums = {aim.goal for aim in self.aims.values()}
        for stream, name in ((self.parent, point), (self.child, self._in_child(point))):
            stream.hold(name)
            for other in [held for held in stream.held if held != name and (held in stack.points or held in sums)]:
                stream.forget(other)
        return 0

    def _in_child(self, name: str) -> str:
        """Return the child's tensor for one of the parent's: the exit of a dropped span is its entry."""
        while name in self.bypassed:
            name = self.bypassed[name]
        return name

    # one Gram matrix --------------------------------------------------------------------------------------------

    def _solve(self, task: _Task) -> int:
        """Gather a Gram matrix, and solve for each matrix that it serves."""
        for aim in task.aims if not task.shared else ():
            self.parent.hold(aim.goal)
        moments = self._gather(task)
        for uses in task.linears:
            linear = uses[0]
            before = self._now(linear)
            intercept = linear.bias is not None or linear.weight in self.added
            found = solve(moments, self._targets(linear, task), before, self.options.ridge, intercept)
            if found.weights is None:
                self.slices += [(linear.where, found.why)] if found.why != EXACTLY else []
            else:
                self.errors.append(found)
                for use in uses:
                    self._place(use, found.weights)
            if linear.y in self.logits and found.why != EXACTLY:
                self._fit_probabilities(linear, moments, intercept)
        return sum(map(len, task.linears))

    def _logits(self) -> set[str]:
        """Return the tensors that are the model's logits, where they are to be fitted as such."""
        if not self.options.kl or self.options.only != "all":
            return set()
        name, is_logits = compared_output(self.context.parent, self.analysis)
        known: set[str] = set()
        nodes = {tensor.name: node.op.node for node in self.analysis.typing.nodes for tensor in node.op.node.outputs}
        while is_logits and name not in known:
            known.add(name)
            node = nodes.get(name)
            name = node.inputs[0].name if node is not None and node.op in SAME else name
        return known

    def _fit_probabilities(self, linear: Linear, moments: Moments, intercept: bool) -> None:
        """Fit the operator that gives logits once more: to the parent's probabilities."""
        joint, size = Joint([self.parent, self.child]), (moments.inputs, self.cut.size(linear.outer[0])[0])
        x = self._inputs(joint, linear, joint.tensor(self.child, self._in_child(linear.x)), self.cut)
        t = joint.rows(joint.tensor(self.parent, linear.y), find(linear.outer[0]).size[0])
        t = joint.projected(t, self._onto(linear.outer))
        square = slice(moments.inputs + 1)
        rows = sum(
            int(gram[moments.inputs, moments.inputs]) for gram in (moments.train, moments.held) if gram is not None
        )
        with_ = Probabilities(joint, x, t, size, self._held(), rows, self._mask(linear))
        found = fit(with_, moments.train[square, square], self._now(linear), intercept)
        if found.weights is not None:
            self._place(linear, found.weights)
            told = f"{found.after:.3g} nats instead of {found.before:.3g}"
            self.context.notes.append(
                f"refit: {linear.where} fitted to the parent's probabilities: {told} apart on samples held out"
            )

    def _gather(self, task: _Task) -> Moments:
        """Sum z z' over all rows, z = [x, 1, t], where the activations are.

        A shared matrix is read before and behind what is held, so that its uses are computed from the inputs.
        """
        both = (self.parent, self.child)
        parent, child = (each.afresh() for each in both) if task.shared else both
        joint = Joint([parent, child])
        total: gs.Tensor | None = None
        for position, linear in enumerate(task.linears[0]):
            if self.options.drift:
                x = self._inputs(joint, linear, joint.tensor(child, self._in_child(linear.x)), self.cut)
            if not (self.options.drift and task.aims):
                t = self._inputs(joint, linear, joint.tensor(parent, linear.x), None)
            if not self.options.drift:
                x = joint.projected(t, self.context.readers.get(linear.own, self._onto(linear.inner)))
            if task.aims:
                t = self._wanted(joint, linear, task.aims[position], parent, child)
            gram = joint.gram([x, None, t], self._mask(linear))
            total = gram if total is None else joint.op("Add", total, gram)
        joint.give("gram", total)
        session = joint.open()
        moments = Moments(int(np.prod([self.cut.size(axis)[0] for axis in task.linears[0][0].inner])))
        for held, batch in zip(self._held(), joint.batches(), strict=True):
            moments.add(run(session, batch)[0], held)
        return moments

    def _held(self) -> list[bool]:
        """Return for each batch whether it is left out of the fits, to judge them by."""
        count = len(self.parent.feeds)
        return [count > 1 and number % HOLDOUT == min(HOLDOUT, count) - 1 for number in range(count)]

    def _inputs(self, joint: Joint, linear: Linear, tensor: gs.Tensor, cut: Cut | None) -> gs.Tensor:
        """Return what an operator reads as rows, of the parent or, with a cut, of the child."""
        sizes = [find(axis).size[0] if cut is None else cut.size(axis)[0] for axis in linear.inner]
        if linear.window is not None:
            return joint.unfolded(tensor, sizes[0], linear.window, sizes[1:])
        return joint.rows(tensor, int(np.prod(sizes)))

    def _wanted(self, joint: Joint, linear: Linear, aim: _Aim, parent: Stream, child: Stream) -> gs.Tensor:
        """Return what a writer should give: what the child's sum, or the parent's own, lacks of the parent's goal."""

        def rows(stream: Stream, name: str) -> gs.Tensor:
            axes = [find(axis).size[0] if stream is parent else self.cut.size(axis)[0] for axis in linear.outer]
            return joint.rows(joint.tensor(stream, name), int(np.prod(axes)), linear.window is not None)

        onto = self._onto(linear.outer)
        goal = rows(parent, aim.goal)
        if self.options.drift:
            others = joint.op("Sub", rows(child, self._in_child(aim.joined)), rows(child, linear.y))
            return joint.op("Sub", joint.projected(goal, onto), others)
        others = joint.op("Sub", rows(parent, aim.joined), rows(parent, linear.y))
        return joint.projected(joint.op("Sub", goal, others), onto)

    def _targets(self, linear: Linear, task: _Task) -> Targets:
        width = int(np.prod([self.cut.size(axis)[0] for axis in linear.outer]))
        if task.aims:
            return Targets.of(width)
        weight = _matrix(self.weights[linear.weight], linear)
        bias = self.weights[linear.bias].load().reshape(-1) if linear.bias else np.zeros(weight.shape[1], weight.dtype)
        return Targets(width, weight, bias, self._onto(linear.outer))

    def _onto(self, axes: Sequence[Axis]) -> np.ndarray | None:
        """Return what the child keeps of axes side by side: positions, a basis [N, N'], or None for all."""
        kept = [self.context.bases.get(axis_key(axis), self.cut.picks(axis)) for axis in axes]
        if all(each is None for each in kept):
            return None
        sizes = [find(axis).size[0] for axis in axes]
        kept = [np.arange(size) if each is None else each for each, size in zip(kept, sizes, strict=True)]
        if len(kept) > 1 and any(each.ndim == 2 for each in kept):
            bases = [each if each.ndim == 2 else np.eye(size)[:, each] for each, size in zip(kept, sizes, strict=True)]
            return functools.reduce(np.kron, bases)
        positions = kept[0]
        for size, each in zip(sizes[1:], kept[1:], strict=True):
            positions = (positions[:, None] * size + each).reshape(-1)
        return positions

    def _mask(self, linear: Linear) -> str | None:
        """Return the mask whose tokens are an operator's rows."""
        if linear.window is not None:
            return None
        axes = self.analysis.typing.nodes[linear.number].op.axes[0][: -len(linear.inner)]
        return mask_of(axes, self.parent.masks, self.analysis)

    # weights ----------------------------------------------------------------------------------------------------

    def _now(self, linear: Linear) -> np.ndarray:
        """Return the child's weight and bias, [K+1, N]."""
        weight = _matrix(weight_of(self.places[linear.own]), linear)
        name = self._bias(linear)
        bias = weight_of(self.places[name]).load() if name else np.zeros(weight.shape[1], weight.dtype)
        return np.vstack([weight, bias.reshape(1, -1)])

    def _bias(self, linear: Linear) -> str | None:
        return bias_name(linear.weight) if linear.weight in self.added else linear.bias

    def _place(self, linear: Linear, both: np.ndarray) -> None:
        """Put new weights into the child and into the plan."""
        stored = weight_of(self.places[linear.own])
        shape = [stored.shape[i] for i in np.argsort(linear.order)]
        self._put(linear.own, both[:-1].reshape(shape).transpose(linear.order))
        name = self._bias(linear)
        if name is None:
            return
        self._put(name, both[-1].reshape(weight_of(self.places[name]).shape))
        if linear.weight in self.added:
            self.biases[linear.weight] = self.fitted.pop(name)

    def _put(self, name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value.astype(weight_of(self.places[name]).dtype))
        self.places[name]._values = Weight.of(value)
        self.fitted[name] = value

    # what the user is told --------------------------------------------------------------------------------------

    def _tell(self) -> None:
        notes = self.context.notes
        if self.errors:
            before, after = (np.mean([getattr(each, name) for each in self.errors]) for name in ("before", "after"))
            mean = f"mean error on samples held out {before:.3g}, now {after:.3g}"
            notes.append(f"refit: {len(self.errors)} matrices fitted; {mean}")
        if len(self.parent.feeds) == 1:
            notes.append("refit: one batch alone, so none is held out; fits are judged on what they were made from")
        notes += _listed("stay plain slices", self.slices)
        alone = left_alone(self.analysis, self.parent.model, self.plan.untie)
        notes += _listed("are left alone", [*alone, *self.inner])


def _matrix(weight: Weight, linear: Linear) -> np.ndarray:
    """Return an initializer as W [K, N]."""
    array = weight.load().transpose(np.argsort(linear.order))
    return array.reshape(int(np.prod(array.shape[: len(linear.inner)])), -1)


def _listed(what: str, found: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line that names the first few nodes and why."""
    if not found:
        return []
    shown = "; ".join(f"{where}: {why}" for where, why in found[:LISTED])
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return [f"refit: {len(found)} operators {what}: {shown}{more}"]
