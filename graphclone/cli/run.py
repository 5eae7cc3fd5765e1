"""`graphclone run`: a pipeline of passes, from text or a file, on a model."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("run")
@click.argument("pipeline")
@options.model
@options.output("OUT", "The child (.onnx).")
@options.data
@options.stats
@click.option("--plan-out", metavar="PLAN", type=options.FILE, help="Write the decisions to a plan file too.")
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="For random choices.")
@options.no_verify
@options.provider
@options.batches
@options.batch_size
@options.mask
@options.no_retie
def command(
    pipeline: str,
    model: Path,
    output: Path,
    data: Path | None,
    stats: Path | None,
    plan_out: Path | None,
    seed: int,
    no_verify: bool,
    no_retie: bool,
    **choices,
) -> None:
    """Run PIPELINE on MODEL.

    PIPELINE is text, as in 'depth{layers=8 by=middle},width{hidden=384},rescale{mode=paper}', or a file that holds
    it, or a .toml file with [[pass]] tables. `graphclone passes` lists the passes and their options.
    """
    if data is not None and stats is not None:
        raise click.UsageError("give --data or --stats, not both")
    from graphclone.cli.job import Job, Samples
    from graphclone.model import load
    from graphclone.pipeline import Pipeline

    steps = Pipeline.load(pipeline)
    Job(load(model, retie=not no_retie), Samples(data, stats, choices), seed, output, plan_out, not no_verify).run(
        steps.text()
    )
