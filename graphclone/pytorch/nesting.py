"""Nesting: modules for the blocks of a model whose exporter left no module names."""

import re
from collections.abc import Sequence

from graphclone.analysis import analyse
from graphclone.model import Model
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.program import Op, Program, in_order_of_use

NUMBER = re.compile(r"(\d+)")


def nest(program: Program, model: Model) -> dict[Stored, str]:
    """Move what only one block reads into a module of that block; return what was moved, in order, and its old name.

    Names stay the graph's own, but for the numbers that only tell blocks apart. Where names count modules (`h.0.attn`,
    `h.1.attn`), the exporter kept them and nothing is moved.
    """
    values = [value for value in program.values() if value.parameter is not None and value.known is None]
    stored = list(dict.fromkeys(value.parameter for value in values))
    if _counts_modules([each.path.split(".") for each in stored if each.trainable]):
        return {}
    labels = _labels(program, model)
    users = program.users()
    members: dict[tuple[str, int], list[Stored]] = {}
    for each in stored:
        found = {labels.get(op) for value in values if value.parameter is each for op in users.get(value, [])}
        label = found.pop() if len(found) == 1 else None
        if label is not None and not each.aliases:
            members.setdefault(label, []).append(each)
    moved: dict[Stored, str] = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in members):
        blocks = {index: members[stack, index] for stack, index in sorted(members) if stack == prefix}
        if len(blocks) < 2:
            continue
        for index, block in blocks.items():
            order = _order_of_use([op for op in program.ops if labels[op] == (prefix, index)])
            block.sort(key=order.index)
        aligned = align([[each.path for each in block] for block in blocks.values()])
        for (index, block), names in zip(blocks.items(), aligned, strict=True):
            for each, name in zip(block, names, strict=True):
                moved[each] = each.path
                each.path = f"{prefix}blocks.{index}.{name}"
    return moved


def _counts_modules(paths: list[list[str]]) -> bool:
    """Tell whether names hold two indices in one place."""
    indices: dict[tuple[str, ...], str] = {}
    for path in paths:
        for place, part in enumerate(path):
            if part.isdigit() and indices.setdefault(tuple(path[:place]), part) != part:
                return True
    return False


def _labels(program: Program, model: Model) -> dict[Op, tuple[str, int] | None]:
    """Return the stack and block that each operator is in, or that alone reads the weight it makes; None outside."""
    analysis = analyse(model)
    blocks: dict[str, tuple[str, int]] = {}
    for stack in analysis.stacks:
        for block in stack.blocks:
            for each in (block, *block.twins):
                for number in (number for half in each.halves for number in half.nodes):
                    blocks[analysis.typing.nodes[number].op.node.name] = (stack.prefix, block.index)
    users, given = program.users(), set(program.inputs)
    for op in program.ops:
        if any(each in given for each in op.inputs):
            given.update(op.outputs)
    labels: dict[Op, tuple[str, int] | None] = {}
    for op in reversed(program.ops):
        reading = {labels[user] for output in op.outputs for user in users.get(output, [])}
        labels[op] = blocks.get(op.name)
        if labels[op] is None and len(reading) == 1 and op.output not in given:
            labels[op] = reading.pop()
    return labels


def _order_of_use(ops: list[Op]) -> list[Stored]:
    """Return the stored tensors of a block as its results lead to them, in whatever order the file has its nodes."""
    found: dict[Stored, None] = {}
    for op in in_order_of_use(ops):
        for each in op.inputs:
            if each is not None and each.parameter is not None and each.known is None:
                found.setdefault(each.parameter)
    return list(found)


def align(blocks: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return names that are alike in all blocks, where the given ones differ in numbers or come in the same order.

    Example:
        >>> align([["layer_0/q", "layer_0/dense_3"], ["layer_1/q", "layer_1/dense_5"]])
        [['layer_q', 'layer_dense'], ['layer_q', 'layer_dense']]
    """
    pieces = [[NUMBER.split(name) for name in names] for names in blocks]
    depth = max((len(parts) for block in pieces for parts in block), default=0)
    for place in range(1, depth, 2):
        for stem in {tuple(parts[:place]) for block in pieces for parts in block if len(parts) > place}:
            _renumber([[p for p in block if len(p) > place and tuple(p[:place]) == stem] for block in pieces], place)
    names = [_distinct([_joined(parts) for parts in block]) for block in pieces]
    if len({len(block) for block in names}) == 1 and len({frozenset(block) for block in names}) > 1:
        return [names[0] for _ in names]
    return names


def _renumber(groups: list[list[list[str]]], place: int) -> None:
    """Count anew in each block the numbers behind one stem, or leave them out where they only tell the blocks apart."""
    sets = [list(dict.fromkeys(parts[place] for parts in group)) for group in groups]
    if all(set(numbers) == set(sets[0]) for numbers in sets):
        return
    single = all(len(numbers) <= 1 for numbers in sets)
    for group, numbers in zip(groups, sets, strict=True):
        for parts in group:
            parts[place] = "" if single else str(numbers.index(parts[place]))


def _joined(parts: list[str]) -> str:
    """Return a dotted name of identifiers."""
    words = [re.sub(r"[^A-Za-z0-9]+", "_", word).strip("_") for word in "".join(parts).split(".")]
    return ".".join(word for word in words if word) or "tensor"


def _distinct(names: list[str]) -> list[str]:
    """Number names that several tensors of a block have."""
    result: list[str] = []
    for name in names:
        count, candidate = 1, name
        while candidate in result:
            candidate, count = f"{name}_{count}", count + 1
        result.append(candidate)
    return result
