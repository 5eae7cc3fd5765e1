"""PyTorch rules of operators that move entries and keep their values."""

import math

import numpy as np

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.known import torch_type
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.registry import rule
from graphclone.pytorch.sizes import Integer, Size, operation, probe_of


@rule("Transpose")
def transpose(op: Op) -> Code:
    order = [int(axis) for axis in op.attribute("perm") or reversed(range(op[0].rank))]
    moved = [position for position, axis in enumerate(order) if position != axis]
    if not moved:
        return Code("{}", op[0])
    if len(moved) == 2:
        if moved == [op[0].rank - 2, op[0].rank - 1]:
            return Code("{}.mT", op[0])
        return Code("{}.transpose({}, {})", op[0], *moved)
    return Code("{}.permute({})", op[0], tuple(order))


@rule("Reshape")
def reshape(op: Op) -> Code:
    """Reshape by the sizes; a split or merge of neighbouring axes needs none of the others."""
    target = reshape_target(op)
    source = op[0].dims
    if tuple(target) == tuple(source):
        return Code("{}", op[0])
    same = 0
    while same < min(len(source), len(target)) and source[same] == target[same]:
        same += 1
    tail = 0
    while tail < min(len(source), len(target)) - same and source[-1 - tail] == target[-1 - tail]:
        tail += 1
    old, new = source[same : len(source) - tail], target[same : len(target) - tail]
    if len(old) == 1 and len(new) > 1 and all(isinstance(size, int) for size in new):
        return Code("{}.unflatten({}, {})", op[0], same - len(source) if not tail else same, tuple(new))
    if len(new) == 1 and len(old) > 1:
        last = same + len(old) - 1
        return Code("{}.flatten({})" if last == len(source) - 1 else "{}.flatten({}, {})", op[0], same, last)
    if not old and len(new) == 1 and new[0] == 1:
        return Code("{}.unsqueeze({})", op[0], same)
    if not new and len(old) == 1 and old[0] == 1:
        return Code("{}.squeeze({})", op[0], same)
    dynamic = [size for size in target if isinstance(size, Size)]
    if len(dynamic) == 1 and -1 not in target:
        target = [-1 if isinstance(size, Size) else size for size in target]
    return Code("{}.reshape({})", op[0], tuple(target))


def reshape_target(op: Op) -> list[Integer]:
    """Return the sizes a Reshape asks for: zeros copied, a -1 worked out where the division is exact."""
    target = list(op.integers(1, "shape"))
    if not op.attribute("allowzero", 0):
        target = [op[0].dims[position] if size == 0 else size for position, size in enumerate(target)]
    if -1 in target:
        rest = math.prod(size for size in target if not (isinstance(size, int) and size == -1))
        if isinstance(rest, Size) or rest:
            target[target.index(-1)] = math.prod(op[0].dims) // rest
    return target


@rule("Flatten")
def flatten(op: Op) -> Code:
    axis = op.axis(1) if op.axis(1) >= 0 else op.axis(1) + op[0].rank
    if axis == 1:
        return Code("{}.flatten(1)", op[0]) if op[0].rank > 1 else Code("{}.unsqueeze(1)", op[0])
    return Code("{}.reshape({})", op[0], (math.prod(op[0].dims[:axis]), math.prod(op[0].dims[axis:])))


@rule("Squeeze")
def squeeze(op: Op) -> Code:
    axes = op.integers(1, "axes")
    if axes is None:
        axes = [axis for axis, size in enumerate(op[0].dims) if isinstance(size, int) and size == 1]
    return Code("{}.squeeze({})", op[0], axes[0] if len(axes) == 1 else tuple(axes))


@rule("Unsqueeze")
def unsqueeze(op: Op) -> Code:
    """Insert axes of one; several become an index with None."""
    axes = op.integers(1, "axes")
    if len(axes) == 1:
        return Code("{}.unsqueeze({})", op[0], axes[0])
    rank = op[0].rank + len(axes)
    places = {axis % rank for axis in axes}
    index = ["None" if axis in places else ":" for axis in range(rank)]
    while index and index[-1] == ":":
        index.pop()
    return Code("{}[" + ", ".join(index) + "]", op[0])


@rule("Concat")
def concat(op: Op) -> Code:
    return Code("torch.cat({}, dim={})", tuple(op.inputs), op.axis(0))


