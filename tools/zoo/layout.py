"""Describe where the dimensions of a model lie in its parameters, in a notation of one line per parameter."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SizeOf = Callable[[str], int]
KeptOf = Callable[[str], np.ndarray]
_TOKEN = re.compile(r"\(|\)|\+|[A-Za-z_]\w*|\d+")


@dataclass(frozen=True)
class Stack:
    """One stack of blocks.

    blocks: module path of the list of blocks (`"transformer.h"`), or several paths of lists that follow each other.
    rows: parameter glob, relative to the block -> axis pattern (`"attn.c_attn.weight": "hidden (3 heads head_dim)"`).
    attributes: module glob, relative to the block -> attribute -> expression in symbols (`"heads * head_dim"`).
    prefix: what the contract writes before `blocks.<i>` (`""`, `"encoder."`).
    halves: half-block -> how to bypass it: `"zero PATH"` zeroes a projection that feeds a residual sum,
        `"second PATH"` makes the module return its second argument (post-norm), `"same PATH"` its first.
    depth: `module_path:attribute` places that hold the number of blocks; lists there are indexed by the kept blocks.
    """

    blocks: str | tuple[str, ...]
    rows: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prefix: str = ""
    halves: Mapping[str, str] = field(default_factory=dict)
    depth: tuple[str, ...] = ("config:num_hidden_layers", "config:layer_types")
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Everything the native oracle knows about a family.

    sizes: symbol -> parent's size; `blocks.2.heads` and `encoder.heads` override `heads`.
    stacks: the stacks of blocks.
    rows: as in `Stack`, absolute names, for what lies outside blocks.
    attributes: as in `Stack`, for modules outside blocks.
    coupled: symbols that the graph ties across all blocks and stacks (`hidden`, a RoPE `head_dim`).
    """

    sizes: Mapping[str, int]
    stacks: tuple[Stack, ...]
    rows: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    coupled: tuple[str, ...] = ("hidden", "vocab")


@dataclass(frozen=True)
class Axis:
    """A sum of products of symbols, numbers and inner sums: `(3 heads head_dim)`, `(q + kv + kv)`."""

    terms: tuple[tuple["Axis | str | int", ...], ...]

    def size(self, size_of: SizeOf) -> int:
        return sum(int(np.prod([_size(factor, size_of) for factor in term])) for term in self.terms)

    def kept(self, size_of: SizeOf, kept_of: KeptOf) -> np.ndarray:
        """Return the kept positions along this axis, int64."""
        parts, offset = [], 0
        for term in self.terms:
            index, width = np.zeros(1, np.int64), 1
            for factor in term:
                size = _size(factor, size_of)
                index = (index[:, None] * size + _kept(factor, size_of, kept_of)[None, :]).ravel()
                width *= size
            parts.append(index + offset)
            offset += width
        return np.concatenate(parts)


def parse(pattern: str) -> tuple[Axis | None, ...]:
    """Read an axis pattern; `_` is an axis that is never cut.

    >>> [axis.size({"hidden": 48, "heads": 3, "head_dim": 16}.get) for axis in parse("hidden (3 heads head_dim)")]
    [48, 144]
    >>> parse("_ hidden")[0] is None
    True
    """
    tokens = _TOKEN.findall(pattern)
    axes: list[Axis | None] = []
    while tokens:
        if tokens[0] == "_":
            tokens.pop(0)
            axes.append(None)
        elif tokens[0] == "(":
            axes.append(_sum(tokens))
        else:
            axes.append(Axis(((_factor(tokens),),)))
    return tuple(axes)


def _sum(tokens: list[str]) -> Axis:
    tokens.pop(0)
    terms: list[list[Axis | str | int]] = [[]]
    while tokens[0] != ")":
        if tokens[0] == "+":
            tokens.pop(0)
            terms.append([])
        else:
            terms[-1].append(_factor(tokens))
    tokens.pop(0)
    return Axis(tuple(map(tuple, terms)))


def _factor(tokens: list[str]) -> "Axis | str | int":
    if tokens[0] == "(":
        return _sum(tokens)
    token = tokens.pop(0)
    return int(token) if token.isdigit() else token


def _size(factor: "Axis | str | int", size_of: SizeOf) -> int:
    if isinstance(factor, Axis):
        return factor.size(size_of)
    return factor if isinstance(factor, int) else size_of(factor)


def _kept(factor: "Axis | str | int", size_of: SizeOf, kept_of: KeptOf) -> np.ndarray:
    if isinstance(factor, Axis):
        return factor.kept(size_of, kept_of)
    return np.arange(factor) if isinstance(factor, int) else kept_of(factor)


def candidates(symbol: str, prefix: str, block: int | None) -> Sequence[str]:
    """List the names under which a plan or a size table may give a symbol, the most explicit first.

    >>> candidates("heads", "encoder.", 2)
    ['encoder.blocks.2.heads', 'encoder.blocks.*.heads', 'encoder.heads', 'heads']
    """
    names = []
    if block is not None:
        names += [f"{prefix}blocks.{block}.{symbol}", f"{prefix}blocks.*.{symbol}"]
    names.append(f"{prefix}{symbol}")
    return list(dict.fromkeys([*names, symbol]))
