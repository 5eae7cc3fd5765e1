"""Parameters: which stored tensors are trained, what the framework called them, and how it turned them."""

import re
from dataclasses import dataclass, field

import numpy as np
import torch

from graphclone.axes.tables import FEW, frequencies
from graphclone.pytorch import known
from graphclone.pytorch.naming import STATISTICS, Names, without_repeats
from graphclone.pytorch.program import Op, Program, Value
from graphclone.weights import Weight

FORBIDDING = -1e4
"""A table that holds a number below this is a mask."""
TABLE_NAMES = re.compile(
    r"(^|[._/])(inv_freq|position_ids|token_type_ids|cos(_cached)?|sin(_cached)?|masked_bias|num_batches_tracked)$"
)


@dataclass(eq=False)
class Stored:
    """One tensor of the module.

    Attributes: `path` is its name in the state dict, `trainable` tells Parameters from buffers, `transposed` that the
    graph holds its transpose, `may_transpose` that its orientation is the exporter's, `aliases` other names for it,
    `lead` how many leading axes of one it loses, `frozen` that it takes no gradient: a formula gives it, or nothing
    reads it and it is kept for the state dict alone.
    """

    path: str
    weight: Weight
    dtype: torch.dtype
    trainable: bool
    may_transpose: bool = False
    transposed: bool = False
    persistent: bool = True
    unsure: str = ""
    aliases: list[str] = field(default_factory=list)
    turned: Value | None = None
    lead: int = 0
    frozen: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.weight.shape)[self.lead :]
        return shape[::-1] if self.transposed else shape

    def transpose(self, value: Value) -> Value:
        """Return the value that holds the framework's orientation, (out, in), of this (in, out) one."""
        if self.turned is None:
            stored = Stored(
                self.path,
                self.weight,
                self.dtype,
                True,
                False,
                not self.transposed,
                unsure=self.unsure,
                aliases=self.aliases,
            )
            self.turned = Value(
                value.name, None, self.weight, dims=value.dims[::-1], dtype=value.dtype, parameter=stored
            )
        return self.turned


def numbers(program: Program, names: Names) -> None:
    """Before probing: let small integers and plain scalars be Python numbers."""
    users = program.users()
    for value in program.values():
        if value.weight is None:
            continue
        value.is_table = _may_be_table(value, users.get(value, []), names)
        dtype = known.torch_type(value.weight.onnx_dtype, value.name)
        reading = users.get(value, [])
        setting = bool(reading) and all(_is_setting(op, value) for op in reading)
        plain = setting or (not dtype.is_floating_point and value.weight.size <= known.LARGEST)
        if plain or (value.weight.size == 1 and len(value.weight.shape) <= 1 and not names.is_parameter(value.name)):
            value.dtype, value.dims, value.is_table = dtype, tuple(value.weight.shape), True
            known.known_constant(value, value.weight.load(), dtype)


def _is_setting(op: Op, value: Value) -> bool:
    """Tell whether a tensor says how an operator works, and is nothing it works on."""
    return not op.domain and (op.type in ("OneHot", "Range") or (op.type == "Resize" and op[0] is not value))


def _may_be_table(value: Value, reading: list[Op], names: Names) -> bool:
    """Tell whether a tensor could be computed from sizes, as far as its name and readers tell."""
    told = names.kind(value.name) or names.kind_when_indexed(value, reading)
    if told is not None:
        return told != "PARAMETER"
    if TABLE_NAMES.search(value.name):
        return True
    weights = any(_is_weight_slot(op, value) for op in reading if op.type not in ("MatMul", "Gemm", "Einsum"))
    return names.lost(value.name) and not weights


def classify(program: Program, names: Names) -> None:
    """After probing: give every stored tensor that is left its `parameter`, split where unrelated layers share one."""
    users = program.users()
    _drop_made_up(program, names)
    smooth = _smooth(program)
    for value in list(program.values()):
        if value.weight is None or value.known is not None or value.parameter is not None:
            continue
        reading = users.get(value, [])
        trainable, unsure = _trainable(value, reading, names, users)
        if value not in smooth and names.kind(value.name) is None:
            trainable, unsure = False, ""
        for part, path, aliases in _split(value, reading, trainable, names):
            part.parameter = Stored(
                path,
                value.weight,
                value.dtype,
                trainable,
                may_transpose=trainable and names.lost(value.name),
                persistent=trainable or path in names.kept or bool(STATISTICS.search(path)),
                unsure=unsure,
                aliases=aliases,
            )
            part.is_table = not trainable
            if trainable and not names.torch:
                _without_units(part, users.get(value, []))
    spread_tables(program)


