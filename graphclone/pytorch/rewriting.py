"""Rewriting: one forward walk that lets a function replace operators, and what patterns need to look backwards."""

import itertools
from collections.abc import Callable, Sequence

import torch

from graphclone.pytorch.known import array
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.sizes import Integer

IDIOMS = "graphclone"
"""The domain of operators that the idioms introduce."""

Result = Value | Op | Sequence[Op] | None


def rewrite(program: Program, function: Callable[["Op", "Uses"], Result]) -> None:
    """Offer every operator to `function`, inputs first.

    It returns None to keep the operator, a value that takes the place of its output, or operators to put in its
    place, of which the last has the output of the old one.
    """
    uses = Uses(program)
    instead: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in program.ops:
        op.inputs = [instead.get(each, each) for each in op.inputs]
        result = function(op, uses)
        if result is None:
            ops.append(op)
        elif isinstance(result, Value):
            instead[op.output] = result
        else:
            ops.extend([result] if isinstance(result, Op) else result)
    program.ops = ops
    program.outputs = [instead.get(each, each) for each in program.outputs]
    program.prune()


class Uses:
    """How often each value is read, graph outputs included."""

    def __init__(self, program: Program):
        self.count: dict[Value, int] = {}
        for each in itertools.chain(program.outputs, *(op.inputs for op in program.ops)):
            if each is not None:
                self.count[each] = self.count.get(each, 0) + 1

    def once(self, value: Value) -> bool:
        """Tell whether exactly one operator reads it, or it is new."""
        return self.count.get(value, 1) <= 1


def made_by(value: Value | None, *types: str) -> Op | None:
    """Return the operator of one of these standard types that made the value, or None."""
    op = value.op if value is not None else None
    return op if op is not None and not op.domain and op.type in types and op.outputs[0] is value else None


def idiom(value: Value | None, kind: str) -> Op | None:
    """Return the idiom operator of this type that made the value, or None."""
    op = value.op if value is not None else None
    return op if op is not None and op.domain == IDIOMS and op.type == kind else None


def number(value: Value | None) -> float | None:
    """Return the plain number a value is, or None."""
    if value is None or value.known is None:
        return None
    scalar = value.scalar
    return scalar if isinstance(scalar, int | float) and not isinstance(scalar, bool) else None


def is_number(value: Value | None, wanted: float, tolerance: float = 1e-5) -> bool:
    given = number(value)
    return given is not None and abs(given - wanted) <= tolerance * max(1.0, abs(wanted))


def operands(op: Op, test: Callable[[Value], bool]) -> tuple[Value, Value] | None:
    """Return (one that passes, the other) of a commutative operator's two inputs."""
    first, second = op.inputs[:2]
    if test(second):
        return second, first
    return (first, second) if test(first) else None


def factors(value: Value, uses: Uses, root: bool = True) -> list[Value]:
    """Return what a tree of Mul multiplies."""
    op = made_by(value, "Mul")
    if op is None or not (root or uses.once(value)):
        return [value]
    return [each for operand in op.inputs for each in factors(operand, uses, root=False)]


_fresh = itertools.count()


def new_value(name: str, dims: Sequence[Integer], dtype: torch.dtype) -> Value:
    """Return a value that no graph named."""
    return Value(f"{name}#{next(_fresh)}", dims=tuple(dims), dtype=dtype)


def known_value(sizes: Sequence[Integer]) -> Value:
    """Return integers as an operand."""
    value = new_value("sizes", (len(sizes),), torch.int64)
    value.known, value.is_table = array(list(sizes)), True
    return value


def new_op(
    kind: str, inputs: Sequence[Value | None], output: Value, like: Op, domain: str = IDIOMS, **attributes
) -> Op:
    """Return an operator in the place of `like` and make it the maker of `output`."""
    place = {"name": like.name, "scope": like.scope, "fx": like.fx, "opset": like.opset, "inside": like.inside}
    op = Op(kind, list(inputs), [output], attributes, domain, **place)
    output.op = op
    return op


def reshape(value: Value, dims: Sequence[Integer], like: Op, output: Value | None = None) -> Op:
    """Return a Reshape to these sizes."""
    output = output or new_value(f"{value.name}.view", dims, value.dtype)
    return new_op("Reshape", [value, known_value(dims)], output, like, domain="", allowzero=1)


def transpose(value: Value, order: Sequence[int], like: Op, output: Value | None = None) -> Op:
    """Return a Transpose."""
    output = output or new_value(f"{value.name}.transpose", [value.dims[axis] for axis in order], value.dtype)
    return new_op("Transpose", [value], output, like, domain="", perm=list(order))


def swap_last(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]
