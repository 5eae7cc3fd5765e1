"""Checkpoints: recover names and folded weights by comparing values with the framework's state dict."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from graphclone.errors import InputError
from graphclone.pytorch.known import array
from graphclone.pytorch.parameters import Stored, spread_tables
from graphclone.pytorch.pieces import cut, join, pieces, spread
from graphclone.pytorch.program import Program, Value
from graphclone.pytorch.rewriting import IDIOMS, new_op, new_value
from graphclone.pytorch.unfolding import unfold
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


def _array(value) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype.is_floating_point and value.element_size() < 4 else value
        return value.numpy()
    return np.asarray(value)


def recover(program: Program, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Name parameters after the checkpoint's tensors of equal value; return the checkpoint's tensors that are left.

    A tensor that is a checkpoint's plus one (a norm that keeps its offset apart) is stored as the checkpoint has it.
    A tensor under several names in the checkpoint gets them all.
    """
    tensors = read_checkpoint(checkpoint)
    stored = [value for value in program.values() if value.parameter is not None and value.known is None]
    parts = {value: value.parameter for value in stored if value.parameter.trainable}
    free = {name for name in tensors if all(name not in (each.path, *each.aliases) for each in parts.values())}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(free):
        by_shape.setdefault(tensors[name].shape, []).append(name)
    for value, each in parts.items():
        candidates = [name for name in by_shape.get(each.shape, []) if name in free]
        if each.path in tensors and not candidates:
            continue
        own = load_stored(each)
        same = [name for name in candidates if np.array_equal(own, tensors[name].astype(own.dtype))]
        if each.path not in tensors:
            if same and (own.ndim > 1 or len(same) == 1):
                each.path, each.unsure = same.pop(0), ""
                free.discard(each.path)
            elif not same and not _turn(program, value, own, by_shape, tensors, free):
                _offset(program, value, own, [name for name in candidates if name in free], tensors, free)
        if own.ndim > 1 or len(same) == 1:
            each.aliases += same
            free -= set(same)
    for each in parts.values():
        known = [path for path in (each.path, *each.aliases) if path in tensors]
        if known:
            each.path, each.aliases = known[0], known[1:]
    _join_and_cut(program, [value for value, each in parts.items() if each.path not in tensors], tensors, free)
    read = {value for op in program.ops for value in op.inputs}
    unknown = [value for value in stored if value.parameter.path not in tensors and value in read]
    unfold(program, [(value, load_stored(value.parameter)) for value in unknown], tensors, free)
    spread_tables(program)
    return {name: tensors[name] for name in sorted(free)}


def _join_and_cut(program: Program, unknown: list[Value], tensors: dict[str, np.ndarray], free: set[str]) -> None:
    """Take apart what is several tensors of the checkpoint side by side, and put together what is a part of one."""
    unknown = [value for value in unknown if any(value in op.inputs for op in program.ops)]
    for value in list(unknown):
        own, scope = np.squeeze(load_stored(value.parameter)), value.parameter.path.rpartition(".")[0]
        same = [name for name in sorted(free) if np.array_equal(np.squeeze(tensors[name]), own)]
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
        found = pieces(tensors[name], {value: each for value, each in own.items() if each.ndim == tensors[name].ndim})
        if found is not None:
            cut(program, name, tensors[name], found)
            free.discard(name)
            for value, _ in found[1]:
                del own[value]


def _turn(program: Program, value: Value, own: np.ndarray, by_shape, tensors, free: set[str]) -> bool:
    """Store a matrix as the checkpoint does where that is (in, out)."""
    readers = [op for op in program.ops if value in op.inputs]
    if own.ndim != 2 or not all(op.domain == IDIOMS and op.type == "Linear" and op[1] is value for op in readers):
        return False
    names = [name for name in by_shape.get(own.shape[::-1], []) if name in free]
    names = [name for name in names if np.array_equal(own.T, tensors[name].astype(own.dtype))]
    if len(names) != 1:
        return False
    stored = value.parameter
    stored.path, stored.unsure, stored.transposed = names[0], "", not stored.transposed
    value.dims = value.dims[::-1]
    free.discard(names[0])
    for op in readers:
        op.attributes["transposed"] = not op.attributes.get("transposed", False)
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