def _smooth(program: Program) -> set[Value]:
    """Return the values that some output depends on smoothly: not only through comparisons or rounding to integers.

    All values, where every output is an integer: then none can be trained by, and nothing tells them apart.
    """
    found = set(program.outputs)
    if not any(each.dtype is None or each.dtype.is_floating_point for each in found):
        return set(program.values())
    for op in reversed(program.ops):
        if any(each in found and (each.dtype is None or each.dtype.is_floating_point) for each in op.outputs):
            found.update(each for each in op.inputs if each is not None)
    return found


BROADCASTING = ("Add", "Sub", "Mul", "Div")


def _without_units(value: Value, reading: list[Op]) -> None:
    """Store (1, 1, n), which a converter made of a vector to broadcast it, as the vector."""
    if value.rank < 2 or any(size != 1 for size in value.dims[:-1]):
        return
    for op in reading:
        if op.type not in BROADCASTING or op.domain or any(v is not value and v.rank < value.rank for v in op.inputs):
            return
    value.parameter.lead, value.dims = value.rank - 1, value.dims[-1:]


def freeze(program: Program) -> None:
    """Let no gradient change sinusoids of positions: frameworks list them among parameters and do not train them."""
    readers = program.users()
    for value, reading in readers.items():
        stored = value.parameter
        if stored is None or not stored.trainable or stored.weight.size < 2 or value.known is not None:
            continue
        if all(op.type in ("Add", "Embedding", "Gather", "Slice") for op in reading):
            sizes = [size for size in stored.shape if size > 1]
            axis = next((axis for axis, size in enumerate(stored.weight.shape) if size > 1), 0)
            rows = stored.weight.take(axis, range(min(FEW, stored.weight.shape[axis])))
            if len(sizes) == 2 and sizes[0] > 2 and not stored.transposed:
                stored.frozen = frequencies(np.asarray(rows.load(), np.float64).reshape(-1, sizes[1])) is not None


def _drop_made_up(program: Program, names: Names) -> None:
    """Remove the zero bias and unit weight that exporters invent for norms without one."""
    for op in program.ops:
        if op.type not in ("LayerNormalization", "InstanceNormalization") or op.domain:
            continue
        for slot, number in ((2, 0.0), (1, 1.0)):
            value = op[slot]
            if value is not None and value.weight is not None and names.made_up(value, op):
                if (value.weight.load() == number).all():
                    op.inputs[slot] = None


def _trainable(value: Value, reading: list[Op], names: Names, users: dict[Value, list[Op]]) -> tuple[bool, str]:
    """Decide, and say what makes it doubtful."""
    if not value.dtype.is_floating_point or not value.weight.size:
        return False, ""
    if any(names.holds_norm(op) for op in reading):
        return True, "the batch norm behind it is folded in"
    told = names.kind(value.name) or names.kind_when_indexed(value, reading)
    if told is not None:
        return told == "PARAMETER", ""
    if TABLE_NAMES.search(value.name) or STATISTICS.search(value.name):
        return False, ""
    if any(op.type == "BatchNormalization" and value in op.inputs[3:] for op in reading):
        return False, ""
    if any(_is_table_slot(op, value) for op in reading) or _feeds_rotation(value, users):
        return False, ""
    lost = names.lost(value.name)
    if any(_is_weight_slot(op, value) for op in reading):
        doubtful = lost and all(op.type == "Gather" for op in reading)
        return True, "a table that is looked up: learned or computed" if doubtful else ""
    if lost and not _reaches_activations(value, users):
        return False, ""
    if lost and value.weight.size <= 1 << 20:
        if _is_mask(value.weight.load()):
            return False, ""
    return True, "an unnamed tensor that is added or multiplied" if lost else ""


