"""Conversion: a model becomes a program whose operators are PyTorch calls and whose tensors have their own names."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from graphclone.model import Model
from graphclone.pytorch import attention_idioms, layout_idioms, norm_idioms, weight_idioms
from graphclone.pytorch.adoption import adopt
from graphclone.pytorch.blocked_layout import undo_blocks
from graphclone.pytorch.causality import flag_causal
from graphclone.pytorch.checkpoints import Checkpoint, Recovered, recover
from graphclone.pytorch.code import DTYPE, Code
from graphclone.pytorch.dropout import add_dropout
from graphclone.pytorch.naming import Names
from graphclone.pytorch.nesting import nest
from graphclone.pytorch.parameters import Stored, classify, freeze, numbers
from graphclone.pytorch.probing import probe
from graphclone.pytorch.program import Op, Program, Value, read
from graphclone.pytorch.quantization import fold_quantized, hold_at_zero
from graphclone.pytorch.quantized_operators import dequantize_operands
from graphclone.pytorch.registry import RULES, load_rules, rule
from graphclone.pytorch.rewriting import Result, Uses, new_op, new_value, rewrite
from graphclone.pytorch.weight_idioms import turn_readers
from graphclone.weights import Weight

STAGES = (
    (layout_idioms.drop_idle, layout_idioms.drop_neutral, attention_idioms.cache_apart),
    (layout_idioms.swap_by_reshape,),
    (layout_idioms.merge_transposes, weight_idioms.linear, weight_idioms.embedding, norm_idioms.standard_norms),
    (weight_idioms.bias, norm_idioms.layer_norm, norm_idioms.folded_layer_norm, norm_idioms.rms_norm),
    (norm_idioms.rms_norm_weight, norm_idioms.layer_norm_weight),
    (norm_idioms.layer_norm_weight, weight_idioms.linear_without_reshapes, norm_idioms.gelu, norm_idioms.silu),
    (attention_idioms.heads_apart,),
    (attention_idioms.attention,),
    (layout_idioms.merge_transposes,),
    (attention_idioms.grouped_queries, layout_idioms.one_chunk_for_halves),
    (layout_idioms.merge_reshapes,),
    (layout_idioms.drop_idle, hold_at_zero),
)
"""Idioms in the order they are looked for; those of one stage do not need each other."""


@dataclass
class Converted:
    """A program ready to be written.

    `stored` lists its tensors in order of use, `outputs` the graph's names of its results, `report` what is doubtful.
    """

    program: Program
    stored: list[Stored]
    outputs: list[str]
    report: dict[str, list[str]] = field(default_factory=dict)


def convert(model: Model, dropout: float = 0.0, checkpoint: Checkpoint | None = None) -> Converted:
    """Return the model as PyTorch calls.

    dropout: the rate to put back, 0 for none. checkpoint: a state dict, or where one is, to recover names from.
    Raises: InputError that lists all operators without a rule.
    """
    load_rules()
    program = read(model)
    undo_blocks(program)
    dequantize_operands(program)
    rewrite(program, norm_idioms.group_norm)
    fold_quantized(program)
    names = Names(model, program, graph_metadata(model))
    numbers(program, names)
    probe(program, model)
    classify(program, names)
    for stage in STAGES:
        for idiom in stage:
            rewrite(program, idiom)
    tie(program, model)
    found = recover(program, checkpoint, names) if checkpoint is not None else None
    assumed = adopt(program, names, found)
    order = names.order(checkpoint)
    _name_ties(program, order)
    freeze(program)
    moved = nest(program, model)
    if dropout:
        add_dropout(program, dropout)
    layout_idioms.share_repeated(program)
    encode(program)
    flag_causal(program)
    cast_tables(program)
    encode(program)
    stored = list(dict.fromkeys(v.parameter for v in program.values() if v.parameter is not None and v.known is None))
    stored = [*(each for each in stored if each not in moved), *(each for each in moved if each in stored)]
    stored.sort(key=lambda each: order.get(each.path, len(order)))
    carried = carry(stored, found, names) if found is not None else []
    report = _report(stored, names, assumed, found)
    report["carried"] = [each.path for each in carried]
    report["moved"] = [f"{each.path}: {name}" for each, name in moved.items() if each in stored]
    return Converted(program, [*stored, *carried], [tensor.name for tensor in model.outputs], report)


def carry(stored: list[Stored], found: Recovered, names: Names) -> list[Stored]:
    """Return what keeps the checkpoint's tensors that the graph lacks in the state dict.

    Nothing is kept for a model that was cut to other sizes than the checkpoint's. Left out is what was in blocks that a
    cut removed, and what a parameter with as many axes and no name may be.
    """
    if found.resized:
        return []
    paths = {path for each in stored for path in (each.path, *each.aliases)}
    heads = _heads(paths)
    ranks = {len(each.shape) for each in stored if each.trainable and names.lost(each.path)}
    kept = {
        name: np.asarray(tensor, order="C")
        for name, tensor in found.lacking.items()
        if name not in paths and tensor.ndim not in ranks and not _in_dropped_block(name.split("."), heads)
    }
    carried = []
    for name, array in kept.items():
        kind = torch.from_numpy(array).dtype
        trainable = kind.is_floating_point and not names.is_buffer(name)
        carried.append(Stored(name, Weight.of(array), kind, trainable, frozen=True))
    return carried


def _name_ties(program: Program, order: Mapping[str, int]) -> None:
    """Call a tensor by the first of its names, as the framework does when it lists parameters."""
    for each in {value.parameter for value in program.values() if value.parameter is not None}:
        paths = [each.path, *each.aliases]
        if all(path in order for path in paths):
            each.path, *each.aliases = sorted(paths, key=order.__getitem__)


def graph_metadata(model: Model) -> dict[str, str]:
    """Return what the exporter wrote beside the graph."""
    return {prop.key: prop.value for prop in model.graph_header.metadata_props}


def tie(program: Program, model: Model) -> None:
    """Let equal matrices be one Parameter; a linear layer may have to read it in its other orientation."""
    by_name: dict[str, list[Value]] = {}
    for value in program.values():
        if value.parameter is not None and value.parameter.trainable:
            by_name.setdefault(value.name, []).append(value)
    for each in model.ties:
        for first in by_name.get(each.first, [])[:1]:
            for second in by_name.get(each.second, []):
                turned = each.transposed ^ first.parameter.transposed ^ second.parameter.transposed
                if turned and not turn_readers(program, second):
                    continue
                program.replace(second, first)
                if not turned and second.parameter.path != first.parameter.path:
                    first.parameter.aliases += [second.parameter.path, *second.parameter.aliases]


def encode(program: Program) -> None:
    """Give every operator its PyTorch code."""
    for op in program.ops:
        op.code = RULES[op.key](op)


def cast_tables(program: Program) -> None:
    """Bring float tables to the parameters' type where they meet activations, once each."""
    if not any(v.parameter is not None and v.parameter.trainable for v in program.values()):
        return
    cast: dict[Value, Op] = {}

    def run(op: Op, uses: Uses) -> Result:
        if all(output is None or output.is_table for output in op.outputs):
            return None
        made = []
        for slot, each in enumerate(op.inputs):
            if (
                each is None
                or not each.is_table
                or each.op is None
                or each.known is not None
                or not each.dtype.is_floating_point
            ):
                continue
            if each not in cast:
                output = new_value(each.name, each.dims, each.dtype)
                output.is_table = True
                cast[each] = new_op("LikeParameters", [each], output, each.op)
                made.append(cast[each])
            op.inputs[slot] = cast[each].output
        return [*made, op] if made else None

    rewrite(program, run)


