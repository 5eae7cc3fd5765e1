"""Apply a plan to the checkpoint that a model was exported from, and rewrite its config."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import find
from graphclone.axes.scales import ESCAPE
from graphclone.axes.tables import Table
from graphclone.axes.typed import Use
from graphclone.checkpoint.carrying import Carrier
from graphclone.checkpoint.config import rewrite_config, with_new_tokens
from graphclone.checkpoint.files import Checkpoint, new_folder, read_checkpoint, write_checkpoint_files
from graphclone.checkpoint.fitting import fit_config
from graphclone.checkpoint.frequencies import rewrite_frequencies
from graphclone.checkpoint.matching import Match, Part, match
from graphclone.checkpoint.numbering import Numbering, find_numberings, renumbered, without_expert
from graphclone.dtypes import is_float
from graphclone.errors import CheckFailed, CutError, GraphcloneError, InputError
from graphclone.model import Model
from graphclone.native import refused_tables
from graphclone.plan import Cut, Plan, resolve
from graphclone.surgery import carry_out_traced
from graphclone.weights import Weight, weight_of

RECOMPUTED = re.compile(r"inv_freq|rotary_emb")
TOLERANCE = 1e-5
TOKENS = "vocabulary.json"


@dataclass
class Report:
    """What became of the tensors.

    matched: those found in the graph. kept: others that no cut touches. typed: others, cut by sizes and names.
    dropped: those of dropped blocks and experts. difference: of the loaded model's outputs from the slim model's,
    relative, or None where that was not compared, and `note` says why.
    """

    matched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    difference: float | None = None
    note: str = ""


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
    output: a new folder. check: load the result with transformers, where it is installed, and compare its outputs.
    Raises: InputError for a checkpoint of another model; CutError for what the config cannot express, and where a
    tensor outside the graph could be cut in several ways; CheckFailed where the outputs differ (nothing is written).

    Example:
        write_checkpoint(graphclone.load("gpt2.onnx"), Plan.load("plan.json"), "gpt2", "gpt2-small")
    """
    from graphclone.pytorch.pretrained import config_defaults

    analysis = analysis or analyse(model)
    cut = resolve(plan, analysis)
    _refuse_additions(plan)
    checkpoint = read_checkpoint(source)
    matches = match(checkpoint.tensors, model, analysis.typing)
    if not matches:
        raise InputError(
            f"no tensor of '{source}' is in the model; is it the checkpoint that the model was exported from?"
        )
    config, defaults, doubts = None, None, []
    tokens = _kept_tokens(analysis, cut)
    if checkpoint.config is not None and "model_type" in checkpoint.config:
        defaults = config_defaults(checkpoint.folder)
        config = rewrite_config(checkpoint.config, analysis, cut, defaults, doubts)
        config = config if tokens is None else with_new_tokens(config, tokens)
    stored = [part.name for name, each in matches.items() for part in each.parts if not RECOMPUTED.search(name)]
    tables: dict[str, Match] = {}
    if config is not None:
        config, said = rewrite_frequencies(config, list(refused_tables(analysis.typing, cut, stored)), cut)
        tables = _own_tables(checkpoint, list(refused_tables(analysis.typing, cut, stored + said)))
        stored += said + [each.parts[0].name for each in tables.values()]
    try:
        child, nodes = carry_out_traced(cut, model, analysis, plan, native_constants=True, stored_tables=stored)
    except CutError as error:
        raise CutError(str(error).removesuffix(ESCAPE)) from None
    carrier = Carrier(analysis.typing, cut, nodes)
    numberings = find_numberings(model, analysis, cut, matches)
    tensors, report = _tensors(checkpoint, matches, carrier, numberings, _Sizes(analysis, cut, matches, checkpoint))
    for name, each in tables.items():
        tensors[name] = (name, carrier.carried(each, _stored(each.parts[0].use))[0])
    if config is not None:
        config = _fitted(config, defaults or config, checkpoint, tensors, doubts)
    first = next(iter(checkpoint.file_of.values()))
    file_of = {new: checkpoint.file_of.get(old, first) for new, (old, _) in tensors.items()}
    with new_folder(Path(output)) as folder:
        weights = {new: weight for new, (_, weight) in tensors.items()}
        write_checkpoint_files(folder, checkpoint, weights, file_of, config)
        if tokens is not None:
            _write_tokens(folder, tokens)
        if check:
            fewer = any(len(cut.blocks[stack.prefix]) < len(stack.blocks) for stack in analysis.stacks)
            _compare(report, folder, child, config, fewer)
    return report


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


def _fitted(config: dict, defaults: Mapping, checkpoint: Checkpoint, tensors: Mapping, doubts: list) -> dict:
    """Let the class behind a config say whether it holds the child, where transformers knows it."""
    from graphclone.pytorch.pretrained import shapes_of

    parent = {name: weight.shape for name, weight in checkpoint.tensors.items()}
    child = {name: weight.shape for name, (_, weight) in tensors.items()}
    try:
        own = shapes_of(checkpoint.config)
    except (InputError, CheckFailed):
        own = {}
    if own and all(own.get(name, shape) == shape for name, shape in parent.items()):
        return fit_config(config, defaults, parent, child, shapes_of, doubts)
    if doubts:
        raise doubts[0].error
    return config


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


def _kept_tokens(analysis: Analysis, cut: Cut) -> list[int] | None:
    vocabulary = analysis.dimension("vocab")
    picks = None if vocabulary is None else cut.picks(vocabulary.axes[0])
    return None if picks is None else [int(pick) for pick in picks]


