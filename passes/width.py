"""Width: which indices of hidden, FFN, heads and head dim stay."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from graphclone.axes.axis import Axis, find, free_leaves, leaves
from graphclone.axes.steps import asking, atom_steps
from graphclone.blocks import Stack
from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Moment
from graphclone.cut import Cut
from graphclone.dimensions import Dimension, axis_key
from graphclone.dtypes import is_float
from graphclone.errors import CutError, InputError
from graphclone.importance import METRICS, Ranking, select
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.taps import Reading, onto_leaf, positions_of
from passes.obs import choose_by_obs
from passes.targets import Target, per_block, target_of

UNMEASURED = ("first", "uniform", "random")


@dataclass(frozen=True)
class Width:
    """Keep the most important indices of each dimension that has a target size.

    hidden, ffn, heads, kv_heads, head_dim: a number, {stack: number}, or a list with one entry per kept block; for
    hidden one per stage, where the stream's width changes or begins anew. `heads` alone keeps the queries per KV head,
    and so does `kv_heads` alone; both set them.
    by: mean_abs (mean |activation|: arXiv 2312.09299, section 4.1), l2, variance, output_aware, obs (chosen together, by
    second moments: see `passes/obs.py`), first, uniform, random.
    keep_heads: leave widths outside the blocks alone that equal hidden (a pooler, a transform before the head).

    Example:
        width{hidden=384 ffn=1536 heads=6 by=mean_abs}
    """

    name = "width"
    hidden: Target = None
    ffn: Target = None
    heads: Target = None
    kv_heads: Target = None
    head_dim: Target = None
    by: str = "mean_abs"
    keep_heads: bool = False

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if self.by not in METRICS:
            raise InputError(f"no importance metric is called '{self.by}'; there are {', '.join(METRICS)}")
        targets: dict[str, tuple[Dimension, int]] = {}
        for stack in context.analysis.stacks:
            self._stack_targets(stack, plan, context, targets)
        targets_given = (self.hidden, self.ffn, self.heads, self.kv_heads, self.head_dim)
        if not context.analysis.stacks and any(target is not None for target in targets_given):
            raise CutError(
                "this graph has no residual stream with repeated blocks, so its widths have no names; use a plan"
            )
        ranker = _Ranker(self.by, parent, stats, context)
        keep = dict(plan.keep)
        for name, (dimension, target) in targets.items():
            if target != dimension.size:
                keep[name] = ranker.choose(dimension, target)
        return plan.with_(keep=keep)

    def _stack_targets(self, stack: Stack, plan: Plan, context: Context, targets: dict) -> None:
        stacks = context.analysis.stacks
        hidden = target_of(self.hidden, stack, stacks, "hidden")
        if hidden is not None:
            self._hidden(stack, hidden, context, targets)
        kept = plan.blocks.get(stack.prefix.rstrip("."), plan.blocks.get("") if len(stacks) == 1 else None)
        kept = [block.index for block in stack.blocks] if kept is None else list(kept)
        columns = {
            what: per_block(target_of(getattr(self, what), stack, stacks, what), kept, what)
            for what in ("ffn", "heads", "kv_heads", "head_dim")
        }
        for position, index in enumerate(kept):
            wanted = {what: column[position] for what, column in columns.items() if column[position] is not None}
            if wanted:
                _block_targets(f"{stack.prefix}blocks.{index}.", wanted, context, targets)

    def _hidden(self, stack: Stack, target: int | tuple[int, ...], context: Context, targets: dict) -> None:
        name = re.escape(f"{stack.prefix}hidden")
        stages = [d for d in context.analysis.dimensions if any(re.fullmatch(rf"{name}(_\d+)?", n) for n in d.names)]
        sizes = target if isinstance(target, tuple) else (target,) * len(stages)
        if (len({d.size for d in stages}) > 1 and isinstance(target, int)) or len(sizes) != len(stages):
            listed = ", ".join(str(d.size) for d in stages)
            wanted = "a list with one size for each stage" if len(stages) > 1 else "a number: it is one width"
            raise CutError(f"hidden: the stream has {listed}; give {wanted}")
        for dimension, size in zip(stages, sizes, strict=True):
            _set(targets, dimension, size, dimension.name)
        if self.keep_heads or len(stages) > 1:
            return
        for other in context.analysis.dimensions:
            alike = other.role == "free" and not other.blocks and other.size == stages[0].size
            if alike and not other.locked and other.name not in targets:
                _set(targets, other, sizes[0], "hidden")
                context.notes.append(
                    f"'{other.name}' ({other.size}) equals hidden and is cut with it; --keep-heads leaves it"
                )


def _block_targets(base: str, wanted: Mapping[str, int], context: Context, targets: dict) -> None:
    """Set the targets of one block's dimensions; grouped queries are cut in whole groups."""
    named = {name: d for d in context.analysis.dimensions for name in d.names if name.startswith(base)}
    if "ffn" in wanted:
        _ffn_targets(base, named, wanted["ffn"], context, targets)
    if "head_dim" in wanted:
        for name, dimension in named.items():
            if dimension.role in ("head_dim", "v_head_dim"):
                _set(targets, dimension, wanted["head_dim"], name)
    heads, groups = wanted.get("heads"), wanted.get("kv_heads")
    if heads is None and groups is None:
        return
    prefixes = sorted({n[len(base) :].removesuffix("kv_heads").removesuffix("heads") for n, d in named.items()
                       if d.role in ("heads", "kv_heads")})  # fmt: skip
    if not prefixes:
        raise CutError(f"heads: '{base[:-1]}' has no attention heads in this graph; leave the target out")
    for prefix in prefixes:
        _attention_targets(f"{base}{prefix}", named, heads, groups, targets)


