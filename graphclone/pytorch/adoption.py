"""Adoption: names that the exporter's signature lists and the graph seems to lack, given to what must be theirs."""

import numpy as np

from graphclone.pytorch.checkpoints import Recovered
from graphclone.pytorch.naming import Names
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import new_op, new_value
from graphclone.weights import Weight


def adopt(program: Program, names: Names, found: Recovered | None = None) -> list[str]:
    """Name looked-up tables and ties after parameters that nothing else is; return a line for each assumption.

    A whole table looked up at export (positions 0, 1, 2, ...) is a plain tensor in the graph, and torch lists a
    tied parameter under each of its names though the graph reads one. What the checkpoint holds with values that no
    tensor of the graph has is not tied.
    """
    stored = {
        value: value.parameter for value in program.values() if value.parameter is not None and value.known is None
    }
    used = {path for each in stored.values() for path in (each.path, *each.aliases)}
    others = found.lacking if found is not None else ()
    absent = [
        name for name, kind in names.kinds.items() if kind == "PARAMETER" and name not in used and name not in others
    ]
    users = program.users()
    notes = []
    for value, each in stored.items():
        if not each.unsure or value.rank < 2 or not absent:
            continue
        scopes = {names.scope(op) for op in users[value]}
        fitting = [name for name in absent if _module(_module(name)) in scopes and name.endswith(".weight")]
        if len(scopes) == 1 and len(fitting) == 1 and all(op.type == "Add" for op in users[value]):
            each.path, each.unsure = fitting[0], ""
            absent.remove(fitting[0])
            notes.append(f"{fitting[0]}: the table that is added in '{scopes.pop()}'")
            if value.rank == 3 and value.dims[0] == 1:
                _without_batch(program, value, users[value])
    several = {path for each in stored.values() if each.aliases for path in (each.path, *each.aliases)}
    notes += _zero_biases(program, names, absent)
    for name in absent:
        owners = [each for each in stored.values() if each.trainable and _may_tie(name, [each.path, *each.aliases])]
        if len(owners) > 1 or name.endswith(".bias"):
            owners = [each for each in owners if f"{_module(each.path)}.weight" in several]
        if len(owners) == 1:
            owners[0].aliases.append(name)
            notes.append(f"{name}: tied to {owners[0].path}")
    return notes


def _zero_biases(program: Program, names: Names, absent: list[str]) -> list[str]:
    """Give linear layers back the zero bias that the exporter left out."""
    notes = []
    for op in program.ops:
        if op.type != "Linear" or op[2] is not None:
            continue
        told = [name for name in names.told(op) if name in absent and name.endswith(".bias")]
        if len(told) != 1:
            continue
        size = op.output.dims[-1]
        weight = Weight.of(np.zeros(size, op[1].weight.dtype))
        stored = Stored(told[0], weight, op[1].dtype, True)
        op.inputs = [*op.inputs[:2], Value(told[0], None, weight, dims=(size,), dtype=op[1].dtype, parameter=stored)]
        absent.remove(told[0])
        notes.append(f"{told[0]}: zero, since the exporter left it out")
    return notes


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _may_tie(name: str, paths: list[str]) -> bool:
    """Tell whether `name` could be one more: `cls.bias` of `cls.decoder.bias`, `shared.weight` of two embeddings."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return any(path.endswith(".bias") and _module(_module(path)) == _module(name) for path in paths)
    paths = [path for path in paths if "embed" in path]
    if leaf != "weight" or len(paths) < 2:
        return False
    parts = [path.split(".") for path in paths]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    return _module(_module(name)) == ".".join(parts[0][:common])


def _without_batch(program: Program, value: Value, reading: list[Op]) -> None:
    """Store a table (1, n, d) as the (n, d) it was."""
    table = value.parameter
    table.lead = 1
    lifted = new_value(value.name, value.dims, value.dtype)
    source = Value(value.name, None, value.weight, dims=value.dims[1:], dtype=value.dtype, parameter=table)
    axes = new_value("axes", (1,), value.dtype)
    from graphclone.pytorch.known import array

    axes.known, axes.is_table = array([0]), True
    op = new_op("Unsqueeze", [source, axes], lifted, reading[0], domain="")
    program.ops.insert(program.ops.index(reading[0]), op)
    for each in reading:
        each.inputs = [lifted if given is value else given for given in each.inputs]
