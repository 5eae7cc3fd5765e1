"""Job: a pipeline run from samples to the written child."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from graphclone.analysis import Analysis, analyse
from graphclone.calibration.data import Batches, open_data
from graphclone.calibration.statistics import Statistics
from graphclone.cli.difference import print_difference
from graphclone.cli.finish import check_outputs, finish
from graphclone.cli.measuring import measured
from graphclone.cli.terminal import err, out
from graphclone.importance import BLOCK_RULES, METRICS, Metric
from graphclone.model import Model
from graphclone.pipeline import Context, Pipeline
from graphclone.report import Origin, write_report
from graphclone.subclone import RECIPES, recipe_text


@dataclass(frozen=True)
class Samples:
    """Where activations come from: data to measure now, or statistics that were measured before."""

    data: Path | None = None
    stats: Path | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    @property
    def flag(self) -> tuple[str, ...]:
        """How a command line names them, without the folder."""
        given = {"--data": self.data, "--stats": self.stats}
        return next(((flag, path.name) for flag, path in given.items() if path is not None), ())

    def batches(self, parent: Model) -> Batches | None:
        """Return the batches for passes that run models themselves."""
        chosen = {name: self.choices.get(name) for name in ("batch_size", "batches")}
        return None if self.data is None else open_data(self.data, parent, **chosen)

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
    """A parent, samples, and what to do with the child.

    verified: whether the child is checked. native_constants: as in `surgery.apply`. page: the HTML report.
    """

    parent: Model
    samples: Samples
    seed: int
    output: Path | None
    plan_out: Path | None = None
    verified: bool = True
    dry_run: bool = False
    native_constants: bool = False
    page: Path | None = None

    @cached_property
    def analysis(self) -> Analysis:
        return analyse(self.parent)

    def check(self, targets: Mapping[str, object]) -> None:
        """Raise what the targets would raise, before samples are measured: by a plan that needs none."""
        recipe_text(**targets)
        chosen = RECIPES[targets["recipe"]]
        by, blocks_by = targets["by"] or chosen.by, targets["blocks_by"] or chosen.blocks_by
        unmeasured = {
            "recipe": "paper",
            "by": _unmeasured(METRICS, by),
            "blocks_by": "first" if blocks_by == "search" else _unmeasured(BLOCK_RULES, blocks_by),
            "rescale": "none" if targets["rescale"] == "norm_gain" else targets["rescale"],
        }
        steps = Pipeline.parse(recipe_text(**{**targets, **unmeasured}))
        if self.native_constants and unmeasured["by"] == by:  # it depends on which indices stay
            steps.run(self.parent, analysis=self.analysis, native_constants=True)
        else:
            steps.plan(self.parent, None, Context(self.parent, self.analysis))

    def run(self, pipeline: str) -> None:
        """Measure, decide, cut, verify and write."""
        steps = Pipeline.parse(pipeline)
        check_outputs(None if self.dry_run else self.output, self.plan_out, self.page)
        stats = self.samples.read(self.parent, self.analysis)
        result = steps.run(
            self.parent,
            stats,
            data=self.samples.batches(self.parent),
            seed=self.seed,
            progress=err().is_terminal,
            provider=self.samples.choices.get("provider", "auto"),
            mask=self.samples.choices.get("mask"),
            analysis=self.analysis,
            native_constants=self.native_constants,
        )
        origin = Origin(result.rankings, result.notes, self.seed, stats, steps.text(), self.samples.flag)
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
                page=self.page,
                origin=origin,
            )
            return
        print_difference(self.parent, result.child, result.plan, self.analysis)
        if self.plan_out is not None:
            result.plan.save(self.plan_out)
            out().print(f"plan      {self.plan_out}", soft_wrap=True)
        if self.page is not None:
            write_report(self.page, self.parent, result.child, result.plan, self.analysis, origin)
            out().print(f"report    {self.page}", soft_wrap=True)
        out().print("dry run: no model was written")


def _unmeasured(metrics: Mapping[str, Metric], name: str) -> str:
    """Return a metric that needs no samples for one that does; an unknown name is left for the pass to refuse."""
    return "first" if name in metrics and metrics[name].measured else name
