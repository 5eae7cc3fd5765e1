"""Apply a plan to the checkpoint that a model was exported from, and rewrite its config."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graphclone.analysis import Analysis, analyse
from graphclone.axes.scales import ESCAPE
from graphclone.axes.tables import Table
from graphclone.axes.typed import Use
from graphclone.checkpoint.carrying import Carrier
from graphclone.checkpoint.comparing import compare
from graphclone.checkpoint.config import Doubt, rewrite_config
from graphclone.checkpoint.files import Checkpoint, read_checkpoint
from graphclone.checkpoint.fitting import fit_config
from graphclone.checkpoint.folders import check_folder, new_folder, write_checkpoint_files
from graphclone.checkpoint.frequencies import rewrite_frequencies
from graphclone.checkpoint.matching import Match, Part, match
from graphclone.checkpoint.numbering import Numbering, find_numberings, renumbered, without_expert
from graphclone.checkpoint.outside import RECOMPUTED, Outside
from graphclone.checkpoint.tokens import Tokens, kept_tokens, with_new_tokens, write_tokens
from graphclone.cut import Cut
from graphclone.errors import CheckFailed, CutError, GraphcloneError, InputError
from graphclone.model import Model
from graphclone.native import refused_tables
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.surgery import carry_out_traced
from graphclone.weights import Weight, weight_of


@dataclass
class Report:
    """What became of the tensors.

    matched: those found in the graph. kept: others that no cut touches. typed: others, cut by sizes and names.
    dropped: those of dropped blocks and experts. tokens: what is left of the vocabulary, None where all is.
    difference: of the loaded model's outputs from the slim model's, relative, or None where that was not compared, and
    `note` says why.
    """

    matched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    tokens: Tokens | None = None
    difference: float | None = None
    note: str = ""


@dataclass
class _Config:
    """The child's config as far as names and values tell it.

    new: None where the checkpoint has none. full: the parent's with its class's defaults. doubts: what the class has to
    be asked. stored: initializers that are the checkpoint's or that the config gives, so that no formula does. tables:
    matches of tables that the class reads where a checkpoint holds them.
    """

    new: dict | None
    full: Mapping
    doubts: list[Doubt]
    stored: list[str]
    tables: dict[str, Match]


def write_checkpoint(
    model: Model,
    plan: Plan,
    source: str | Path,
    output: str | Path,
    *,
    check: bool = True,
    analysis: Analysis | None = None,
) -> Report:
    """Write the checkpoint that a plan makes of another, and tell what became of its tensors.

    model: the exported parent. source: a folder with safetensors and maybe a config.json, or a .safetensors file.
    output: a new or an empty folder. check: load the result with transformers, where it is installed, and compare its
    outputs.
    Raises: InputError for a checkpoint of another model; CutError for what the config cannot express, and where a
    tensor outside the graph could be cut in several ways; CheckFailed where the outputs differ (nothing is written).

    Example:
        write_checkpoint(graphclone.load("gpt2.onnx"), Plan.load("plan.json"), "gpt2", "gpt2-small")
    """
    check_folder(Path(output))
    _refuse_additions(plan)
    analysis = analysis or analyse(model)
    cut = resolve(plan, analysis)
    checkpoint = read_checkpoint(source)
    matches = match(checkpoint.tensors, model, analysis.typing)
    if not matches:
        raise InputError(
            f"no tensor of '{source}' is in the model; is it the checkpoint that the model was exported from?"
        )
    config = _config(checkpoint, analysis, cut, matches)
    try:
        child, nodes = carry_out_traced(cut, model, analysis, plan, native_constants=True, stored_tables=config.stored)
    except CutError as error:
        raise CutError(str(error).removesuffix(ESCAPE)) from None
    carrier = Carrier(analysis.typing, cut, nodes)
    numberings = find_numberings(model, analysis, cut, matches)
    tensors, report = _tensors(checkpoint, matches, carrier, numberings, Outside(analysis, cut, matches))
    report.tokens = kept_tokens(analysis, cut)
    for name, each in config.tables.items():
        tensors[name] = (name, carrier.carried(each, _stored(each.parts[0].use))[0])
    fitted = None if config.new is None else _fitted(config, checkpoint, tensors)
    with new_folder(Path(output)) as folder:
        write_checkpoint_files(folder, checkpoint, tensors, fitted)
        if report.tokens is not None:
            write_tokens(folder, report.tokens)
        if check:
            parts = [part for each in matches.values() for part in each.parts]
            known = {*config.stored, *(part.name for whole in parts for part in (whole, *whole.twins))}
            report.difference, report.note = compare(folder, child, fitted, _advice(analysis, cut, known))
    return report


def _advice(analysis: Analysis, cut: Cut, known: Collection[str]) -> str:
    """Say why the class may compute something else, though it holds the tensors. known: initializers that it reads."""
    for name, uses in analysis.typing.uses.items():
        is_cut = any(cut.picks(axis) is not None for use in uses for axis in use.axes)
        if is_cut and name not in known and len(uses[0].axes) > 1:
            return f"; its class may compute '{name}' from the size, which the checkpoint lacks: do not cut it"
    if any(len(cut.blocks[stack.prefix]) < len(stack.blocks) for stack in analysis.stacks):
        return "; its class may compute blocks by their number: keep others"
    return ""


def _config(checkpoint: Checkpoint, analysis: Analysis, cut: Cut, matches: Mapping[str, Match]) -> _Config:
    from graphclone.pytorch.pretrained import config_defaults

    stored = [part.name for name, each in matches.items() for part in each.parts if not RECOMPUTED.search(name)]
    if checkpoint.config is None or "model_type" not in checkpoint.config:
        return _Config(None, {}, [], stored, {})
    doubts: list[Doubt] = []
    defaults = config_defaults(checkpoint.folder)
    config = rewrite_config(checkpoint.config, analysis, cut, defaults, doubts)
    tokens = kept_tokens(analysis, cut)
    config = config if tokens is None else with_new_tokens(config, tokens)
    config, said = rewrite_frequencies(config, list(refused_tables(analysis.typing, cut, stored)), cut)
    tables = _own_tables(checkpoint, list(refused_tables(analysis.typing, cut, stored + said)))
    stored += said + [each.parts[0].name for each in tables.values()]
    return _Config(config, defaults or config, doubts, stored, tables)


def _own_tables(checkpoint: Checkpoint, refused: Sequence[Table]) -> dict[str, Match]:
    """Return tables that a class computes, leaves out of its checkpoints, and would read if they were there.

    That is how kept entries which its formula does not give are said to it, as a cut of Marian's sinusoids.
    """
    from graphclone.pytorch.pretrained import shapes_of

    try:
        shapes = shapes_of(checkpoint.config) if refused else {}
    except GraphcloneError:
        return {}
    found = {}
    for name in sorted(set(shapes) - set(checkpoint.tensors)):
        alike = [t for t in refused if tuple(_stored(t.use).shape) == shapes[name] and not RECOMPUTED.search(name)]
        chosen = next((t for t in alike if t.name.endswith(name)), alike[0] if alike else None)
        if chosen is not None:
            found[name] = Match(name, (Part(chosen.name, chosen.use),))
    return found


def _stored(use: Use) -> Weight:
    return weight_of(use.node.inputs[use.slot])


def _fitted(config: _Config, checkpoint: Checkpoint, tensors: Mapping[str, tuple[str, Weight]]) -> dict:
    """Let the class behind a config say whether it holds the child, where transformers knows it."""
    from graphclone.pytorch.pretrained import shapes_of

    parent = {name: weight.shape for name, weight in checkpoint.tensors.items()}
    child = {name: weight.shape for name, (_, weight) in tensors.items()}
    try:
        own = shapes_of(checkpoint.config)
    except (InputError, CheckFailed):
        own = {}
    if own and all(own.get(name, shape) == shape for name, shape in parent.items()):
        return fit_config(config.new, config.full, parent, child, shapes_of, config.doubts)
    if config.doubts:
        raise config.doubts[0].error
    return config.new


def _refuse_additions(plan: Plan) -> None:
    """Refuse what a plan adds and the original class has no place for."""
    if plan.bias:
        raise CutError(
            f"the plan adds a bias behind '{next(iter(plan.bias))}', which the checkpoint's class has no place for"
        )
    if plan.untie:
        raise CutError(
            f"the plan unties '{next(iter(plan.untie))}', which the checkpoint's class keeps tied; leave untie out, or "
            f"use the child as ONNX or through `graphclone torch`"
        )


def _tensors(
    checkpoint: Checkpoint,
    matches: Mapping[str, Match],
    carrier: Carrier,
    numberings: list[Numbering],
    outside: Outside,
) -> tuple[dict[str, tuple[str, Weight]], Report]:
    """Return {new name: (old name, weight)}."""
    found: dict[str, tuple[str, Weight]] = {}
    moved: dict[str, tuple[str, Weight]] = {}
    report = Report()
    for name, original in checkpoint.tensors.items():
        new, kept = renumbered(name, numberings)
        if name in matches:
            weight, expert, position = carrier.carried(matches[name], original)
            report.matched.append(name)
            if weight is None:
                report.dropped.append(name)
                continue
            if expert is not None and position is not None:
                new = without_expert(new, expert, position, numberings)
            if kept and new in found:
                raise CutError(f"'{found[new][0]}' and '{name}' are both '{new}' in the child; drop other blocks")
            (found if kept else moved).setdefault(new, (name, weight))
        elif not kept:
            report.dropped.append(name)
        else:
            found[new] = (name, outside.cut(name, original))
            (report.kept if found[new][1] is original else report.typed).append(name)
    for new, (name, weight) in moved.items():  # as the position bias of T5, which the first block holds for all
        if new in found:
            report.dropped.append(name)
        else:
            found[new] = (name, weight)
    return found, report


__all__ = ["Report", "read_checkpoint", "write_checkpoint"]
