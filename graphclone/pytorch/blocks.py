"""Blocks: runs of operators that repeat with other weights, so that source can say them once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from graphclone.pytorch.code import Marker, render
from graphclone.pytorch.constructors import sizes_of
from graphclone.pytorch.function_writer import leaves
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.sizes import Size, Symbol, symbols
from graphclone.pytorch.tree import Node, Tree


@dataclass(eq=False)
class Block:
    """One block: its operators in order, and what it reads and gives.

    Attributes: `node` holds its tensors; `inputs` come from outside, `outputs` are read outside; `key` is equal for
    blocks that one class can express; `integers` are the numbers in its code and layers, in order.
    """

    index: int
    node: Node
    ops: list[Op]
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    symbols: list[Symbol] = field(default_factory=list)
    key: tuple = ()
    integers: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Stack:
    """Blocks in a row, under one node of the tree."""

    node: Node
    blocks: list[Block]


INDEX = re.compile(r"\d+")


def find_stacks(program: Program, tree: Tree) -> list[Stack]:
    """Return the stacks whose blocks can be classes: outer ones first, inner ones where those do not repeat."""
    stacks: list[Stack] = []
    taken: set[Op] = set()
    for node in tree.root.walk():
        numbered = [child for name, child in node.children.items() if name.isdigit()]
        if len(numbered) < 2 or any(_inside(node, stack.node) for stack in stacks):
            continue
        stack = _stack(program, tree, node, numbered)
        if stack is None or any(op in taken for block in stack.blocks for op in block.ops):
            continue
        stacks.append(stack)
        taken.update(op for block in stack.blocks for op in block.ops)
    return stacks


def _inside(node: Node, outer: Node) -> bool:
    while node is not None:
        if node is outer:
            return True
        node = node.parent
    return False


def _stack(program: Program, tree: Tree, node: Node, numbered: list[Node]) -> Stack | None:
    numbered.sort(key=lambda child: int(child.name))
    labels = _labels(program, tree, numbered)
    if labels is None:
        return None
    groups: dict[int, list[Op]] = {}
    for op in program.ops:
        if labels.get(op) is not None:
            groups.setdefault(labels[op], []).append(op)
    order = sorted(groups)
    if len(order) < 2 or order != list(range(len(numbered))):
        return None
    blocks = [_block(program, tree, numbered[i], i, groups[i]) for i in order]
    last = _without_tail(program, tree, blocks)
    if last is None:
        return None
    blocks[-1] = last
    alike = {block.key for block in blocks}
    return Stack(node, blocks) if len(alike) < len(blocks) else None


def _labels(program: Program, tree: Tree, numbered: list[Node]) -> dict[Op, int] | None:
    """Give each operator the last block that it depends on; None where blocks do not follow one another."""
    place = {below: number for number, child in enumerate(numbered) for below in child.walk()}
    labels: dict[Op, int] = {}
    for op in program.ops:
        own = {place.get(tree.slot(op, v).node) for v in op.inputs if _is_stored(v)} - {None}
        before = [labels[v.op] for v in op.inputs if v is not None and v.op is not None and v.op in labels]
        if len(own) > 1 or (own and before and max(before) > min(own)):
            return None
        if own or before:
            labels[op] = max([*own, *before])
    return labels


def _is_stored(value: Value | None) -> bool:
    return value is not None and value.parameter is not None and value.known is None


def _block(program: Program, tree: Tree, node: Node, index: int, ops: list[Op]) -> Block:
    block = Block(index, node, ops)
    inside = {output for op in ops for output in op.outputs if output is not None}
    own = set(node.walk())
    for op in ops:
        for leaf in leaves(op.code):
            if isinstance(leaf, Value) and leaf.known is None and leaf not in inside and leaf not in block.inputs:
                if not _is_stored(leaf) or tree.slot(op, leaf).node not in own:
                    block.inputs.append(leaf)
    mine = set(ops)
    outside = {leaf for op in program.ops if op not in mine for leaf in leaves(op.code) if isinstance(leaf, Value)}
    outside.update(program.outputs)
    outside.update(
        symbol.value
        for op in program.ops
        if op not in mine
        for leaf in leaves(op.code)
        if isinstance(leaf, Size)
        for symbol in symbols(leaf)
    )
    block.outputs = [output for op in ops for output in op.outputs if output is not None and output in outside]
    _describe(block, tree)
    return block


def _describe(block: Block, tree: Tree) -> None:
    """Work out the key and the integers."""
    names: dict[Value, str] = {value: f"in{number}" for number, value in enumerate(block.inputs)}
    integers: list[int] = []
    found: dict[Symbol, str] = {}
    depth = len(block.node.path)
    lines = []

    def leaf(operand, op: Op) -> str:
        if isinstance(operand, Marker):
            return operand.name
        if isinstance(operand, Size):
            from graphclone.pytorch.sizes import render as render_size

            return render_size(operand, lambda symbol: found.setdefault(symbol, f"s{len(found)}"))
        if operand in names:
            return names[operand]
        if operand.known is not None:
            return repr(operand.known.shape) + render(_items(operand.known.tolist()), lambda each: leaf(each, op))
        if _is_stored(operand):
            return ".".join(tree.slot(op, operand).path[depth:])
        raise KeyError(operand)

    for number, op in enumerate(block.ops):
        codes = op.code if isinstance(op.code, tuple) else (op.code,)
        texts = [
            None if code is None else render(code, lambda each, op=op: leaf(each, op), integers.append)
            for code in codes
        ]
        for place, output in enumerate(op.outputs):
            if output is not None:
                names[output] = f"v{number}.{place}"
        lines.append((op.key, tuple(texts)))
    shapes = []
    for below in block.node.walk():
        where = ".".join(below.path[depth:])
        if below.layer is not None:
            shapes.append((where, below.layer.kind, below.layer.options))
            continue
        for name, slot in below.tensors.items():
            shapes.append((where, name, slot.first, len(slot.stored.shape), slot.stored.trainable, slot.stored.dtype))
    block.symbols = list(found)
    block.integers = [*integers, *sizes_of(block.node)]
    block.key = (tuple(lines), tuple(shapes), len(block.inputs), tuple(names[value] for value in block.outputs))


def _items(item):
    return tuple(_items(each) for each in item) if isinstance(item, list) else item


def _without_tail(program: Program, tree: Tree, blocks: list[Block]) -> Block | None:
    """Return the last block without what comes after it: the part that is like another block, or has one exit."""
    last = blocks[-1]
    for model in dict.fromkeys([*blocks[-2::-1]]):
        if not model.outputs or len(last.ops) < len(model.ops):
            continue
        ends = [op.key for value in model.outputs for op in [value.op]]
        for op in last.ops:
            if op.key != ends[-1]:
                continue
            exits = [op.output]
            region = _ancestors(exits, last.ops)
            if len(region) == len(model.ops):
                candidate = _block(program, tree, last.node, last.index, region)
                if candidate.key == model.key:
                    return candidate
    return None


def _ancestors(values: Iterable[Value], ops: list[Op]) -> list[Op]:
    inside, needed = set(ops), set()
    pending = [value.op for value in values]
    while pending:
        op = pending.pop()
        if op in needed or op not in inside:
            continue
        needed.add(op)
        pending.extend(value.op for value in op.inputs if value is not None and value.op is not None)
    return [op for op in ops if op in needed]