@rule("LikeParameters", domain="graphclone")
def like_parameters(op: Op) -> Code:
    return Code("{}.to({})", op[0], DTYPE)


def _report(stored: list[Stored], names: Names, assumed: list[str], found: Recovered | None) -> dict[str, list[str]]:
    present = {path for each in stored if each.persistent for path in (each.path, *each.aliases)}
    absent = [name for name in names.kept if name not in present]
    heads = _heads(present)
    absent = sorted(name for name in absent if not _in_dropped_block(name.split("."), heads))
    return {
        "assumed": assumed,
        "unsure": [f"{each.path}: {each.unsure}" for each in stored if each.unsure],
        "unnamed": [each.path for each in stored if each.trainable and names.lost(each.path)],
        "absent": absent if found is None else list(found.lacking),
        "differing": [] if found is None else found.differing,
    }


def _heads(paths: set[str]) -> set[tuple[str, ...]]:
    """Return the modules that hold these tensors, outer ones too."""
    return {tuple(path.split(".")[:length]) for path in paths for length in range(path.count(".") + 1)}


def _in_dropped_block(parts: list[str], heads: set[tuple[str, ...]]) -> bool:
    """Tell whether a name lies in a numbered module that a cut removed, beside ones that are there."""
    return any(
        part.isdigit() and tuple(parts[: place + 1]) not in heads and (*parts[:place], "0") in heads
        for place, part in enumerate(parts)
    )
