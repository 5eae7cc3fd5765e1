"""Finish: a child is shown, checked, and only then written."""

from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.atomic import check_target
from graphclone.cli.difference import print_difference
from graphclone.cli.reports import failure, summary
from graphclone.cli.terminal import err, out
from graphclone.errors import CheckFailed, InputError
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.report import Origin, write_report
from graphclone.verify.report import Report

UNWRITTEN = "nothing was written; --no-verify writes the child unchecked"


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
    must_run: bool = True,
    page: Path | None = None,
    origin: Origin = Origin(),  # noqa: B008
) -> None:
    """Print what changed, verify the child, and write it; nothing is written where a check fails.

    analysis: of the parent. data: samples for the checks. must_run: whether a model that onnxruntime cannot run is an
    error; else it is written with a warning. page: the HTML report, which tells what `origin` knows.
    Raises: CheckFailed.
    """
    print_difference(parent, child, plan, analysis)
    found = None
    if check:
        found = _check(parent, child, plan, analysis, data, must_run)
    with err().status(f"writing {output}"):
        child.save(output)
    if plan_out is not None:
        plan.save(plan_out)
        out().print(f"plan      {plan_out}", soft_wrap=True)
    if page is not None:
        write_report(page, parent, child, plan, analysis, origin, found)
        out().print(f"report    {page}", soft_wrap=True)
    out().print(f"written   {output}", soft_wrap=True)


def _check(
    parent: Model, child: Model, plan: Plan, analysis: Analysis, data: Path | None, must_run: bool
) -> Report | None:
    """Return what was found; None where onnxruntime runs neither parent nor child and that is no error."""
    from graphclone.cli.probes import probes_of_child, runs
    from graphclone.verify import verify

    try:
        with err().status("verifying the child"):
            report = verify(child, data=probes_of_child(data, parent, child, plan), parent=parent, plan=plan)
    except InputError as error:
        if runs(parent, analysis):
            raise CheckFailed(f"onnxruntime runs the parent, but not the child: {error}\n{UNWRITTEN}") from error
        if must_run:
            raise InputError(f"{error}\n{UNWRITTEN}") from error
        err().print(f"warning: the child is not verified, because {error}", style="yellow", soft_wrap=True)
        return None
    if not report.ok:
        raise CheckFailed(f"{failure(report)}\n{UNWRITTEN}")
    out().print(summary(report))
    return report
