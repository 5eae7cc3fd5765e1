"""Search: which blocks or half blocks stay, by what the model then computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress

from graphclone.blocks import Half, Stack
from graphclone.calibration.data import open_data
from graphclone.calibration.session import open_session
from graphclone.calibration.statistics import Statistics
from graphclone.errors import CutError, InputError
from graphclone.gates import GATES, gated
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import half_names
from passes.outputs import compared_output
from passes.targets import target_of


@dataclass(frozen=True)
class Search:
    """Drop what changes the outputs least, greedily, then by an evolutionary search over swaps.

    layers: blocks to keep, a number or {stack: number}. halves: half blocks to drop instead, a number (BlockPruner,
    arXiv 2406.10594). generations, offspring: of the evolutionary search after the greedy one (EvoPress, arXiv
    2410.14649). tokens: how much of the samples is run per candidate.
    What is minimised is KL(parent || child) of the logits, or the relative squared error where the outputs are
    features.

    Example:
        search{layers=6 generations=4}
    """

    name = "search"
    layers: int | Mapping[str, int] | None = None
    halves: int | None = None
    generations: int = 0
    offspring: int = 8
    tokens: int = 2048

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if (self.layers is None) == (self.halves is None):
            raise InputError("search: give layers=N blocks to keep, or halves=N half blocks to drop")
        if context.data is None:
            raise InputError("search runs the model on samples; give them with --data")
        stacks = context.analysis.stacks
        if not stacks:
            raise CutError("this graph has no repeated blocks to choose from, so its depth cannot be cut")
        units = _units(stacks, self.halves is not None)
        bench = _Bench(parent, context, [half for unit in units for half in unit.halves], self.tokens)
        kept, blocks, drop = set(range(len(units))), dict(plan.blocks), plan.drop
        with Progress(console=Console(stderr=True), disable=not context.progress) as progress:
            for group, count in self._groups(units, stacks):
                task = progress.add_task("searching", total=None)
                kept = _greedy(bench, units, kept, group, count, lambda t=task: progress.advance(t))
                kept = self._evolve(bench, units, kept, group, context.seed, lambda t=task: progress.advance(t))
        gone = [unit for i, unit in enumerate(units) if i not in kept]
        context.notes.append(
            f"search: dropped {', '.join(unit.name for unit in gone) or 'nothing'}; {bench.told(units, kept)}"
        )
        if self.halves is not None:
            return plan.with_(drop=(*drop, *(unit.name for unit in gone)))
        for stack in stacks:
            if target_of(self.layers, stack, stacks, "layers") is not None:
                stays = tuple(u.index for i, u in enumerate(units) if i in kept and u.stack == stack.prefix)
                blocks["" if len(stacks) == 1 else stack.prefix.rstrip(".")] = stays
        return plan.with_(blocks=blocks)

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
                costs[i] = bench.cost(units, kept - {i})
                tick()
        kept = kept - {min(costs, key=costs.get)}
    return kept


class _Bench:
    """One session with gates, some samples, and the parent's outputs on them."""

    def __init__(self, parent: Model, context: Context, halves: Sequence[Half], tokens: int):
        self.halves = list(halves)
        self.session = open_session(gated(parent, self.halves))
        self.feeds, seen = [], 0
        for batch in open_data(context.data, parent):
            self.feeds.append(batch.feeds)
            first = next(iter(batch.feeds.values()))
            seen += first.shape[0] * (first.shape[1] if first.ndim == 2 else 1)
            if seen >= tokens:
                break
        self.output, self.is_logits = compared_output(parent, context.analysis)
        if not self.output:
            raise CutError("this graph has no float output to compare")
        self.known: dict[tuple[bool, ...], float] = {}
        self.wanted = self._outputs([True] * len(self.halves))

    def _outputs(self, gates: Sequence[bool]) -> list[np.ndarray]:
        results = []
        for feeds in self.feeds:
            (value,) = self.session.run([self.output], {**feeds, GATES: np.array(gates)})
            results.append(_log_softmax(value) if self.is_logits else value.astype(np.float32))
        return results

    def cost(self, units: Sequence[_Unit], kept: set[int]) -> float:
        """Return how far the outputs are from the parent's with these units on."""
        on = {id(half) for i in kept for half in units[i].halves}
        gates = tuple(id(half) in on for half in self.halves)
        if gates not in self.known:
            pairs = list(zip(self.wanted, self._outputs(gates), strict=True))
            if self.is_logits:
                total = sum(float((np.exp(p) * (p - q)).sum()) for p, q in pairs)
                self.known[gates] = total / sum(p[..., 0].size for p, _ in pairs)
            else:
                energy = sum(float((p.astype(np.float64) ** 2).sum()) for p, _ in pairs)
                self.known[gates] = sum(float(((p - q).astype(np.float64) ** 2).sum()) for p, q in pairs) / energy
        return self.known[gates]

    def told(self, units: Sequence[_Unit], kept: set[int]) -> str:
        what = "KL to the parent" if self.is_logits else "relative squared error"
        return f"{what} {self.cost(units, kept):.4g} after {len(self.known)} candidates"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