def _ffn_targets(base: str, named: Mapping[str, Dimension], target: int, context: Context, targets: dict) -> None:
    """Set the targets of a block's ffn, and of those beside it that are as wide: experts, the two of a Conformer."""
    main, every = _required(named, f"{base}ffn"), re.sub(r"\d+\.$", "*.", base)
    _set(targets, main, target, f"{base}ffn")
    for name, other in named.items():
        if other.role == "ffn" and other.size == main.size and other is not main and not other.locked:
            _set(targets, other, target, name)
            note = f"'{every}{name[len(base) :]}' ({other.size}) equals ffn and is cut with it"
            context.notes.extend([] if note in context.notes else [note])


def _attention_targets(base: str, named: Mapping[str, Dimension], heads, groups, targets: dict) -> None:
    if f"{base}kv_heads" not in named:
        if heads is not None and groups is not None and heads != groups:
            raise CutError(
                f"kv_heads: '{base}heads' has one query per KV head, so kv_heads ({groups}) must equal heads ({heads})"
            )
        return _set(targets, named[f"{base}heads"], heads or groups, f"{base}heads")
    kv, per = named[f"{base}kv_heads"], named[f"{base}queries_per_kv"]
    if groups is None:
        if heads % per.size:
            raise CutError(
                f"heads: {heads} is no multiple of {per.size}, the queries per KV head of '{base}kv_heads'; "
                "give a multiple, or kv_heads as well"
            )
        groups = heads // per.size
    queries = per.size
    if heads is not None:
        if heads % groups:
            raise CutError(
                f"kv_heads: {groups} KV heads do not divide {heads} heads; choose heads a multiple of kv_heads"
            )
        queries = heads // groups
    _set(targets, kv, groups, f"{base}kv_heads")
    _set(targets, per, queries, f"{base}queries_per_kv")


def _required(named: Mapping[str, Dimension], name: str) -> Dimension:
    if name not in named:
        raise CutError(f"no dimension is called '{name}' in this graph; `graphclone show` lists what can be cut")
    return named[name]


def _set(targets: dict, dimension: Dimension | None, target: int, what: str) -> None:
    if dimension is None:
        raise CutError(f"no dimension is called '{what}' in this graph; `graphclone show` lists what can be cut")
    if target > dimension.size:
        raise CutError(
            f"{what}: {target} is more than the parent's {dimension.size}; growing is not supported, "
            f"give at most {dimension.size}"
        )
    if dimension.locked and target != dimension.size:
        raise CutError(f"cannot cut '{dimension.name}' ({dimension.size}): {dimension.locked}")
    if target < dimension.minimum:
        raise CutError(
            f"{what}: the graph picks the top {dimension.minimum} of '{dimension.name}', so it must keep that many"
        )
    before = targets.get(dimension.name)
    if before is not None and before[1] != target:
        raise CutError(
            f"'{dimension.name}' is one dimension for several blocks of this graph; "
            f"targets {before[1]} and {target} differ, give the same number everywhere"
        )
    targets[dimension.name] = (dimension, target)


