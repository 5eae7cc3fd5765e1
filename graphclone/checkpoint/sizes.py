"""The sizes that a cut gives each role in each stack: what a config has to say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphclone.analysis import Analysis
from graphclone.cut import Cut


@dataclass
class Sizes:
    """Old and new sizes of one role in one stack: {old, new} over its kept blocks, and {block: (old, new)}."""

    old: set[int] = field(default_factory=set)
    new: set[int] = field(default_factory=set)
    pairs: set[tuple[int, int]] = field(default_factory=set)
    by_block: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.old != self.new

    def add(self, old: int, new: int, block: int | None = None, kept: bool = True) -> None:
        """Add a size; that of a dropped block counts as an old one alone."""
        self.old.add(old)
        if block is not None:
            self.by_block[block] = (old, new)
        if kept:
            self.new.add(new)
            self.pairs.add((old, new))

    def of(self, value: int) -> set[int]:
        """Return what a value has become."""
        return {new for old, new in self.pairs if old == value} or self.new


def sizes_of(analysis: Analysis, cut: Cut) -> dict[tuple[str, str], Sizes]:
    """Return sizes by (stack, role); dimensions outside of blocks belong to the stack ''.

    Example:
        sizes_of(analysis, resolve(plan, analysis))["encoder", "heads"].new  # {4}
    """
    prefixes = [stack.prefix.rstrip(".") for stack in analysis.stacks]
    found: dict[tuple[str, str], Sizes] = {}
    for stack in analysis.stacks:
        layers = found.setdefault((stack.prefix.rstrip("."), "layers"), Sizes())
        layers.add(len(stack.blocks), len(cut.blocks[stack.prefix]))
    for dimension in analysis.dimensions:
        new = cut.size(dimension.axes[0])[0]
        for name in dimension.names:
            stack, role, block = _place(name, dimension.role, prefixes)
            kept = cut.blocks.get(f"{stack}." if stack else "", ())
            sizes = found.setdefault((stack, role), Sizes())
            sizes.add(dimension.size, new, block, block is None or block in kept)
    for (stack, role), sizes in list(found.items()):
        if role == "queries_per_kv" and (stack, "kv_heads") in found:  # a config counts query heads
            groups = found[stack, "kv_heads"]
            heads = found.setdefault((stack, "heads"), Sizes())
            heads.old |= {a * b for a in sizes.old for b in groups.old}
            heads.new |= {a * b for a in sizes.new for b in groups.new}
            heads.pairs |= {(a * c, b * d) for a, b in sizes.pairs for c, d in groups.pairs}
    return found


def _place(name: str, role: str, prefixes: Sequence[str]) -> tuple[str, str, int | None]:
    """Return the stack, the role and the block that a dimension's name speaks of."""
    stack = next((p for p in sorted(prefixes, key=len, reverse=True) if p and name.startswith(f"{p}.")), "")
    block = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    own = name.rpartition(".")[2]
    if role == "free" or own in ("vocab_1", "vocab_2") or (role == "ffn" and own not in ("ffn", "cross_ffn")):
        return "", f"free {own}", int(block[1]) if block else None
    return stack, role, int(block[1]) if block else None
