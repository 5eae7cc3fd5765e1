"""Blocks: runs of operators that repeat with other weights, so that source can say them once."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from graphclone.pytorch.branches import regions
from graphclone.pytorch.code import Marker, render
from graphclone.pytorch.constructors import sizes_of
from graphclone.pytorch.function_writer import leaves
from graphclone.pytorch.program import Op, Program, Value, in_order_of_use
from graphclone.pytorch.sizes import Size, Symbol, symbols
from graphclone.pytorch.tree import Node, Tree


@dataclass(eq=False)
class Block:
    """One block: its operators in order, and what it reads and gives.

    Attributes: `node` holds its tensors; `inputs` come from outside, `outputs` are read outside; `body` is equal for
    blocks whose functions are, `numbers` are the integers in its code, in order; `twins` are the same block in other
    branches of an If.
    """

    index: int
    node: Node
    ops: list[Op]
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    symbols: list[Symbol] = field(default_factory=list)
    body: tuple = ()
    numbers: list[int] = field(default_factory=list)
    twins: list["Block"] = field(default_factory=list)

    @property
    def key(self) -> tuple:
        """What is equal for blocks that one class can express."""
        return self.body, *(twin.body for twin in self.twins)

    @property
    def integers(self) -> list[int]:
        """The numbers in its functions and layers, in order."""
        return [*self.numbers, *(number for twin in self.twins for number in twin.numbers), *sizes_of(self.node)]


@dataclass(eq=False)
class Stack:
    """Blocks in a row, under one node of the tree; `method` is what runs them.

    Attributes: `twins` are the same blocks in other branches of an If.
    """

    node: Node
    blocks: list[Block]
    method: str = "forward"
    twins: list["Stack"] = field(default_factory=list)


LEAST = 8
"""Numbered modules of at least so many operators, which need no others' weights, are blocks though no two are alike."""


def find_stacks(program: Program, tree: Tree) -> list[Stack]:
    """Return the stacks whose blocks can be classes: outer ones first, inner ones where those do not repeat.

    Those of one node in several branches of an If are one, the later ones its twins.
    """
    where = regions(program)
    stacks: list[Stack] = []
    for region in dict.fromkeys(where.values()):
        for stack in _stacks_of(program, tree, [op for op in program.ops if where[op] == region]):
            first = next((each for each in stacks if each.node is stack.node), None)
            if first is None:
                stacks.append(stack)
            elif len(first.blocks) == len(stack.blocks):
                first.twins.append(stack)
                stack.method = f"forward_{len(first.twins) + 1}"
                for block, twin in zip(first.blocks, stack.blocks, strict=True):
                    block.twins.append(twin)
    return stacks


def _stacks_of(program: Program, tree: Tree, ops: list[Op]) -> list[Stack]:
    """Return the stacks among the operators of one region."""
    stacks: list[Stack] = []
    taken: set[Op] = set()
    for node in tree.root.walk():
        numbered = [child for name, child in node.children.items() if name.isdigit()]
        if len(numbered) < 2 or any(child.layer for child in numbered) or any(_inside(node, s.node) for s in stacks):
            continue
        stack = _stack(program, tree, node, numbered, ops)
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


def _stack(program: Program, tree: Tree, node: Node, numbered: list[Node], ops: list[Op]) -> Stack | None:
    numbered.sort(key=lambda child: int(child.name))
    labels = _labels(ops, tree, numbered)
    if labels is None:
        return None
    groups: dict[int, list[Op]] = {}
    for op in ops:
        if labels.get(op) is not None:
            groups.setdefault(labels[op], []).append(op)
    order = sorted(groups)
    if len(order) < 2 or order != list(range(len(numbered))):
        return None
    blocks = _blocks(program, tree, numbered, [groups[i] for i in order])
    if blocks is None or _kinds(blocks) > 1:
        sorted_ = _blocks(program, tree, numbered, [in_order_of_use(groups[i]) for i in order])
        blocks = min(filter(None, (blocks, sorted_)), key=_kinds, default=None)
    if blocks is None:
        return None
    whole = min(len(block.ops) for block in blocks) >= LEAST
    whole = whole and not any(_is_stored(value) for block in blocks for value in block.inputs)
    return Stack(node, blocks) if _kinds(blocks) < len(blocks) or whole else None


def _blocks(program: Program, tree: Tree, numbered: list[Node], groups: list[list[Op]]) -> list[Block] | None:
    """Return a block for each group of operators, the last one without what follows it, or None if it has no end."""
    blocks = [_block(program, tree, numbered[i], i, ops) for i, ops in enumerate(groups)]
    last = _without_tail(program, tree, blocks)
    return None if last is None else [*blocks[:-1], last]


def _kinds(blocks: list[Block]) -> int:
    return len({block.key for block in blocks})


def _labels(ops: list[Op], tree: Tree, numbered: list[Node]) -> dict[Op, int] | None:
    """Give each operator the last block that it depends on; None where blocks do not follow one another."""
    place = {below: number for number, child in enumerate(numbered) for below in child.walk()}
    labels: dict[Op, int] = {}
    for op in ops:
        own = {place.get(tree.slot(op, v).node) for v in op.inputs if _is_stored(v)} - {None}
        before = [labels[v.op] for v in op.inputs if v is not None and v.op is not None and v.op in labels]
        if len(own) > 1 or (own and before and max(before) > min(own)):
            return None
        if own or before:
            labels[op] = max([*own, *before])
    _move_layouts(ops, labels)
    return labels


LAYOUTS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten")


def _move_layouts(ops: list[Op], labels: dict[Op, int]) -> None:
    """Let a change of layout that only the next block needs be its beginning."""
    reading: dict[Value, list[int]] = {}
    for op in reversed(ops):
        label = labels.get(op)
        if label is not None and op.type in LAYOUTS and not op.domain:
            later = reading.get(op.output, [])
            if later and min(later) > label and not any(_is_stored(value) for value in op.inputs):
                labels[op] = label = min(later)
        for value in op.inputs:
            reading.setdefault(value, []).append(-1 if label is None else label)


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
    """Work out the body and the numbers."""
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
            kind = (slot.stored.trainable, slot.stored.persistent, slot.stored.frozen, slot.stored.dtype)
            shapes.append((where, name, slot.first, len(slot.stored.shape), *kind))
    block.symbols = list(found)
    block.numbers = integers
    block.body = (tuple(lines), tuple(shapes), len(block.inputs), tuple(names[value] for value in block.outputs))


def _items(item):
    return tuple(_items(each) for each in item) if isinstance(item, list) else item


def _without_tail(program: Program, tree: Tree, blocks: list[Block]) -> Block | None:
    """Return the last block without what comes after it: the part that is like another block.

    Where none is, it ends like the block before it: at the first operator of that kind below all of its own tensors.
    """
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
    before, own = blocks[-2], set(last.node.walk())
    if not before.outputs:
        return None
    stored = {op for op in last.ops if any(_is_stored(v) and tree.slot(op, v).node in own for v in op.inputs)}
    end = before.outputs[-1]
    for op in last.ops:
        if op.key == end.op.key and op.output.dims == end.dims:
            region = _ancestors([op.output], last.ops)
            if stored <= set(region):
                return _block(program, tree, last.node, last.index, region)
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
