"""Finish: a child is shown, checked, and only then written."""

from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.atomic import check_target
from graphclone.cli.difference import print_difference
from graphclone.cli.reports import failure, summary
from graphclone.cli.terminal import err, out
from graphclone.errors import CheckFailed
from graphclone.model import Model
from graphclone.plan import Plan


def check_outputs(*paths: Path | None) -> None:
    """Raise InputError where a file could not be written, before any long work begins."""
    for path in paths:
        if path is not None:
            check_target(path)


def finish(
    parent: Model,
    child: Model,
    plan: Plan,
    analysis: Analysis,
    output: Path,
    *,
    data: Path | None = None,
    check: bool = True,
    plan_out: Path | None = None,
) -> None:
    """Print what changed, verify the child, and write it; nothing is written where a check fails.

    analysis: of the parent. data: samples for the checks. Raises: CheckFailed.
    """
    print_difference(parent, child, plan, analysis)
    if check:
        from graphclone.verify import verify

        with err().status("verifying the child"):
            report = verify(child, data=data, parent=parent, plan=plan)
        if not report.ok:
            raise CheckFailed(f"{failure(report)}\nnothing was written; --no-verify writes it unchecked")
        out().print(summary(report))
    with err().status(f"writing {output}"):
        child.save(output)
    if plan_out is not None:
        plan.save(plan_out)
        out().print(f"plan      {plan_out}", soft_wrap=True)
    out().print(f"written   {output}", soft_wrap=True)