def _is_mask(data: np.ndarray) -> bool:
    """Tell whether a table forbids: it holds a huge negative number, or nothing but zero and one negative number."""
    lowest = data.min()
    return bool(lowest <= FORBIDDING or (lowest < 0 and np.isin(data, (0, lowest)).all()))


STRUCTURAL = (
    "Reshape",
    "Concat",
    "Slice",
    "Transpose",
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "Tile",
    "Identity",
    "Cast",
    "Gather",
    "Split",
    "Resize",
)


OF_EACH_ENTRY = ("Exp", "Log", "Neg", "Reciprocal", "Sigmoid", "Softplus", "Tanh")
"""Functions that keep a trained tensor in its range: -exp(a) is negative, whatever a is."""


def _reaches_activations(value: Value, users: dict[Value, list[Op]]) -> bool:
    """Tell whether it meets activations, maybe in another layout, as a function of each entry, or with a mask added."""
    pending, seen = [value], {value}
    while pending:
        for op in users.get(pending.pop(), []):
            for output in op.outputs:
                if output is None or output in seen:
                    continue
                if not output.is_table:
                    return True
                if op.type in (*STRUCTURAL, *OF_EACH_ENTRY, "Add") and not op.domain:
                    seen.add(output)
                    pending.append(output)
    return False


def _is_table_slot(op: Op, value: Value) -> bool:
    first = {"RotaryEmbedding": 1, "GroupQueryAttention": 7}.get(op.type)
    return first is not None and any(each is value for each in op.inputs[first : first + 3])


WEIGHT_SLOTS = {
    "MatMul": (0, 1), "Gemm": (0, 1, 2), "Conv": (1, 2), "ConvTranspose": (1, 2), "LayerNormalization": (1, 2),
    "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,), "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2), "BatchNormalization": (1, 2), "Gather": (0,), "Einsum": (0, 1),
    "SkipLayerNormalization": (2, 3, 4), "SkipSimplifiedLayerNormalization": (2, 3), "BiasGelu": (1,), "FastGelu": (1,),
    "EmbedLayerNormalization": (2, 3, 4, 5, 6), "Attention": (1, 2), "MultiHeadAttention": (3,), "PRelu": (1,),
}  # fmt: skip
"""Where operators expect weights."""


def _is_weight_slot(op: Op, value: Value) -> bool:
    slots = [slot for slot, each in enumerate(op.inputs) if each is value]
    if not set(slots) & set(WEIGHT_SLOTS.get(op.type, ())):
        return False
    return op.type not in ("MatMul", "Gemm", "Einsum") or not all(output.is_table for output in op.outputs)


def _feeds_rotation(value: Value, users: dict[Value, list[Op]]) -> bool:
    """Tell whether it reaches a sine or cosine through tables."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        for op in users.get(each, []):
            if op.type in ("Cos", "Sin"):
                return True
            for output in op.outputs:
                if output is not None and output.is_table and output not in seen:
                    seen.add(output)
                    pending.append(output)
    return False


def _split(value: Value, reading: list[Op], trainable: bool, names: Names) -> list[tuple[Value, str, list[str]]]:
    """Give a shared vector one value per layer that reads it, and a shared matrix its other names."""
    if not trainable:
        return [(value, names.own(value), [])]
    paths = {}
    for op in reading:
        paths[op] = names.of(value, op)
    distinct = without_repeats(list(dict.fromkeys(paths.values())))
    own = distinct[0] if names.lost(value.name) or names.own(value) not in distinct else names.own(value)
    if len(value.weight.shape) > 1 or len(distinct) == 1:
        return [(value, own, [path for path in distinct if path != own])]
    parts = {own: value}
    for op, path in paths.items():
        path = path if path in distinct else own
        if path not in parts:
            parts[path] = Value(value.name, None, value.weight, dims=value.dims, dtype=value.dtype)
        op.inputs = [parts[path] if each is value else each for each in op.inputs]
    return [(part, path, []) for path, part in parts.items()]


def spread_tables(program: Program) -> None:
    """Work out anew which results depend on no parameter and no float input."""
    for value in program.inputs:
        value.is_table = not value.dtype.is_floating_point
    for op in program.ops:
        for output in op.outputs:
            if output is not None:
                output.is_table = all(each is None or each.is_table for each in op.inputs)
