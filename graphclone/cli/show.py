"""`graphclone show`: what a model is made of and what of it can be cut."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("show")
@options.model
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@click.option("--signatures", is_flag=True, help="Print what every node does to axes.")
@options.no_retie
def command(model: Path, as_json: bool, signatures: bool, no_retie: bool) -> None:
    """Print the dimensions and blocks of MODEL, what each spans, and what cannot be cut and why."""
    from graphclone.analysis import analyse
    from graphclone.cli.description import describe, write_json
    from graphclone.cli.overview import print_overview
    from graphclone.cli.signatures import print_signatures
    from graphclone.model import load

    parent = load(model, retie=not no_retie)
    analysis = analyse(parent)
    if as_json:
        write_json(describe(parent, analysis))
    elif signatures:
        print_signatures(analysis)
    else:
        print_overview(parent, analysis)
