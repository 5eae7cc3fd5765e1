"""`graphclone verify`: check the tool's understanding of a model, or a child against its parent."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("verify")
@options.model
@options.data
@click.option("--parent", metavar="PARENT", type=options.FILE, help="The model that MODEL was cut from.")
@click.option("--plan", "plan_path", metavar="PLAN", type=options.FILE, help="The plan that made it.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@options.no_retie
@click.pass_context
def command(
    context: click.Context,
    model: Path,
    data: Path | None,
    parent: Path | None,
    plan_path: Path | None,
    as_json: bool,
    no_retie: bool,
) -> None:
    """Check MODEL; with --parent and --plan, check that it is what PLAN makes of PARENT.

    Exit code 1 says that a check failed. Inputs are made up where --data gives none.
    """
    if (parent is None) != (plan_path is None):
        raise click.UsageError(
            "--parent and --plan go together: the plan says which slices of the parent the child has"
        )
    from graphclone.cli.description import write_json
    from graphclone.cli.probes import probes
    from graphclone.cli.reports import print_report
    from graphclone.cli.terminal import err
    from graphclone.model import load
    from graphclone.plan import Plan
    from graphclone.verify import verify

    subject = load(model, retie=not no_retie)
    original = None if parent is None else load(parent, retie=not no_retie)
    plan = None if plan_path is None else Plan.load(plan_path)
    with err().status("verifying"):
        report = verify(subject, data=probes(data, subject), parent=original, plan=plan)
    if as_json:
        write_json(report.to_json())
    else:
        print_report(report)
    context.exit(0 if report.ok else 1)
