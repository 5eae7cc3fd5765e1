"""Search: which blocks or half blocks stay, by what the model then computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress

from graphclone.analysis import Analysis
from graphclone.blocks import Half, Stack
from graphclone.calibration.data import open_data
from graphclone.calibration.masks import chosen_masks, sense
from graphclone.calibration.session import open_session, resolve_provider, runnable
from graphclone.calibration.statistics import Statistics
from graphclone.dimensions import axis_key
from graphclone.errors import CutError, InputError
from graphclone.gates import GATES, gated
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import half_names
from passes.depth import Depth
from passes.outputs import compared_output, mask_of
from passes.targets import target_of

LEADING = 2
"""At least so many candidates of a step are run on all samples."""
NUMBERS = 2**27
"""So many of the parent's outputs are kept to compare with; where there are more, every k-th row counts."""


@dataclass(frozen=True)
class Search:
    """Drop what changes the outputs least, greedily, then by an evolutionary search over swaps.

    Each greedy step runs every candidate on a quarter of the samples, and the best quarter of them on all.
    layers: blocks to keep, a number or {stack: number}. halves: half blocks to drop instead, a number (BlockPruner,
    arXiv 2406.10594). generations, offspring: of the evolutionary search after the greedy one (EvoPress, arXiv
    2410.14649). tokens: how much of the samples is run at most per candidate. otherwise: the rule of `depth` by which
    blocks are chosen where no branch can be switched off.
    What is minimised is KL(parent || child) of the logits, or the relative squared error where the outputs are
    features, over real tokens.

    Example:
        search{layers=6 generations=4}
    """

    name = "search"
    layers: int | Mapping[str, int] | None = None
    halves: int | None = None
    generations: int = 0
    offspring: int = 8
    tokens: int = 8192
    otherwise: str | None = None

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if (self.layers is None) == (self.halves is None):
            raise InputError("search: give layers=N blocks to keep, or halves=N half blocks to drop")
        if self.otherwise is not None and self.layers is None:
            raise InputError("search: otherwise names a rule of depth, which drops whole blocks; leave it out")
        stacks = context.analysis.stacks
        if not stacks:
            raise CutError("this graph has no repeated blocks to choose from, so its depth cannot be cut")
        units = _units(stacks, self.halves is not None)
        groups = self._groups(units, stacks)
        kept = set(range(len(units)))
        if any(count for _, count in groups):
            if context.data is None:
                raise InputError("search runs the model on samples; give them with --data")
            try:
                bench = _Bench(parent, context, [half for unit in units for half in unit.halves], self.tokens)
            except CutError as error:
                if self.otherwise is None:
                    raise
                context.notes.append(f"search: {error}; blocks stay by the rule '{self.otherwise}'")
                return Depth(layers=self.layers, by=self.otherwise).run(parent, plan, stats, context)
            kept = self._searched(bench, units, groups, context)
        if self.halves is not None:
            return plan.with_(drop=(*plan.drop, *(unit.name for i, unit in enumerate(units) if i not in kept)))
        blocks = dict(plan.blocks)
        for stack in stacks:
            if target_of(self.layers, stack, stacks, "layers") is not None:
                stays = tuple(u.index for i, u in enumerate(units) if i in kept and u.stack == stack.prefix)
                blocks["" if len(stacks) == 1 else stack.prefix.rstrip(".")] = stays
        return plan.with_(blocks=blocks)

    def _searched(self, bench: "_Bench", units: Sequence["_Unit"], groups, context: Context) -> set[int]:
        """Return which units stay."""
        kept = set(range(len(units)))
        with Progress(console=Console(stderr=True), disable=not context.progress) as progress:
            for group, count in groups:
                task = progress.add_task("searching", total=None)
                kept = _greedy(bench, units, kept, group, count, lambda t=task: progress.advance(t))
                kept = self._evolve(bench, units, kept, group, context.seed, lambda t=task: progress.advance(t))
        gone = ", ".join(unit.name for i, unit in enumerate(units) if i not in kept)
        context.notes.append(f"search: dropped {gone}; {bench.told(units, kept)}")
        return kept

    def _groups(self, units: Sequence["_Unit"], stacks: Sequence[Stack]) -> list[tuple[list[int], int]]:
        """Return (units, how many of them go) pairs: a pair per stack for blocks, one over all for half blocks."""
        if self.halves is not None:
            if not 0 <= self.halves < len(units):
                raise CutError(f"search: {self.halves} of {len(units)} half blocks cannot be dropped; give less")
            return [(list(range(len(units))), self.halves)]
        groups = []
        for stack in stacks:
            count = target_of(self.layers, stack, stacks, "layers")
            if count is None:
                continue
            if not isinstance(count, int) or count > len(stack.blocks):
                raise CutError(
                    f"layers: give a number from 1 to {len(stack.blocks)}, the parent's; growing is not supported"
                )
            inside = [i for i, unit in enumerate(units) if unit.stack == stack.prefix]
            groups.append((inside, len(inside) - count))
        return groups

    def _evolve(self, bench, units, kept: set[int], group: list[int], seed: int, tick) -> set[int]:
        """Swap dropped for kept units at random, and keep the best, for some generations."""
        random, best = np.random.default_rng(seed), bench.cost(units, kept)
        for _ in range(self.generations):
            for _ in range(self.offspring):
                inside, outside = [i for i in group if i in kept], [i for i in group if i not in kept]
                if not inside or not outside:
                    return kept
                candidate = (kept - {int(random.choice(inside))}) | {int(random.choice(outside))}
                cost = bench.cost(units, candidate)
                tick()
                if cost < best:
                    kept, best = candidate, cost
        return kept


