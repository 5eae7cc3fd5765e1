"""Depth: which blocks stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphclone.blocks import Stack
from graphclone.calibration.statistics import Statistics
from graphclone.errors import CutError, InputError
from graphclone.importance import BLOCK_RULES, Ranking, choose_blocks
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.taps import spans
from passes.targets import target_of

MEASURED = {"relative_magnitude", "block_influence"}


@dataclass(frozen=True)
class Depth:
    """Keep `layers` blocks of each stack by a rule, or the listed `blocks`.

    layers: a number, or {stack: number}. blocks: a list, or {stack: list}.
    by: middle (remove from the middle: arXiv 2312.09299, section 4.2), relative_magnitude (||f(x)|| / ||x + f(x)||,
    the same paper, figure 2), block_influence (1 - cos(x, x + f(x)): ShortGPT, arXiv 2403.03853), uniform, first.

    Example:
        depth{layers=8 by=middle}
    """

    name = "depth"
    layers: int | Mapping[str, int] | None = None
    blocks: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    by: str = "middle"

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if self.layers is None and self.blocks is None:
            return plan
        stacks = context.analysis.stacks
        if not stacks:
            raise CutError("this graph has no repeated blocks to choose from, so its depth cannot be cut")
        kept = dict(plan.blocks)
        for stack in stacks:
            chosen = self._listed(stack, stacks)
            counted = target_of(self.layers, stack, stacks, "layers")
            if chosen is not None and counted is not None:
                raise CutError("layers counts the blocks to keep and blocks lists them; give one of the two")
            if chosen is None:
                chosen = self._counted(stack, counted, stats, context)
            if chosen is not None:
                kept["" if len(stacks) == 1 else stack.prefix.rstrip(".")] = chosen
        return plan.with_(blocks=kept)

    def _listed(self, stack: Stack, stacks: Sequence[Stack]) -> tuple[int, ...] | None:
        if self.blocks is None:
            return None
        if isinstance(self.blocks, Mapping):
            names = {s.prefix.rstrip(".") for s in stacks}
            if unknown := set(self.blocks) - names:
                raise CutError(
                    f"blocks: no stack is called '{min(unknown)}'; the stacks are {', '.join(sorted(names))}"
                )
            listed = self.blocks.get(stack.prefix.rstrip("."))
            return None if listed is None else tuple(listed)
        if len(stacks) > 1:
            names = ", ".join(s.prefix.rstrip(".") for s in stacks)
            raise CutError(
                f"blocks: this model has several stacks ({names}); say which, as in {stacks[0].prefix.rstrip('.')}=0,2"
            )
        return tuple(self.blocks)

    def _counted(self, stack: Stack, count: int | tuple[int, ...] | None, stats, context) -> tuple[int, ...] | None:
        if count is None:
            return None
        if isinstance(count, tuple):
            raise CutError("layers is a number; to list blocks, give blocks")
        total = len(stack.blocks)
        if count > total:
            raise CutError(
                f"layers: {count} is more than the parent's {total}; growing is not supported, give at most {total}"
            )
        if self.by not in BLOCK_RULES:
            raise InputError(f"no block rule is called '{self.by}'; there are {', '.join(BLOCK_RULES)}")
        scores = None
        if self.by in MEASURED:
            if stats is None:
                raise InputError(
                    f"blocks by '{self.by}' are ranked by calibration; give --data or --stats, or use middle"
                )
            known = {span.name: span for span in spans(context.analysis)}
            chosen = [known[f"{stack.prefix}blocks.{block.index}"] for block in stack.blocks]
            scores = [stats.ratio(s) if self.by == "relative_magnitude" else 1 - stats.cosine(s) for s in chosen]
        kept = tuple(choose_blocks(self.by, total, count, scores))
        if scores is not None:
            context.rankings.append(Ranking(f"{stack.prefix}blocks", self.by, np.asarray(scores), np.asarray(kept)))
        return kept
