"""Subclone: a recipe as one call, which writes a pipeline's text and runs it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphclone.analysis import Analysis, analyse
from graphclone.calibration.statistics import Statistics
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pipeline import Pipeline, Result
from graphclone.taps import all_taps, spans

Size = int | Sequence[int] | Mapping[str, object] | None


def calibrate(
    model: Model,
    data: str | Path | Iterable,
    *,
    provider: str = "auto",
    batches: int | None = None,
    batch_size: int | None = None,
    mask: str | None = None,
    progress: bool = True,
    analysis: Analysis | None = None,
    **options: object,
) -> Statistics:
    """Measure everything that ranking and rescaling may ask for, with onnxruntime, in one pass over the samples.

    data: a .npz, safetensors or folder (see the contract of `DATA` in the README), or any iterable of feeds.
    provider: auto, cuda or cpu. batches: stop after so many. mask: the input that marks padding.
    Raises: InputError for data that does not fit, and where an activation is NaN or Inf.

    Example:
        stats = graphclone.calibrate(parent, "samples.npz")
    """
    from graphclone.calibration.data import open_data
    from graphclone.calibration.run import measure

    analysis = analysis or analyse(model)
    source = open_data(data, model, batch_size=batch_size, batches=batches)
    return measure(
        model,
        source,
        all_taps(analysis),
        spans(analysis),
        provider=provider,
        mask=mask,
        progress=progress,
        **options,
    )


@dataclass(frozen=True)
class Defaults:
    """How a recipe chooses and corrects where the caller does not say."""

    by: str
    blocks_by: str
    rescale: str
    correct: str = ""


RECIPES = {
    "paper": Defaults("mean_abs", "middle", "paper"),
    "best": Defaults("obs", "search", "none", "rotate{skip=true},refit"),
}
"""paper: arXiv 2312.09299. best: what wins tools/bench_convergence (docs/methods.md); it runs models on samples."""


def default_recipe(data: object) -> str:
    """Return the recipe where none is asked for: best, which needs samples to run models on, else the paper's."""
    return "paper" if data is None else "best"


def recipe_text(
    *,
    hidden: Size = None,
    ffn: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    head_dim: Size = None,
    layers: Size = None,
    blocks: Size = None,
    by: str | None = None,
    blocks_by: str | None = None,
    rescale: str | None = None,
    keep_heads: bool = False,
    recipe: str = "paper",
) -> str:
    """Return the pipeline's text for a set of targets; what is None is the recipe's choice.

    Example:
        >>> recipe_text(hidden=384, layers=6)
        'depth{layers=6 by=middle},width{hidden=384 by=mean_abs},rescale{mode=paper}'
    """
    if recipe not in RECIPES:
        raise InputError(f"no recipe is called '{recipe}'; there are {', '.join(RECIPES)}")
    chosen = RECIPES[recipe]
    width = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    steps = []
    if blocks is None and layers is not None and (blocks_by or chosen.blocks_by) == "search":
        steps.append(f"search{{{_options({'layers': layers, 'otherwise': None if blocks_by else 'uniform'})}}}")
    elif layers is not None or blocks is not None:
        rule = (blocks_by or chosen.blocks_by) if blocks is None else blocks_by
        steps.append(f"depth{{{_options({'layers': layers, 'blocks': blocks, 'by': rule})}}}")
    if any(value is not None for value in width.values()):
        more = {"by": by or chosen.by} | ({"keep_heads": True} if keep_heads else {})
        steps.append(f"width{{{_options(width | more)}}}")
    steps.append(f"rescale{{mode={rescale or chosen.rescale}}}")
    return ",".join([*steps, *([chosen.correct] if chosen.correct else [])])


def _options(options: Mapping[str, object]) -> str:
    def value(entry: object) -> str:
        return entry if isinstance(entry, str) else json.dumps(entry, separators=(",", ":"))

    return " ".join(f"{key}={value(entry)}" for key, entry in options.items() if entry is not None)


def plan_subclone(
    parent: Model,
    stats: Statistics | None = None,
    *,
    seed: int = 0,
    data: object = None,
    native_constants: bool = False,
    **targets,
) -> Result:
    """Decide and apply, and return the plan, the child and what the passes told; arguments as in `subclone`."""
    targets["recipe"] = targets.get("recipe") or default_recipe(data)
    steps = Pipeline.parse(recipe_text(**targets))
    return steps.run(parent, stats, data=data, seed=seed, native_constants=native_constants)


def subclone(
    parent: Model,
    stats: Statistics | None = None,
    *,
    seed: int = 0,
    data: object = None,
    native_constants: bool = False,
    **targets,
) -> Model:
    """Return a smaller model of the same family that keeps the parent's most important weights.

    stats: from `calibrate`; not needed where nothing is ranked by activations. Targets are sizes, as numbers, {stack:
    number}, or lists with one entry per kept block: hidden, ffn, heads, kv_heads, head_dim, layers, blocks.
    by, blocks_by, rescale: see the passes `width`, `depth`, `rescale`; what is left out is the recipe's choice.
    blocks_by may also be search: the pass of that name.
    blocks_by may also be search: the pass of that name.
    recipe: paper (arXiv 2312.09299), or best (rotated where the graph allows it, and refitted), which needs `data`, and
    is the default where there is some.
    native_constants: the child's scalars are those of the framework's own smaller class, weights take the ratio.
    Raises: CutError for a target the graph does not admit.

    Example:
        child = graphclone.subclone(parent, stats, hidden=384, layers=6, heads=6, ffn=1536)
    """
    return plan_subclone(parent, stats, seed=seed, data=data, native_constants=native_constants, **targets).child
