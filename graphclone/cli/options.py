"""Options: the arguments and flags that several commands share, spelled once."""

from pathlib import Path

import click

FILE = click.Path(path_type=Path)

model = click.argument("model", metavar="MODEL", type=FILE)
data = click.option(
    "--data",
    metavar="DATA",
    type=FILE,
    help="Samples: .npz or .safetensors keyed by graph input, or a folder of batches.",
)
stats = click.option("--stats", metavar="STATS", type=FILE, help="Statistics that `graphclone calibrate` wrote.")
provider = click.option(
    "--provider", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="Where it runs."
)
batches = click.option("--batches", metavar="N", type=click.IntRange(min=1), help="Stop after so many batches.")
batch_size = click.option(
    "--batch-size", metavar="N", type=click.IntRange(min=1), help="Samples a batch. Default: 8, or the model's own."
)
mask = click.option("--mask", metavar="INPUT", help="The input that marks padding. Default: found in the graph.")
native_constants = click.option(
    "--native-constants",
    is_flag=True,
    help="Fold scales that depend on a size into weights, so that the framework's own smaller class fits.",
)
report = click.option(
    "--report", "page", metavar="PAGE", type=FILE, help="Write an HTML page: what was kept, why, and the checks."
)
no_verify = click.option("--no-verify", is_flag=True, help="Write the result without checking it.")
no_retie = click.option("--no-retie", is_flag=True, help="Do not treat equal matrices as tied.")


def output(metavar: str, help: str):
    """Return the option -o, required."""
    return click.option("-o", "--output", metavar=metavar, type=FILE, required=True, help=help)
