"""List the dimensions that a family's layout knows, and draw legal kept indices of one of them."""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from zoo.cut import Cut
from zoo.families import family
from zoo.layout import Layout

_SYMBOL = re.compile(r"[A-Za-z_][\w.]*")
_RESIDUAL = re.compile(r"hidden(_\d+)?|vocab|stem_\d+|head_\d+|projection")


@functools.cache
def dimensions(name: str) -> Mapping[str, int]:
    """Return the dimension names of a family and their sizes, in the contract's notation.

    A dimension that is one across all blocks is written with `*`.

    >>> list(dimensions("gpt2"))[:5]
    ['vocab', 'hidden', 'blocks.0.heads', 'blocks.0.head_dim', 'blocks.0.ffn']
    """
    layout = family(name).layout
    cut, found = Cut(layout, {}), {}
    for symbol in _symbols(layout.rows.values(), layout):
        if symbol != "head_dim":  # asked for by a RoPE table; the blocks name it
            found[symbol] = cut.full(symbol)
    for stack in layout.stacks:
        symbols = _symbols(stack.rows.values(), layout)
        for block in range(stack.start, stack.start + _depth(name, stack)):
            for symbol in symbols:
                found.setdefault(_named(layout, stack, symbol, block), cut.full(symbol, stack.prefix, block))
    return MappingProxyType(found)


def _symbols(patterns, layout: Layout) -> list[str]:
    names = [symbol for pattern in patterns for symbol in _SYMBOL.findall(pattern) if symbol != "_"]
    tails = [symbol.rpartition(".")[2] for symbol in names]
    return list(
        dict.fromkeys(
            layout.derived[tail][0] if tail in layout.derived else symbol
            for symbol, tail in zip(names, tails, strict=True)
        )
    )


def _depth(name: str, stack) -> int:
    return len(family(name).build().get_submodule(stack.blocks))


def _named(layout: Layout, stack, symbol: str, block: int) -> str:
    if "." in symbol:
        return symbol
    if _RESIDUAL.fullmatch(symbol):
        return symbol if symbol in layout.coupled or symbol[-1].isdigit() else f"{stack.prefix}{symbol}"
    for group in layout.block_groups.get(symbol, ()):
        if block in group:
            return f"{stack.prefix}blocks.{group[0]}.{symbol}"
    everywhere = stack.shared or symbol in layout.coupled or symbol in layout.stack_coupled
    return f"{stack.prefix}blocks.{'*' if everywhere else block}.{symbol}"


def choose(name: str, dimension: str, count: int, seed: int = 0, *, ordered: bool = True) -> list[int]:
    """Draw `count` legal indices of a dimension; with RoPE in pairs, with a grouped convolution alike in each group.

    ordered: ascending; otherwise in any order that is legal, so that the full count gives a permutation.

    >>> choose("llama", "blocks.*.head_dim", 4)
    [3, 4, 8, 9]
    """
    random = np.random.default_rng((seed, *dimension.encode()))
    layout, size, symbol = family(name).layout, dimensions(name)[dimension], dimension.split(".")[-1]

    def draw(total: int, some: int) -> np.ndarray:
        drawn = random.permutation(total)[:some]
        return np.sort(drawn) if ordered else drawn

    if symbol == "head_dim" and "pairs" in layout.derived:
        pairs = layout.derived["pairs"][2](size)
        rest = size - 2 * pairs
        kept = min(pairs, max(1, count * pairs // size))
        first, last = draw(pairs, kept), 2 * pairs + draw(rest, count - 2 * kept)
        return [*first.tolist(), *(first + pairs).tolist(), *last.tolist()]
    if symbol == "hidden" and "within" in layout.derived:
        width = layout.derived["within"][2](size)
        groups = draw(size // width, size // width)
        inside = draw(width, count * width // size)
        return [int(group * width + entry) for group in groups for entry in inside]
    return draw(size, count).tolist()