def _write_tokens(folder: Path, tokens: list[int]) -> None:
    """Tell which of the tokenizer's ids are left: entry i is what the child's id i was."""
    (folder / TOKENS).write_text(json.dumps({"kept_token_ids": tokens}) + "\n", encoding="utf-8")
    generation = folder / "generation_config.json"
    if generation.is_file():
        new = with_new_tokens(json.loads(generation.read_text(encoding="utf-8")), tokens, generation.name)
        generation.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(
    checkpoint: Checkpoint,
    matches: Mapping[str, Match],
    carrier: Carrier,
    numberings: list[Numbering],
    sizes: "_Sizes",
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
            (found if kept else moved)[new] = (name, weight)
        elif not kept:
            report.dropped.append(name)
        else:
            found[new] = (name, sizes.cut(name, original))
            (report.kept if found[new][1] is original else report.typed).append(name)
    for new, (name, weight) in moved.items():  # as the position bias of T5, which the first block holds for all
        if new in found:
            report.dropped.append(name)
        else:
            found[new] = (name, weight)
    return found, report


class _Sizes:
    """Cut what the graph does not contain by what its sizes mean elsewhere in the checkpoint."""

    def __init__(self, analysis: Analysis, cut: Cut, matches: Mapping[str, Match], checkpoint: Checkpoint):
        self.cut_ = cut
        self.matches = matches
        self.tensors = checkpoint.tensors
        self.meanings: dict[int, dict[bytes, np.ndarray | None]] = {}
        for each in matches.values():
            for part in each.parts:
                for axis in part.use.axes:
                    picks = cut.picks(axis)
                    key = b"" if picks is None else picks.tobytes()
                    self.meanings.setdefault(find(axis).size[0], {})[key] = picks
        self.hidden = {
            dimension.size: cut.picks(dimension.axes[0])
            for dimension in analysis.dimensions
            if dimension.role == "hidden"
        }

    def cut(self, name: str, weight: Weight) -> Weight:
        """Return the tensor as it is, or cut along each axis. Raises: CutError where a size has several meanings."""
        if not is_float(weight.onnx_dtype) or RECOMPUTED.search(name) or _is_mask(weight):
            return weight
        sibling = self._sibling(name, weight)
        for axis, size in enumerate(weight.shape):
            picks = sibling if sibling is not None else self._picks(name, axis, size, weight)
            if isinstance(picks, np.ndarray):
                weight = weight.take(axis, picks)
        return weight

    def _sibling(self, name: str, weight: Weight) -> np.ndarray | None:
        """A bias goes with the outputs of the weight beside it."""
        module, _, leaf = name.rpartition(".")
        match = self.matches.get(f"{module}.weight")
        if leaf != "bias" or match is None or len(match.parts) != 1 or len(weight.shape) != 1:
            return None
        found = [self.cut_.picks(axis) for axis in match.parts[0].use.axes if find(axis).size[0] == weight.shape[0]]
        alike = {b"" if picks is None else picks.tobytes() for picks in found}
        return found[0] if len(alike) == 1 else None

    def _picks(self, name: str, axis: int, size: int, weight: Weight) -> np.ndarray | None:
        meanings = self.meanings.get(size, {})
        if not any(picks is not None for picks in meanings.values()):
            return None
        if size in self.hidden and not re.search(r"\.\d+\.", name):
            return self.hidden[size]
        if len(meanings) == 1:
            return next(iter(meanings.values()))
        raise CutError(
            f"'{name}' {list(weight.shape)} is not in the graph, and its axis {axis} of {size} could be cut in "
            f"{len(meanings)} ways; export the model with it, or remove it from the checkpoint"
        )


def _is_mask(weight: Weight) -> bool:
    """Tell whether a tensor is a causal mask that old checkpoints carry: (1, 1, n, n)."""
    return len(weight.shape) == 4 and weight.shape[:2] == (1, 1) and weight.shape[2] == weight.shape[3]


def _compare(report: Report, folder: Path, child: Model, config: dict | None, fewer: bool) -> None:
    """Load what was written with transformers and compare its outputs with the slim model's; `fewer`: of its blocks."""
    from graphclone.pytorch.pretrained import outputs_of
    from graphclone.verify.running import first_run

    if config is None:
        report.note = "the weights alone, not compared: there is no config.json with a model_type to build a model from"
        return
    _, probes, wanted = first_run(child, analyse(child))
    try:
        shapes = [{name: array.shape for name, array in outputs.items()} for outputs in wanted]
        got = [outputs_of(folder, feeds, each) for feeds, each in zip(probes, shapes, strict=True)]
    except InputError as error:
        report.note = f"not compared: {error}"
        return
    worst, where = 0.0, ""
    for given, expected in zip(got, wanted, strict=True):
        for name, array in expected.items():
            if name not in given:
                continue
            same = given[name].shape == array.shape
            largest = float(np.abs(array).max()) or 1.0
            off = float(np.abs(given[name] - array).max()) / largest if same else float("inf")
            worst, where = max((worst, where), (off, name))
    report.difference = worst
    if not worst <= TOLERANCE:
        moved = "; its class may compute blocks by their number: keep others" if fewer else ""
        raise CheckFailed(
            f"the checkpoint's output '{where}' differs from the slim model's by {worst:.1e} (at most "
            f"{TOLERANCE:.0e}){moved}; nothing was written"
        )


__all__ = ["Report", "read_checkpoint", "write_checkpoint"]
