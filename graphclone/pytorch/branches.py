"""Branches: what an If becomes, one way through the module for each value of its condition."""

import copy
from collections.abc import Sequence

from graphclone.pytorch.code import Code
from graphclone.pytorch.function_writer import FunctionWriter, Item, reads_of, wrap
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.registry import rule

Region = tuple[tuple[Op, int], ...]
"""The branches around an operator, outer ones first: an If, and 0 where its condition holds or 1."""


@rule("If")
def choose(op: Op) -> Code:
    """Name what is read; `Choice` writes the statement."""
    first, second = operands(op)
    return Code("choose({}, {}, {})", op[0], first, second)


def operands(op: Op) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """Return the results of the branch where the condition of an If holds, and of the other."""
    count = len(op.outputs)
    return tuple(op.inputs[1 : count + 1]), tuple(op.inputs[count + 1 :])


def regions(program: Program) -> dict[Op, Region]:
    """Return where each operator is to run: in a branch if nothing outside of it needs the result.

    What both branches compute alike runs before them.
    """
    wanted: dict[Value, Region] = {}

    def want(value: Value, region: Region) -> None:
        here = wanted.setdefault(value, region)
        wanted[value] = _common(here, region)

    for value in program.outputs:
        want(value, ())
    found: dict[Op, Region] = {}
    for op in reversed(program.ops):
        region = None
        for output in op.outputs:
            if output in wanted:
                region = wanted[output] if region is None else _common(region, wanted[output])
        found[op] = region = region or ()
        if op.type != "If" or op.domain:
            for value in reads_of(op):
                want(value, region)
            continue
        want(op[0], region)
        for number, values in enumerate(operands(op)):
            for value, output in zip(values, op.outputs, strict=True):
                if output in wanted:
                    want(value, (*region, (op, number)))
    return found


def _common(first: Region, second: Region) -> Region:
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return first[:same]


class Choice(Item):
    """Run one of two bodies; which one, the value of a tensor tells.

    It is a plain Python `if`, so that only one body runs and sizes may differ. `torch.compile` and `torch.export`
    follow it where the condition is given as a Python bool.
    """

    def __init__(self, op: Op, bodies: Sequence[Sequence["Op | Item"]]):
        self.op = op
        self.bodies = bodies
        self.kept = [place for place, output in enumerate(op.outputs) if output is not None]

    def makes(self) -> list[Value]:
        return [self.op.outputs[place] for place in self.kept]

    def inner(self) -> list["Op | Item"]:
        """Return the operators and loops of both bodies, and of the choices in them."""
        found: list[Op | Item] = []
        for item in (item for body in self.bodies for item in body):
            found += item.inner() if isinstance(item, Choice) else [item]
        return found

    def reads(self) -> list[Value]:
        made = {value for item in self.inner() for value in (item.makes() if isinstance(item, Item) else item.outputs)}
        given = [self.op[0], *(values[place] for values in operands(self.op) for place in self.kept)]
        for item in self.inner():
            given += item.reads() if isinstance(item, Item) else reads_of(item)
        return [value for value in dict.fromkeys(given) if value not in made and value.known is None for _ in range(2)]

    def write(self, writer: FunctionWriter) -> None:
        for value in dict.fromkeys(self.reads()):
            if value in writer.pending:
                writer.statement(writer.pending.pop(value))
        condition = writer.text(self.op[0], self.op)
        kept = [writer.targets(self.op)[place] for place in self.kept]
        for word, body, values in zip((f"if {condition}:", "else:"), self.bodies, operands(self.op), strict=True):
            inner = copy.copy(writer)
            inner.names, inner.taken, inner.lines = dict(writer.names), {*writer.taken, *kept}, []
            inner.pending, inner.width = {}, writer.width - 4
            results = [values[place] for place in self.kept]
            inner.write(body, results)
            writer.lines.append(word)
            writer.lines += [f"    {line}" for line in inner.lines]
            for name, value in zip(kept, results, strict=True):
                text = f"{name} = {inner.result(value, self.op)}"
                writer.lines.extend(f"    {line}" for line in wrap(text, inner.width))
        for name, output in zip(kept, self.makes(), strict=True):
            writer.names[output] = name
            writer.taken.add(name)