@rule("Split")
def split(op: Op) -> Code:
    if len(op.outputs) == 1:
        return Code("{}", op[0])
    axis = op.axis(0)
    sizes = op.integers(1, "split")
    length = op[0].dims[axis]
    if sizes is None:
        count = int(op.attribute("num_outputs", len(op.outputs)))
        return Code("{}.chunk({}, dim={})", op[0], count, axis)
    if all(size == sizes[0] for size in sizes) and length == sizes[0] * len(sizes):
        return Code("{}.chunk({}, dim={})", op[0], len(sizes), axis)
    return Code("{}.split({}, dim={})", op[0], tuple(sizes), axis)


@rule("Slice")
def slices(op: Op) -> Code:
    """Index with slices; a negative step flips first, and counts both ends from the other side."""
    starts, ends = op.integers(1, "starts"), op.integers(2, "ends")
    axes = op.integers(3, "axes") or list(range(len(starts)))
    steps = op.integers(4) or [1] * len(starts)
    source: Value | Code = op[0]
    index = ["" for _ in range(op[0].rank)]
    index = [":"] * op[0].rank
    bounds: dict[int, list] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= op[0].rank
        if not isinstance(step, int):
            raise Unsupported("its step depends on sizes")
        if step < 0:
            source = Code("{}.flip({})", source, axis)
            start, end = (_mirrored(each, op[0].dims[axis]) for each in (start, end))
        begin, end = _start(start), _end(end, op[0].dims[axis])
        if step != -1 or begin is not None or end is not None:
            bounds[axis] = [begin, end, None if abs(step) == 1 else abs(step)]
    operands = []
    for axis, parts in bounds.items():
        begin, end, step = parts
        index[axis] = (
            ("" if begin is None else "{}") + ":" + ("" if end is None else "{}") + ("" if step is None else ":{}")
        )
    for axis in sorted(bounds):
        operands += [part for part in bounds[axis] if part is not None]
    while index and index[-1] == ":":
        index.pop()
    if not index:
        return source if isinstance(source, Code) else Code("{}", source)
    if len(index) > 2 and all(part == ":" for part in index[:-1]):
        return Code("{}[..., " + ", ".join([index[-1]] + [":"] * (op[0].rank - len(index))) + "]", source, *operands)
    return Code("{}[" + ", ".join(index) + "]", source, *operands)


def _mirrored(place: Integer, size: Integer) -> Integer:
    """Return where a place is once its axis is flipped; before the first entry is behind the last."""
    if not isinstance(place, int):
        raise Unsupported("a negative step between ends that depend on sizes has no PyTorch counterpart")
    if place < 0:
        return -1 - place
    if place >= 2**31 - 1:
        return 0
    return max(size - 1 - place, 0) if isinstance(size, int) else operation("max({}, {})", max, size - 1 - place, 0)


def _start(start: Integer) -> Integer | None:
    return None if isinstance(start, int) and (start == 0 or start < -(2**31)) else start


def _end(end: Integer, size: Integer) -> Integer | None:
    return None if (isinstance(end, int) and end >= 2**31 - 1) or end == size else end


@rule("Expand")
def expand(op: Op) -> Code:
    """Broadcast; axes that keep their size are -1."""
    target = op.integers(1)
    if op[0].known is not None and op[0].scalar is not None:
        target = [1] * (op[0].rank - len(target)) + list(target)
        return Code("torch.full({}, {}, dtype={}, device={})", tuple(target), op[0].scalar, op[0].dtype, DEVICE)
    source = (1,) * (len(target) - op[0].rank) + tuple(op[0].dims)
    shape = []
    for size, wanted in zip(source[len(source) - len(target) :], target, strict=True):
        kept = (isinstance(wanted, int) and wanted == 1) or probe_of(size) == probe_of(wanted)
        shape.append(-1 if kept else wanted)
    extra = op[0].rank - len(target)
    if all(size == -1 for size in shape) and len(target) <= op[0].rank:
        return Code("{}", op[0])
    head = [1 if size == -1 and position < len(target) - op[0].rank else size for position, size in enumerate(shape)]
    return Code("{}.expand({})", op[0], tuple([-1] * max(extra, 0) + head))


@rule("Tile")
def tile(op: Op) -> Code:
    repeats = op.integers(1)
    if all(isinstance(each, int) and each == 1 for each in repeats):
        return Code("{}", op[0])
    return Code("{}.repeat({})", op[0], tuple(repeats))


