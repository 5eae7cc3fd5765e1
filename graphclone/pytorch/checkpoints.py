"""Checkpoints: recover names and folded weights by comparing values with the framework's state dict."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from graphclone.errors import InputError
from graphclone.pytorch.known import array
from graphclone.pytorch.naming import Names
from graphclone.pytorch.parameters import Stored, spread_tables
from graphclone.pytorch.pieces import cut, join, of_rank, pieces, rows, spread
from graphclone.pytorch.pretrained import class_buffers
from graphclone.pytorch.program import Program, Value
from graphclone.pytorch.rewriting import new_op, new_value
from graphclone.pytorch.unfolding import unfold, unfold_numbers
from graphclone.pytorch.weight_idioms import turn_readers
from graphclone.weights import Weight

Checkpoint = Mapping[str, object] | str | Path


def read_checkpoint(given: Checkpoint) -> dict[str, np.ndarray]:
    """Return a state dict as arrays: a mapping of tensors, a .safetensors file, or a folder of them.

    Raises: InputError where the path holds no safetensors.
    """
    if isinstance(given, Mapping):
        return {name: _array(value) for name, value in given.items() if hasattr(value, "shape")}
    from safetensors import safe_open

    path = Path(given)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise InputError(f"no safetensors in '{path}'; give a .safetensors file, a folder of them, or a state dict")
    result = {}
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            result |= {name: _array(tensors.get_tensor(name)) for name in tensors.keys()}
    return result


def buffers_of(given: Checkpoint) -> frozenset[str]:
    """Return the names of buffers, where a checkpoint tells them from parameters.

    A state dict of `keep_vars=True` does, and a folder with a config whose class transformers knows.
    """
    if isinstance(given, Mapping):
        is_parameter = {name: isinstance(value, torch.nn.Parameter) for name, value in given.items()}
        return frozenset(name for name, kind in is_parameter.items() if any(is_parameter.values()) and not kind)
    return frozenset(class_buffers(Path(given)))


def _array(value) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype.is_floating_point and value.element_size() < 4 else value
        return value.numpy()
    return np.asarray(value)


@dataclass(frozen=True)
class Recovered:
    """What became of a checkpoint.

    lacking: its tensors that nothing in the program is, by name. differing: names of parameters that the checkpoint has
    with other values. resized: whether it has one with another shape.
    """

    lacking: dict[str, np.ndarray]
    differing: list[str]
    resized: bool


def recover(program: Program, checkpoint: Checkpoint, names: Names) -> Recovered:
    """Name parameters after the checkpoint's tensors of equal value.

    A tensor that is a checkpoint's plus one (a norm that keeps its offset apart) is stored as the checkpoint has it, as
    is one that was computed from others. A tensor under several names in the checkpoint gets them all.
    """
    tensors = read_checkpoint(checkpoint)
    names.buffers = buffers_of(checkpoint)
    stored = [value for value in program.values() if value.parameter is not None and value.known is None]
    parts = {value: value.parameter for value in stored if value.parameter.trainable or _may_be_learned(value, names)}
    free = set(tensors)
    for each in {value.parameter: None for value in stored}:
        each.aliases = [path for path in each.aliases if path not in tensors or _holds(each, tensors[path])]
        held = {path for path in (each.path, *each.aliases) if path in tensors and _holds(each, tensors[path])}
        each.persistent |= bool(held)
        free -= held
    _rename(program, parts, tensors, free)
    for each in parts.values():
        paths = [each.path, *each.aliases]
        known = [path for path in paths if path in tensors]
        if known:
            each.path, *each.aliases = known + [path for path in paths if path not in known and names.given(path)]
    unknown = [value for value, each in parts.items() if each.path not in tensors or each.path in free]
    for value in [value for value, each in parts.items() if each.path in names.buffers]:
        value.parameter.trainable, value.parameter.persistent, value.is_table = False, True, True
    _join_and_cut(program, unknown, tensors, free)
    read = {value for op in program.ops for value in op.inputs}
    unknown = [value for value in stored if value in read and value.parameter.path not in tensors.keys() - free]
    unfold(program, [(value, load_stored(value.parameter)) for value in unknown], tensors, free, names)
    unfold_numbers(program, tensors, free, names)
    spread_tables(program)
    left = {value.parameter for value in program.values() if value.parameter is not None and value.known is None}
    differing = sorted({each.path for each in left} & free)
    resized = any(each.shape != tensors[each.path].shape for each in left if each.path in tensors)
    return Recovered({name: tensors[name] for name in sorted(free.difference(differing))}, differing, resized)


def _holds(stored: Stored, tensor: np.ndarray) -> bool:
    """Tell whether a parameter has the values of the checkpoint's tensor."""
    return stored.shape == tensor.shape and np.array_equal(own := load_stored(stored), tensor.astype(own.dtype))


def _may_be_learned(value: Value, names: Names) -> bool:
    """Tell whether a nameless table is worth looking up in the checkpoint: floats that are not all the same."""
    stored = value.parameter
    if not stored.dtype.is_floating_point or not names.lost(stored.path) or stored.weight.size < 2:
        return False
    return bool(np.ptp(np.asarray(stored.weight.load(), np.float64)))


