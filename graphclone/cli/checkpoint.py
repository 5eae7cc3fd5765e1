"""`graphclone checkpoint`: the same plan, applied to the checkpoint that a model was exported from."""

from pathlib import Path

import click

from graphclone.cli import options


@click.command("checkpoint")
@options.model
@click.option(
    "--plan", "plan_path", metavar="PLAN", type=options.FILE, required=True, help="The plan of the slim model."
)
@click.option("--from", "source", metavar="DIR", type=options.FILE, required=True, help="The original checkpoint.")
@options.output("DIR", "A new folder for the small checkpoint.")
@options.no_verify
@options.no_retie
def command(model: Path, plan_path: Path, source: Path, output: Path, no_verify: bool, no_retie: bool) -> None:
    """Apply PLAN to the checkpoint that MODEL was exported from: safetensors and config.json.

    `from_pretrained` of the result gives the slim model's outputs, which is checked where transformers is installed.
    A lone .safetensors file gets its weights alone. Tokenizers and other files are copied along.
    """
    from graphclone.checkpoint import write_checkpoint
    from graphclone.cli.terminal import err, out
    from graphclone.model import load
    from graphclone.plan import Plan

    plan = Plan.load(plan_path)
    parent = load(model, retie=not no_retie)
    if plan.parent and plan.parent != parent.fingerprint:
        err().print(f"warning: the plan '{plan_path}' was made for another model than '{model}'", style="yellow")
    with err().status("cutting the checkpoint"):
        report = write_checkpoint(parent, plan, source, output, check=not no_verify)
    show = out()
    show.print(f"tensors   {len(report.matched)} found in the graph, {len(report.dropped)} dropped")
    for title, names in (("by size", report.typed), ("as it is", report.kept)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            show.print(f"{title:9} {', '.join(names[:4])}{more}, not in the graph", soft_wrap=True)
    if report.tokens is not None:
        kept, size = len(report.tokens.kept), report.tokens.size
        show.print(f"tokens    {kept:,} of {size:,}; vocabulary.json has the tokenizer's id of each", soft_wrap=True)
    if report.difference is not None:
        show.print(f"verified  its outputs differ from the slim model's by {report.difference:.1e}")
    elif report.note:
        show.print(f"verified  {report.note}", soft_wrap=True)
    show.print(f"written   {output}", soft_wrap=True)