@dataclass(frozen=True)
class _Unit:
    """What is switched together: a block or a half block."""

    name: str
    stack: str
    index: int
    halves: tuple[Half, ...]


def _units(stacks: Sequence[Stack], by_half: bool) -> list[_Unit]:
    if by_half:
        return [
            _Unit(name, s.prefix, b.index, (half,)) for s in stacks for b in s.blocks for name, half in half_names(s, b)
        ]
    return [_Unit(f"{s.prefix}blocks.{b.index}", s.prefix, b.index, b.halves) for s in stacks for b in s.blocks]


def _greedy(bench: "_Bench", units, kept: set[int], group: list[int], count: int, tick) -> set[int]:
    for _ in range(count):
        costs = {}
        for i in group:
            if i in kept:
                costs[i] = bench.cost(units, kept - {i}, few=True)
                tick()
        leading = sorted(costs, key=costs.get)[: max(LEADING, len(costs) // 4)]
        kept = kept - {min(leading, key=lambda i: bench.cost(units, kept - {i}))}
    return kept


class _Bench:
    """One session with gates, some samples, and the parent's outputs on them."""

    def __init__(self, parent: Model, context: Context, halves: Sequence[Half], tokens: int):
        analysis, provider = context.analysis, resolve_provider(context.provider)
        self.halves = list(halves)
        self.output, self.is_logits = compared_output(parent, analysis)
        if not self.output:
            raise CutError("this graph has no float output to compare")
        stream = self.halves[0].exit
        parent = runnable(parent, provider)
        self.session = open_session(gated(parent, self.halves), provider=provider, outputs=[stream])
        self.known: dict[tuple[int, tuple[bool, ...]], float] = {}
        self.feeds, self.wanted, self.rows = [], [], []
        masks: dict[str, bool] = {}
        left = tokens
        for batch in open_data(context.data, parent):
            if not self.feeds:
                masks = {name: sense(parent, name) for name in chosen_masks(parent, context.mask, batch.feeds)}
            value, states = self._run(batch.feeds, [True] * len(self.halves), stream)
            mask = mask_of(analysis.typing.types[self.output][:-1], masks, analysis)
            real = np.ones(value.shape[:-1], bool) if mask is None else (batch.feeds[mask] != 0) == masks[mask]
            here = states.size // _width(analysis, stream, states)
            every = -(-value.size * -(-tokens // here) // NUMBERS)
            self.feeds.append(batch.feeds)
            self.rows.append(np.flatnonzero(real)[::every])
            self.wanted.append(self._at(value, self.rows[-1]))
            left -= here
            if left <= 0:
                break

    def _run(self, feeds: Mapping[str, np.ndarray], gates: Sequence[bool], *more: str) -> list[np.ndarray]:
        """Return the output and other tensors."""
        return self.session.run([self.output, *more], {**feeds, GATES: np.array(gates)})

    def _at(self, value: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return some rows of the output, as log probabilities where it is of logits."""
        value = value.reshape(-1, value.shape[-1])[rows].astype(np.float32)
        return _log_softmax(value) if self.is_logits else value

    def cost(self, units: Sequence["_Unit"], kept: set[int], few: bool = False) -> float:
        """Return how far the outputs are from the parent's with these units on, by a `few` of the batches or all."""
        on = {id(half) for i in kept for half in units[i].halves}
        gates = tuple(id(half) in on for half in self.halves)
        count = -(-len(self.feeds) // 4) if few else len(self.feeds)
        if (count, gates) not in self.known:
            apart = energy = 0.0
            for feeds, p, rows in list(zip(self.feeds, self.wanted, self.rows, strict=True))[:count]:
                q = self._at(self._run(feeds, gates)[0], rows)
                terms = np.exp(p) * (p - q) if self.is_logits else (p - q).astype(np.float64) ** 2
                apart += float(terms.sum(dtype=np.float64))
                energy += len(p) if self.is_logits else float((p.astype(np.float64) ** 2).sum())
            self.known[count, gates] = apart / energy
        return self.known[count, gates]

    def told(self, units: Sequence[_Unit], kept: set[int]) -> str:
        what = "KL to the parent" if self.is_logits else "relative squared error"
        return f"{what} {self.cost(units, kept):.4g} after {len({gates for _, gates in self.known})} candidates"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _width(analysis: Analysis, stream: str, states: np.ndarray) -> int:
    """Return how many numbers a token has at a point of the stream."""
    widths = {axis_key(axis) for d in analysis.dimensions if d.role == "hidden" for axis in d.axes}
    axes = analysis.typing.types[stream]
    return states.shape[next((i for i, axis in enumerate(axes) if axis_key(axis) in widths), -1)]