class _Ranker:
    """Choose indices of a dimension, atom by atom, by a metric."""

    def __init__(self, metric: str, parent: Model, stats: Statistics | None, context: Context):
        self.metric = metric
        self.parent = parent
        self.stats = stats
        self.context = context

    def choose(self, dimension: Dimension, target: int) -> tuple[int, ...]:
        """Return the kept positions along the dimension's full axis."""
        axis = find(dimension.axes[0])
        asked = self.context.analysis.typing.steps
        steps = atom_steps(asked)
        counts = allocate(axis, target, steps)
        if counts is None:
            step = f"{asking(axis, asked)} takes steps of {dimension.step} alone"
            reason = _structure(axis) if allocate(axis, target) is None else step
            raise CutError(f"'{dimension.name}' cannot have size {target}: {reason}{_nearest(axis, target, steps)}")
        picks = {
            id(leaf): self._leaf(dimension, leaf, counts[id(leaf)])
            for leaf in free_leaves(axis)
            if counts[id(leaf)] != leaf.size[0]
        }
        kept = Cut(picks, (), {}, ()).picks(axis)
        return tuple(int(i) for i in kept)

    def _leaf(self, dimension: Dimension, leaf: Axis, count: int) -> np.ndarray:
        if self.metric == "obs" and (reading := self._one_reader(dimension)) is not None:
            return self._together(reading, leaf, count)
        scores = None if self.metric in UNMEASURED else self._scores(dimension, leaf)
        kept = np.asarray(select(self.metric, leaf.size[0], count, scores=scores, seed=self._seed(dimension)))
        if scores is not None:
            self.context.rankings.append(Ranking(dimension.name, self.metric, scores, kept))
        return kept

    def _seed(self, dimension: Dimension) -> int:
        return self.context.seed * 1_000_003 + sum(map(ord, dimension.name))

    def _one_reader(self, dimension: Dimension) -> Reading | None:
        """Return the only place that reads a dimension, where a matrix of real numbers does."""
        found = self.context.readings[dimension.name]
        alone = len(found) == 1 and dimension.role != "hidden" and self._rows(found[0]) is not None
        return found[0] if alone else None

    def _rows(self, reading: Reading) -> np.ndarray | None:
        """Return the weights that read each position, [positions, all others]; None where they are no real numbers."""
        weight = self.parent.weights[reading.weight] if reading.weight is not None else None
        key = axis_key(reading.axis)
        along = next((i for i, axis in enumerate(reading.weight_axes) if axis_key(axis) == key), None)
        if weight is None or along is None or not is_float(weight.onnx_dtype):
            return None
        return np.moveaxis(weight.load().astype(np.float64), along, 0).reshape(reading.axis.size[0], -1)

    def _together(self, reading: Reading, leaf: Axis, count: int) -> np.ndarray:
        """Choose indices of an atom as a set, by the second moments of what carries it."""
        moment = Moment(reading.tap.tensor, reading.tap.axis)
        second = self.context.measure(self.parent, (), (moment,)).second_moment(moment)
        positions = positions_of(reading.axis, leaf)
        groups = [np.flatnonzero(positions == index) for index in range(leaf.size[0])]
        return choose_by_obs(second, self._rows(reading), groups, count)

    def _scores(self, dimension: Dimension, leaf: Axis) -> np.ndarray:
        if self.stats is None:
            raise InputError(
                f"importance by '{self.metric}' is measured by calibration; "
                f"give samples (--data) or statistics (--stats), or choose one of {', '.join(UNMEASURED)}"
            )
        total = np.zeros(leaf.size[0])
        for reading in self.context.readings[dimension.name]:
            scores = onto_leaf(self._vector(dimension, reading), reading.axis, leaf)
            if self.metric == "output_aware" and dimension.role == "hidden":
                scores = scores / max(scores.sum(), 1e-30)
            total += scores
        return total

    def _vector(self, dimension: Dimension, reading: Reading) -> np.ndarray:
        if self.metric != "output_aware":
            return METRICS[self.metric](self.stats, reading.tap)
        energy = np.sqrt(self.stats.mean_square(reading.tap))
        rows = None if dimension.role == "hidden" else self._rows(reading)
        return energy if rows is None else energy * np.sqrt((rows**2).sum(axis=1))


