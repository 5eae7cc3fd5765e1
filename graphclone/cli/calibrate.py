"""`graphclone calibrate`: measure activations once, for every later command."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("calibrate")
@options.model
@click.option("--data", metavar="DATA", type=options.FILE, required=True, help="Samples; see above.")
@options.output("STATS", "The statistics (.safetensors).")
@options.provider
@options.batches
@options.batch_size
@options.mask
@options.no_retie
@click.pass_context
def command(context: click.Context, model: Path, data: Path, output: Path, no_retie: bool, **choices) -> None:
    """Run MODEL over samples with onnxruntime and save the statistics of its activations.

    DATA is a .npz or .safetensors file with one array per graph input, axis 0 the sample, or a folder whose files are
    one ready batch each. Ctrl-C keeps what was counted so far.
    """
    from graphclone.cli.exits import INTERRUPTED
    from graphclone.cli.finish import check_outputs
    from graphclone.cli.measuring import measured
    from graphclone.cli.terminal import err, out
    from graphclone.model import load

    check_outputs(output)
    stats = measured(load(model, retie=not no_retie), data, **choices)
    stats.save(output)
    out().print(f"written   {output}", soft_wrap=True)
    if stats.interrupted:
        err().print("interrupted; the statistics hold what was counted until then")
        context.exit(INTERRUPTED)
