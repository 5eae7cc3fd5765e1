"""Idioms of layout: operators that do nothing, chains of transposes and reshapes, repeated work."""

from graphclone.pytorch.code import Code
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.registry import RULES
from graphclone.pytorch.rewriting import Result, Uses, made_by, new_op, reshape, rewrite, swap_last, transpose


def drop_idle(op: Op, uses: Uses) -> Result:
    """Remove what passes its input through."""
    if len([output for output in op.outputs if output is not None]) != 1 or op.outputs[0] is None:
        return None
    if op.code is not None and op.type in PASSING and not op.domain:
        code = RULES[op.key](op)
        if isinstance(code, Code) and code.template == "{}" and isinstance(code.operands[0], Value):
            return code.operands[0]
    return None


NEUTRAL = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0, "And": True, "Or": False, "Pow": 1}


def drop_neutral(op: Op, uses: Uses) -> Result:
    """Remove a product with one, a sum with zero, an And with True, a choice that is made."""
    if op.type == "Where" and not op.domain and isinstance(op[0].scalar, bool):
        taken = op[1] if op[0].scalar else op[2]
        return taken if taken.known is None and tuple(taken.dims) == tuple(op.output.dims) else None
    if op.domain or op.type not in NEUTRAL:
        return None
    for slot in (1, 0) if op.type in ("Mul", "Add", "And", "Or") else (1,):
        scalar, other = op[slot].scalar, op[1 - slot]
        if isinstance(scalar, bool | int | float) and scalar == NEUTRAL[op.type] and other.known is None:
            if tuple(other.dims) == tuple(op.output.dims):
                return other
    return None


PASSING = ("Identity", "Cast", "CastLike", "Dropout", "Reshape", "Expand", "Transpose", "Tile", "Pad", "Slice")


def swap_by_reshape(op: Op, uses: Uses) -> Result:
    """Reshape (b, h, s, d) to (b*h, s, d), transpose the last two, reshape back: one transpose."""
    if op.type != "Reshape" or op.domain:
        return None
    middle = made_by(op[0], "Transpose")
    first = made_by(middle[0], "Reshape") if middle is not None else None
    if first is None or list(middle.attribute("perm") or ()) != [0, 2, 1] or first[0].rank < 3:
        return None
    source, wanted = first[0], op.output.dims
    if tuple(first.output.dims[1:]) != tuple(source.dims[-2:]):
        return None
    if tuple(wanted) != (*source.dims[:-2], source.dims[-1], source.dims[-2]):
        return None
    return transpose(source, swap_last(source.rank), op, op.output)


def merge_transposes(op: Op, uses: Uses) -> Result:
    """Compose a transpose of a transpose."""
    if op.type != "Transpose" or op.domain:
        return None
    before = made_by(op[0], "Transpose")
    if before is None or not op.attribute("perm") or not before.attribute("perm"):
        return None
    order = [before.attribute("perm")[axis] for axis in op.attribute("perm")]
    if order == list(range(len(order))):
        return before[0]
    return transpose(before[0], order, op, op.output)


def merge_reshapes(op: Op, uses: Uses) -> Result:
    """Compose a reshape of a reshape, an Unsqueeze, a Squeeze or a Flatten."""
    if op.type not in RESHAPES or op.domain or op[0].known is not None:
        return None
    before = made_by(op[0], *RESHAPES)
    if before is None or not uses.once(op[0]):
        return None
    if tuple(before[0].dims) == tuple(op.output.dims):
        return before[0]
    return reshape(before[0], op.output.dims, op, op.output)


RESHAPES = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


def share_repeated(program: Program) -> None:
    """Compute equal things once: a mask that each layer builds anew, a table of cosines.

    The branches of an If share nothing, so that each remains a whole model.
    """
    seen: dict[tuple, Op] = {}

    def share(op: Op, uses: Uses) -> Result:
        if len(op.outputs) != 1 or op.type in ("RandomNormal", "RandomUniform", "Bernoulli", "Dropout"):
            return None
        key = (op.key, tuple(map(_identity, op.inputs)), repr(sorted(op.attributes.items(), key=lambda item: item[0])))
        places = [op.inside[:depth] for depth in range(len(op.inside) + 1)]
        twin = next((seen[place, key] for place in places if (place, key) in seen), None)
        seen.setdefault((op.inside, key), op)
        return None if twin is None else twin.output

    rewrite(program, share)


def _identity(value: Value | None):
    if value is None or value.known is None:
        return id(value)
    return value.dtype, value.known.shape, tuple(value.known.reshape(-1))


def one_chunk_for_halves(op: Op, uses: Uses) -> Result:
    """Write Concat(Neg(x[.., n:]), x[.., :n]) as rotate_half(x)."""
    if op.type != "Concat" or op.domain or len(op.inputs) != 2 or op.output.known is not None:
        return None
    axis = op.axis(0) % op.output.rank
    negative = made_by(op[0], "Neg")
    high, low = made_by(negative[0] if negative else None, "Slice", "Split"), made_by(op[1], "Slice", "Split")
    if negative is None or axis != op.output.rank - 1:
        return None
    high_value, low_value = negative[0], op[1]
    source = high_value.op[0] if high_value.op is not None and high_value.op.type in ("Slice", "Split") else None
    if (
        source is None
        or low_value.op is None
        or low_value.op.type not in ("Slice", "Split")
        or low_value.op[0] is not source
    ):
        return None
    size = source.dims[-1]
    if not isinstance(size, int) or size % 2 or high_value.dims[-1] != size // 2 or low_value.dims[-1] != size // 2:
        return None
    if _offset(high_value, axis) != size // 2 or _offset(low_value, axis) != 0:
        return None
    del high, low
    return new_op("RotateHalf", [source], op.output, op)


def _offset(value: Value, axis: int) -> int | None:
    """Return where along the axis a slice or split part starts, if it is the only axis cut."""
    op = value.op
    source = op[0]
    if any(a != b for position, (a, b) in enumerate(zip(source.dims, value.dims, strict=True)) if position != axis):
        return None
    if op.type == "Split":
        if op.axis(0) % source.rank != axis:
            return None
        place = op.outputs.index(value)
        return sum(output.dims[axis] for output in op.outputs[:place])
    starts, axes, steps = op.integers(1, "starts"), op.integers(3, "axes"), op.integers(4)
    axes = list(range(len(starts))) if axes is None else [each % source.rank for each in axes]
    if axis not in axes or (steps is not None and any(step != 1 for step in steps)):
        return None
    start = starts[axes.index(axis)]
    if not isinstance(start, int):
        return None
    return start + source.dims[axis] if start < 0 else start
