"""`graphclone apply`: cut what a plan names, nothing else."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("apply")
@click.argument("plan_path", metavar="PLAN", type=options.FILE)
@options.model
@options.output("OUT", "The child (.onnx).")
@options.report
@options.native_constants
@options.no_verify
@options.no_retie
def command(
    plan_path: Path,
    model: Path,
    output: Path,
    page: Path | None,
    native_constants: bool,
    no_verify: bool,
    no_retie: bool,
) -> None:
    """Apply PLAN to MODEL: cut what it names, nothing else.

    A plan of another model is applied where its names fit, with a warning: so one plan cuts an encoder and a decoder
    that lie in two files.
    """
    from graphclone.analysis import analyse
    from graphclone.cli.finish import check_outputs, finish
    from graphclone.cli.foreign import fitted
    from graphclone.model import load
    from graphclone.plan import Plan
    from graphclone.surgery import apply

    check_outputs(output, page)
    plan = Plan.load(plan_path)
    parent = load(model, retie=not no_retie)
    analysis = analyse(parent)
    if plan.parent and plan.parent != parent.fingerprint:
        plan = fitted(plan, analysis, plan_path, model)
    child = apply(parent, plan, analysis, native_constants)
    finish(parent, child, plan, analysis, output, check=not no_verify, must_run=False, page=page)
