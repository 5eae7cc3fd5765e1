"""Job: a pipeline run from samples to the written child."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from graphclone.analysis import Analysis, analyse
from graphclone.calibration import Statistics
from graphclone.cli.difference import print_difference
from graphclone.cli.finish import check_outputs, finish
from graphclone.cli.measuring import measured
from graphclone.cli.terminal import out
from graphclone.errors import InputError
from graphclone.importance import BLOCK_RULES, METRICS
from graphclone.model import Model
from graphclone.pipeline import Context, Pipeline
from graphclone.subclone import recipe


@dataclass(frozen=True)
class Samples:
    """Where activations come from: data to measure now, or statistics that were measured before."""

    data: Path | None = None
    stats: Path | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    def read(self, parent: Model, analysis: Analysis) -> Statistics | None:
        """Return statistics of the parent, or None where neither is given."""
        if self.stats is not None:
            stats = Statistics.load(self.stats)
            stats.check(parent)
            return stats
        if self.data is None:
            return None
        stats = measured(parent, self.data, analysis, **self.choices)
        if stats.interrupted:
            raise KeyboardInterrupt
        return stats


@dataclass(frozen=True)
class Job:
    """A parent, samples, and what to do with the child. check: whether to verify it."""

    parent: Model
    samples: Samples
    seed: int
    output: Path | None
    plan_out: Path | None = None
    verified: bool = True
    dry_run: bool = False

    @cached_property
    def analysis(self) -> Analysis:
        return analyse(self.parent)

    def check(self, targets: Mapping[str, object]) -> None:
        """Raise what the targets would raise, before samples are measured: by a plan that needs none."""
        _known(targets["by"], METRICS, "importance metric", "--by")
        _known(targets["blocks_by"], BLOCK_RULES, "metric for blocks", "--blocks-by")
        unmeasured = {**targets, "by": "first", "blocks_by": "first", "rescale": "none"}
        Pipeline.parse(recipe(**unmeasured)).plan(self.parent, None, Context(self.parent, self.analysis))

    def run(self, pipeline: str) -> None:
        """Measure, decide, cut, verify and write."""
        steps = Pipeline.parse(pipeline)
        check_outputs(None if self.dry_run else self.output, self.plan_out)
        stats = self.samples.read(self.parent, self.analysis)
        result = steps.run(self.parent, stats, data=self.samples.data, seed=self.seed, analysis=self.analysis)
        for note in result.notes:
            out().print(f"note      {note}", soft_wrap=True)
        if not self.dry_run:
            finish(
                self.parent,
                result.child,
                result.plan,
                self.analysis,
                self.output,
                data=self.samples.data,
                check=self.verified,
                plan_out=self.plan_out,
            )
            return
        print_difference(self.parent, result.child, result.plan, self.analysis)
        if self.plan_out is not None:
            result.plan.save(self.plan_out)
            out().print(f"plan      {self.plan_out}", soft_wrap=True)
        out().print("dry run: no model was written")


def _known(name: str, names, what: str, flag: str) -> None:
    if name not in names:
        raise InputError(f"no {what} is called '{name}'; {flag} takes {', '.join(names)}")