def _rename(program: Program, parts: Mapping[Value, Stored], tensors: dict[str, np.ndarray], free: set[str]) -> None:
    """Call what has the values of one of the `free` tensors as the checkpoint does."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(free):
        by_shape.setdefault(tensors[name].shape, []).append(name)
    for value, each in parts.items():
        candidates = [name for name in by_shape.get(each.shape, []) if name in free]
        held = each.path in tensors and each.path not in free
        if held and not candidates:
            continue
        own = load_stored(each)
        same = [name for name in candidates if np.array_equal(own, tensors[name].astype(own.dtype))]
        unique = own.ndim > 1 or len(same) == 1
        if not held:
            if same and unique:
                each.path, each.unsure = same.pop(0), ""
                free.discard(each.path)
                _train(value)
            elif not same and not _turn(program, value, own, by_shape, tensors, free):
                _offset(program, value, own, [name for name in candidates if name in free], tensors, free)
        if unique:
            each.aliases += same
            free -= set(same)


def _train(value: Value) -> None:
    """Let what the checkpoint holds be a parameter."""
    value.parameter.trainable = value.parameter.persistent = True
    value.is_table = False


def _join_and_cut(program: Program, unknown: list[Value], tensors: dict[str, np.ndarray], free: set[str]) -> None:
    """Take apart what is several tensors of the checkpoint side by side, and put together what is a part of one."""
    unknown = [value for value in unknown if any(value in op.inputs for op in program.ops)]
    for value in list(unknown):
        own, scope = load_stored(value.parameter), value.parameter.path.rpartition(".")[0]
        forms = [np.squeeze(own), *([] if rows(own) is None else [rows(own)])]
        same = [name for name in sorted(free) if any(np.array_equal(np.squeeze(tensors[name]), each) for each in forms)]
        same = [name for name in same if name.rpartition(".")[0] == scope] or same
        if len(same) == 1 and tensors[same[0]].ndim != value.rank:
            spread(program, value, same[0], tensors[same[0]])
            free.discard(same[0])
            unknown.remove(value)
    for value in sorted(unknown, key=lambda value: -value.rank):
        candidates = {name: tensors[name] for name in sorted(free) if tensors[name].ndim == value.rank}
        blocks = {name: name.rpartition(".")[0].rpartition(".")[0] for name in candidates}
        found = pieces(load_stored(value.parameter), candidates, blocks)
        if found is not None:
            join(program, value, found, tensors)
            free -= {name for name, _ in found[1]}
            unknown.remove(value)
    own = {value: load_stored(value.parameter) for value in unknown}
    for name in sorted(free):
        forms = {value: of_rank(each, tensors[name].ndim) for value, each in own.items()}
        found = pieces(tensors[name], {value: form for value, form in forms.items() if form is not None})
        if found is not None:
            cut(program, name, tensors[name], found)
            free.discard(name)
            for value, _ in found[1]:
                del own[value]


def _turn(program: Program, value: Value, own: np.ndarray, by_shape, tensors, free: set[str]) -> bool:
    """Store a matrix as the checkpoint does where that is (in, out)."""
    if own.ndim != 2:
        return False
    names = [name for name in by_shape.get(own.shape[::-1], []) if name in free]
    names = [name for name in names if np.array_equal(own.T, tensors[name].astype(own.dtype))]
    if len(names) != 1 or not turn_readers(program, value):
        return False
    stored = value.parameter
    stored.path, stored.unsure, stored.transposed = names[0], "", not stored.transposed
    value.dims = value.dims[::-1]
    free.discard(names[0])
    return True


def load_stored(stored: Stored) -> np.ndarray:
    loaded = np.asarray(stored.weight.load())
    loaded = loaded.reshape(loaded.shape[stored.lead :])
    return loaded.T if stored.transposed else loaded


def _offset(program: Program, value: Value, own: np.ndarray, names: list[str], tensors, free: set[str]) -> None:
    """Store w where the graph holds 1 + w."""
    found = [name for name in names if own.ndim == 1 and np.array_equal(own, (1 + tensors[name]).astype(own.dtype))]
    if len(found) > 1:
        scope = value.parameter.path.rpartition(".")[0]
        found = [name for name in found if name.rpartition(".")[0] == scope]
    if len(found) != 1:
        return
    weight = Weight.of(np.ascontiguousarray(tensors[found[0]].astype(own.dtype)))
    one = new_value("one", (), value.dtype)
    one.known = array(1.0)
    source = Value(
        found[0],
        None,
        weight,
        dims=value.dims,
        dtype=value.dtype,
        parameter=Stored(found[0], weight, value.dtype, True),
    )
    total = new_value(found[0], value.dims, value.dtype)
    readers = [op for op in program.ops if value in op.inputs]
    op = new_op("Add", [source, one], total, readers[0], domain="")
    program.ops.insert(program.ops.index(readers[0]), op)
    for each in readers:
        each.inputs = [total if given is value else given for given in each.inputs]
    free.discard(found[0])
