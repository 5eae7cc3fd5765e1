"""`graphclone checkpoint`: reserved for the same plan applied to the original checkpoint."""

import click

from graphclone.errors import InputError


@click.command("checkpoint", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Apply a plan to the original checkpoint (safetensors and config.json). Not in this version."""
    raise InputError(
        "`checkpoint` is not in this version; use `graphclone torch MODEL -o DIR` for trainable weights under the "
        "original names"
    )