@rule("Pad")
def pad(op: Op) -> Code:
    pads = op.integers(1, "pads")
    axes = op.integers(3) or list(range(op[0].rank))
    both = [(0, 0)] * op[0].rank
    for position, axis in enumerate(axes):
        both[axis] = (pads[position], pads[position + len(axes)])
    while both and both[0] == (0, 0):
        both = both[1:]
    flat = tuple(entry for pair in both[::-1] for entry in pair)
    if not flat:
        return Code("{}", op[0])
    mode = op.attribute("mode", "constant")
    if mode == "constant":
        fill = op[2] if op[2] is not None else float(op.attribute("value", 0.0))
        if isinstance(fill, Value):
            fill = fill.scalar if fill.scalar is not None else Code("{}.item()", fill)
        return Code("F.pad({}, {}, value={})", op[0], flat, fill)
    word = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode]
    flat += (0, 0) if len(flat) == 2 and op[0].rank == 4 else ()
    if len(flat) == 2 * op[0].rank:  # torch wants an axis before those it pads
        return Code("F.pad({}[None], {}, mode={})[0]", op[0], flat, word)
    return Code("F.pad({}, {}, mode={})", op[0], flat, word)


@rule("ConstantOfShape")
def constant_of_shape(op: Op) -> Code:
    value = op.attribute("value")
    fill = (value if value is not None else np.zeros(1, np.float32)).reshape(-1)[0].item()
    return Code(
        "torch.full({}, {}, dtype={}, device={})", tuple(op.integers(0)), fill, op.output.dtype or _dtype(value), DEVICE
    )


def _dtype(value):
    import torch

    return torch.float32 if value is None else torch.from_numpy(np.zeros(1, value.dtype)).dtype


def _size_behind(value: Value) -> Value:
    """Return the size that a conversion to floats was made from."""
    op = value.op
    converted = value.known is None and op is not None and not op.domain and op.type in ("Cast", "CastLike")
    return op[0] if converted and op[0].known is not None else value


@rule("Range")
def arange(op: Op) -> Code:
    bounds = [_size_behind(each) for each in op.inputs]
    start, limit, step = (each if each.known is not None else Code("int({})", each) for each in bounds)
    words = [limit] if _is(start, 0) and _is(step, 1) else [start, limit] if _is(step, 1) else [start, limit, step]
    dtype = op[0].dtype
    if dtype == _int64():
        return Code("torch.arange(" + "{}, " * len(words) + "device={})", *words, DEVICE)
    return Code("torch.arange(" + "{}, " * len(words) + "dtype={}, device={})", *words, dtype, DEVICE)


def _int64():
    import torch

    return torch.int64


def _is(value, number: int) -> bool:
    return (
        isinstance(value, Value)
        and value.scalar is not None
        and not isinstance(value.scalar, Size)
        and value.scalar == number
    )


@rule("Trilu")
def trilu(op: Op) -> Code:
    diagonal = 0 if op[1] is None else op.integers(1)[0]
    return Code("torch.triu({}, {})" if op.attribute("upper", 1) else "torch.tril({}, {})", op[0], diagonal)


