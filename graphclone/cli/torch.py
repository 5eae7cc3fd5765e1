"""`graphclone torch`: a model as trainable PyTorch source and weights."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("torch")
@options.model
@options.output("DIR", "A folder for the source and its weights.")
@options.no_retie
def command(model: Path, output: Path, no_retie: bool) -> None:
    """Write MODEL as a torch.nn.Module: readable source that imports torch alone, and its weights.

    Parameters have the names of the original model, as far as the export kept them.
    """
    from graphclone.cli.terminal import err, out
    from graphclone.model import load
    from graphclone.pytorch import write_torch

    parent = load(model, retie=not no_retie)
    with err().status("converting"):
        write_torch(parent, output)
    for path in sorted(output.iterdir()):
        out().print(f"written   {path}", soft_wrap=True)
