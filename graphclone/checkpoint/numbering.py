"""Renumber the tensors of kept blocks and experts, as `graphclone.bypass` does in the graph."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.blocks import Block
from graphclone.checkpoint.matching import Match
from graphclone.cut import Cut
from graphclone.graphs import walk
from graphclone.model import Model


@dataclass(frozen=True)
class Numbering:
    """Names of some blocks of a stack carry `before` and then the block's number plus `offset`.

    kept: those of these blocks that stay. blocks: all of them, of one stage, or of the stack.
    """

    before: str
    offset: int
    kept: tuple[int, ...]
    blocks: range

    def block_of(self, name: str) -> int | None:
        """Return the parent's block that a name speaks of, or None."""
        found = re.match(re.escape(self.before) + r"(\d+)(?!\d)", name)
        number = int(found[1]) - self.offset if found else -1
        return number if number in self.blocks else None

    def renamed(self, name: str, number: int) -> str:
        """Return the name with another block's number."""
        number += self.blocks.start + self.offset
        return re.sub("^" + re.escape(self.before) + r"\d+", lambda _: f"{self.before}{number}", name)


def find_numberings(model: Model, analysis: Analysis, cut: Cut, matches: Mapping[str, Match]) -> list[Numbering]:
    """Return how the checkpoint numbers the blocks of each stack: through, or anew in each stage.

    Example:
        [(each.before, each.offset) for each in find_numberings(model, analysis, cut, matches)]  # [('h.', 0)]
    """
    tensors = {t.name: t for graph in walk(model.graph) for node in graph.nodes for t in (*node.inputs, *node.outputs)}
    found: dict[str, Numbering] = {}
    for stack in analysis.stacks:
        common: set[tuple[str, int]] | None = None
        names: list[set[str]] = []
        for block in stack.blocks:
            nodes = set().union(*(_nodes_of(tensors, part) for part in (block, *block.twins)))
            here = set()
            names.append(set())
            for match in matches.values():
                if any(id(part.use.node) in nodes for part in match.parts):
                    names[-1].add(match.tensor)
                    for digits in re.finditer(r"\d+", match.tensor):
                        if (offset := int(digits.group()) - block.index) in (0, 1):
                            here.add((match.tensor[: digits.start()], offset))
            common = here if common is None else common & here
        kept = cut.blocks[stack.prefix]
        for before, offset in sorted(common or ()):
            found.setdefault(before, Numbering(before, offset, kept, range(len(stack.blocks))))
        for before, offset, blocks in _stages(names) if not common else ():
            found.setdefault(before, Numbering(before, offset, tuple(b for b in kept if b in blocks), blocks))
    return list(found.values())


def _stages(names: Sequence[set[str]]) -> Iterator[tuple[str, int, range]]:
    """Yield (before, offset, blocks) of each run of blocks whose names differ in one number that counts them.

    names: the tensors of each block; the last number that all of a block's own share is the block's. None where a
    block has no tensors of its own.

    Example:
        >>> list(_stages([{"s.0.b.0.x"}, {"s.0.b.1.x"}, {"s.1.b.0.x"}]))
        [('s.0.b.', 0, range(0, 2)), ('s.1.b.', -2, range(2, 3))]
    """
    places = []
    for number, mine in enumerate(names):
        others = set().union(*names[:number], *names[number + 1 :])
        paths = [name.split(".") for name in mine - others]
        columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False))
        digits = re.match(r"(.*\.)(\d+)\.", "".join(f"{column[0]}." for column in columns))
        places.append((digits[1], int(digits[2]) - number) if digits else None)
    start = 0
    if None in places:
        return
    for place, run in itertools.groupby(places):
        size = len(list(run))
        yield *place, range(start, start + size)
        start += size


def _nodes_of(tensors: Mapping[str, gs.Tensor], block: Block) -> set[int]:
    """Return the ids of a block's nodes, and of those that rearrange its weights."""
    below, waiting = set(), [tensors[block.entry]]
    while waiting:
        for node in waiting.pop().outputs:
            if id(node) not in below:
                below.add(id(node))
                waiting.extend(node.outputs)
    found, waiting = set(), [tensors[block.exit]]
    while waiting:
        tensor = waiting.pop()
        if tensor.name == block.entry:
            continue
        for node in tensor.inputs:
            if id(node) not in found and (id(node) in below or all(isinstance(t, gs.Constant) for t in node.inputs)):
                found.add(id(node))
                waiting.extend(node.inputs)
    return found


def renumbered(name: str, numberings: Sequence[Numbering]) -> tuple[str, bool]:
    """Return the child's name of a tensor, and whether its block is kept; that of a dropped one goes to the first."""
    for numbering in numberings:
        block = numbering.block_of(name)
        if block is not None:
            kept = block in numbering.kept
            return numbering.renamed(name, numbering.kept.index(block) if kept else 0), kept
    return name, True


def without_expert(name: str, expert: int, position: int, numberings: Sequence[Numbering]) -> str:
    """Return a name with an expert's new number: the last part of it that is the expert's."""
    before = max((len(each.before) for each in numberings if each.block_of(name) is not None), default=0)
    places = [m for m in re.finditer(r"(?<=\.)\d+(?=\.|$)", name) if int(m.group()) == expert and m.start() > before]
    if not places:
        return name
    return f"{name[: places[-1].start()]}{position}{name[places[-1].end() :]}"