def allocate(axis: Axis, target: int, steps: Mapping[int, int] = {}) -> dict[int, int] | None:
    """Return how many indices each atom keeps so that the axis has the target size; None where none fits.

    steps: {id of an atom: what its count must be a multiple of}. A sum of parts (rotary pairs, an unrotated rest) is
    cut in proportion; of a product the outermost factor that divides is cut.
    """
    axis = find(axis)
    if axis.size[0] == target:
        return {id(leaf): leaf.size[0] for leaf in leaves(axis)}
    if axis.kind == "atom":
        fits = axis.lock is None and 0 < target <= axis.size[0] and target % steps.get(id(axis), 1) == 0
        return {id(axis): target} if fits else None
    if axis.kind == "product":
        for part in map(find, axis.parts):
            rest = axis.size[0] // part.size[0]
            if target % rest == 0 and (inner := allocate(part, target // rest, steps)) is not None:
                return {id(leaf): leaf.size[0] for leaf in leaves(axis)} | inner
        return None
    return _allocate_sum(axis, target, steps)


def _allocate_sum(axis: Axis, target: int, steps: Mapping[int, int]) -> dict[int, int] | None:
    kept = {id(leaf): leaf.size[0] for leaf in leaves(axis)}
    distinct = list({id(leaf): leaf for leaf in _outermost(axis)}.values())
    repeats = [_multiplicity(axis, leaf) for leaf in distinct]
    whole = axis.size[0] - sum(leaf.size[0] * times for leaf, times in zip(distinct, repeats, strict=True))

    def search(position: int, left: int, counts: list[int]) -> list[int] | None:
        if position == len(distinct):
            return counts if left == 0 else None
        leaf, times = distinct[position], repeats[position]
        ideal = leaf.size[0] * target / axis.size[0]
        step = steps.get(id(leaf), 1)
        for count in sorted(range(step, leaf.size[0] + 1, step), key=lambda c: (abs(c - ideal), c)):
            if (
                count * times <= left
                and (found := search(position + 1, left - count * times, [*counts, count])) is not None
            ):
                return found
        return None

    found = search(0, target - whole, [])
    return None if found is None else kept | {id(leaf): count for leaf, count in zip(distinct, found, strict=True)}


def _outermost(axis: Axis) -> Iterator[Axis]:
    """Yield the atoms whose counts make an axis smaller: those that are free, of a product those of one factor."""
    axis = find(axis)
    if axis.kind == "atom":
        yield from [axis] if axis.lock is None and axis.size[0] > 1 else []
    elif axis.kind == "sum":
        for part in axis.parts:
            yield from _outermost(part)
    else:
        yield from next((found for part in axis.parts if (found := list(_outermost(part)))), [])


def _multiplicity(axis: Axis, leaf: Axis) -> int:
    """Return how many positions of an axis one index of an atom takes."""
    axis = find(axis)
    if axis is leaf:
        return 1
    if axis.kind == "atom":
        return 0
    if axis.kind == "sum":
        return sum(_multiplicity(part, leaf) for part in axis.parts)
    inside = [_multiplicity(part, leaf) for part in axis.parts]
    where = next((i for i, m in enumerate(inside) if m), None)
    if where is None:
        return 0
    others = [find(part).size[0] for i, part in enumerate(axis.parts) if i != where]
    return inside[where] * int(np.prod(others))


def _nearest(axis: Axis, target: int, steps: Mapping[int, int]) -> str:
    """Say which sizes next to a target an axis can have."""
    ways = (range(target - 1, 0, -1), range(target + 1, axis.size[0] + 1))
    found = [next((size for size in way if allocate(axis, size, steps)), None) for way in ways]
    return "; give " + " or ".join(str(size) for size in found if size is not None)


def _structure(axis: Axis) -> str:
    from graphclone.axes.axis import describe

    return f"the graph builds it as {describe(axis)} and repeated parts are cut alike"
