"""`graphclone subclone`: the main job, from a parent and target sizes to a child."""

from pathlib import Path

import click

from graphclone.cli import options
from graphclone.cli.values import Blocks, Target

TARGETS = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "blocks")


@click.command("subclone")
@options.model
@click.option("-o", "--output", metavar="OUT", type=options.FILE, help="The child (.onnx).")
@options.data
@options.stats
@click.option("--hidden", type=Target(), help="Width of the residual stream; a list has one entry per stage.")
@click.option("--ffn", type=Target(), help="Width of each feed-forward.")
@click.option("--heads", type=Target(), help="Attention heads; keeps the queries per KV head.")
@click.option("--kv-heads", type=Target(), help="KV heads; with --heads sets the queries per KV head.")
@click.option("--head-dim", type=Target(), help="Width of a head.")
@click.option("--layers", type=Target(lists=False), help="Blocks to keep.")
@click.option("--blocks", type=Blocks(), help="The blocks to keep, instead of --layers.")
@click.option("--recipe", metavar="NAME", help="best (with --data, its default) or paper.")
@click.option("--by", metavar="METRIC", help="Importance of an index: obs in the recipe best, mean_abs in paper.")
@click.option("--blocks-by", metavar="METRIC", help="Which blocks go: search in best, middle in paper.")
@click.option("--rescale", metavar="MODE", help="Scale weights after the cut: none, paper or norm_gain.")
@options.native_constants
@click.option("--keep-heads", is_flag=True, help="Leave widths outside the blocks that equal hidden as they are.")
@click.option("--plan-out", metavar="PLAN", type=options.FILE, help="Write the decisions to a plan file too.")
@options.report
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="For --by random.")
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write no model.")
@options.no_verify
@options.provider
@options.batches
@options.batch_size
@options.mask
@options.no_retie
def command(
    model: Path,
    output: Path | None,
    data: Path | None,
    stats: Path | None,
    plan_out: Path | None,
    page: Path | None,
    seed: int,
    dry_run: bool,
    no_verify: bool,
    no_retie: bool,
    native_constants: bool,
    provider: str,
    batches: int | None,
    batch_size: int | None,
    mask: str | None,
    **targets,
) -> None:
    """Cut MODEL to target sizes, keeping its most important weights (weight subcloning, arXiv 2312.09299).

    V is a size N, or stack=N,stack=N, or [n0,n1,..] with one entry per kept block. Metrics: mean_abs, l2, variance,
    output_aware, obs, first, uniform, random; for blocks: middle, relative_magnitude, block_influence, uniform, first,
    and search, which runs the model without each. With --data the recipe is best: it searches the blocks, rotates the
    residual stream where the graph allows it, and refits the linear operators by least squares. With --stats alone, or
    neither, it is the paper's, as with --recipe paper.
    """
    if data is not None and stats is not None:
        raise click.UsageError("give --data or --stats, not both")
    if output is None and not dry_run:
        raise click.UsageError("where should the child go? Write -o OUT, or --dry-run to see what would be kept")
    if all(targets[name] is None for name in TARGETS):
        raise click.UsageError(
            "nothing to cut: give --hidden, --ffn, --heads, --kv-heads, --head-dim, --layers or --blocks"
        )
    if targets["layers"] is not None and targets["blocks"] is not None:
        raise click.UsageError("give --layers or --blocks, not both")
    from graphclone.cli.job import Job, Samples
    from graphclone.model import load
    from graphclone.subclone import default_recipe, recipe_text

    samples = Samples(data, stats, {"provider": provider, "batches": batches, "batch_size": batch_size, "mask": mask})
    parent = load(model, retie=not no_retie)
    job = Job(parent, samples, seed, output, plan_out, not no_verify, dry_run, native_constants, page)
    targets["recipe"] = targets["recipe"] or default_recipe(data)
    job.check(targets)
    job.run(recipe_text(**targets))