@rule("DepthToSpace")
def depth_to_space(op: Op) -> Code:
    block = int(op.attribute("blocksize"))
    if op.attribute("mode", "DCR") == "CRD":
        return Code("F.pixel_shuffle({}, {})", op[0], block)
    batch, channels, height, width = op[0].dims
    split = Code("{}.reshape({})", op[0], (batch, block, block, channels // block**2, height, width))
    moved = Code("{}.permute(0, 3, 4, 1, 5, 2)", split)
    return Code("{}.reshape({})", moved, (batch, channels // block**2, height * block, width * block))


@rule("SpaceToDepth")
def space_to_depth(op: Op) -> Code:
    block = int(op.attribute("blocksize"))
    batch, channels, height, width = op[0].dims
    split = Code("{}.reshape({})", op[0], (batch, channels, height // block, block, width // block, block))
    moved = Code("{}.permute(0, 3, 5, 1, 2, 4)", split)
    return Code("{}.reshape({})", moved, (batch, channels * block**2, height // block, width // block))


@rule("Resize")
def resize(op: Op) -> Code:
    """Interpolate the spatial axes, in the modes that torch has."""
    if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy has no PyTorch counterpart")
    mode, antialias = op.attribute("mode", "nearest"), bool(op.attribute("antialias", 0))
    outside = bool(op.attribute("exclude_outside", 0))
    if antialias and not outside:
        raise Unsupported("antialias=1 without exclude_outside=1 has no PyTorch counterpart")
    words, targets = _resized(op)
    if mode == "nearest":
        return Code("F.interpolate({}, " + words + ", mode={})", op[0], targets, _nearest(op, words, targets))
    coordinates = op.attribute("coordinate_transformation_mode", "half_pixel" if op.opset >= 11 else "asymmetric")
    cubic = -0.5 if antialias else -0.75
    if mode == "cubic" and (float(op.attribute("cubic_coeff_a", -0.75)) != cubic or outside != antialias):
        raise Unsupported(f"cubic_coeff_a other than {cubic} and exclude_outside have no PyTorch counterpart here")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise Unsupported(f"coordinate_transformation_mode={coordinates} has no PyTorch counterpart")
    if coordinates == "pytorch_half_pixel" and "size={}" in words and 1 in targets:
        raise Unsupported("coordinate_transformation_mode=pytorch_half_pixel to a size of 1 has no PyTorch counterpart")
    names = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    if (mode, len(targets)) not in names:
        raise Unsupported(f"mode={mode} over {len(targets)} axes has no PyTorch counterpart")
    text = "F.interpolate({}, " + words + ", mode={}, align_corners={}" + (", antialias=True)" if antialias else ")")
    return Code(text, op[0], targets, names[mode, len(targets)], coordinates == "align_corners")


def _resized(op: Op) -> tuple[str, tuple]:
    """Return the argument that says to which sizes, or by which factors, each axis behind the first two is resized.

    A factor is said where no whole size has the same ratio, since both operators interpolate by it.
    """
    rank, dims = op[0].rank, op[0].dims
    scales, sizes = (op.integers(1), None) if op.opset < 11 else (op.integers(2), op.integers(3))
    places = [int(axis) % rank for axis in op.attribute("axes") or range(rank)]
    targets: list = list(dims)
    factors = [1.0] * rank
    for place, entry in zip(places, sizes or scales, strict=True):
        if sizes:
            targets[place] = entry
            continue
        factors[place] = float(entry)
        whole = entry == int(entry)
        wanted = dims[place] * (int(entry) if whole else entry) if whole or _fixed(dims[place]) else None
        targets[place] = int(wanted) if _fixed(wanted) and wanted == int(wanted) else wanted
    if any(targets[axis] != dims[axis] for axis in (0, 1)):
        raise Unsupported("resizing the first two axes has no PyTorch counterpart")
    if all(isinstance(target, Integer) for target in targets):
        return "size={}", tuple(targets[2:])
    return "scale_factor={}", tuple(factors[2:])


def _fixed(size) -> bool:
    return isinstance(size, int | float)


def _nearest(op: Op, words: str, targets: tuple) -> str:
    """Return torch's name for how the nearest entry is chosen."""
    coordinates = op.attribute("coordinate_transformation_mode", "half_pixel" if op.opset >= 11 else "asymmetric")
    rounding = op.attribute("nearest_mode", "round_prefer_floor" if op.opset >= 11 else "floor")
    if coordinates == "asymmetric" and rounding == "floor":
        return "nearest"
    if coordinates in ("half_pixel", "pytorch_half_pixel") and rounding in ("round_prefer_floor", "round_prefer_ceil"):
        pairs = list(zip(op[0].dims[2:], targets, strict=True)) if words == "size={}" else [(None, None)]
        if rounding == "round_prefer_floor" and all(isinstance(pair[0] and pair[1] // pair[0], int) for pair in pairs):
            if all(pair[1] == pair[0] * (pair[1] // pair[0]) for pair in pairs):
                return "nearest"
        if rounding == "round_prefer_ceil" or not any(_ties(*pair) for pair in pairs):
            return "nearest-exact"
    raise Unsupported(
        f"nearest_mode={rounding} with coordinate_transformation_mode={coordinates} has no PyTorch counterpart here"
    )


def _ties(size: Integer | None, target: Integer | None) -> bool:
    """Tell whether an entry may lie half way between two."""
    if not isinstance(size, int) or not isinstance(target, int):
        return True
    return any((2 * place + 1) * size % (2 * target) == 0 for place in range(target))


@rule("Shape")
def shape(op: Op) -> Code:
    """Give the sizes as a tensor, where something wants them as one."""
    dims = op[0].dims[op.attribute("start", 0) : op.attribute("end", None)]
    return Code("torch.tensor({}, device={})", list(dims), DEVICE)


@rule("EyeLike")
def eye_like(op: Op) -> Code:
    rows, columns = op[0].dims
    dtype = op[0].dtype if op.attribute("dtype") is None else torch_type(op.attribute("dtype"))
    diagonal = int(op.attribute("k", 0))
    if diagonal:
        ones = Code("torch.ones({}, {}, dtype={}, device={})", rows, columns, dtype, DEVICE)
        return Code("{}.tril({}).triu({})", ones, diagonal, diagonal)
    return Code("torch.eye({}, {}, dtype={}, device={})", rows, columns, dtype, DEVICE)
