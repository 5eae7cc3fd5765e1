"""Describe where the dimensions of a model lie in its parameters, in a notation of one line per parameter."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

SizeOf = Callable[[str], int]
KeptOf = Callable[[str], np.ndarray]
_TOKEN = re.compile(r"\(|\)|\+|[A-Za-z_][\w.]*|\d+")


@dataclass(frozen=True)
class Stack:
    """One stack of blocks.

    blocks: module path of the list of blocks (`"transformer.h"`).
    rows: glob of parameters and buffers, relative to the block -> axis pattern
        (`"attn.c_attn.weight": "hidden (3 heads head_dim)"`); the first row that matches counts.
    attributes: module glob, relative to the block -> attribute -> expression in the kept sizes (`"heads * head_dim"`);
        `full_NAME` is the parent's size, an attribute `config.NAME` is set on the module's own copy of its config,
        and `scaled_rows`, (rows, factor), multiplies the first rows of its parameters: a query projection keeps the
        parent's attention scale where the framework computes it from the size on the fly.
    prefix: what stands before `blocks.<i>` (`""`, `"encoder."`).
    halves: half-block -> how to bypass it, steps joined by `;`: `zero PATH` zeroes a projection that feeds the
        residual sum, `identity PATH` replaces a norm behind that sum (post-norm).
    depth: attributes that hold the number of blocks (or a list over blocks) as `MODULE:NAME`, `config.NAME` for the
        model's config.
    start: number of the first block, for models whose blocks lie in several lists.
    shared: number of times that one block is used, where the list has only that one (ALBERT).
    first: modules that only the first block owns (T5's relative positions): they move to the new first block, whose
        flag `has_NAME` is raised.
    """

    blocks: str
    rows: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prefix: str = ""
    halves: Mapping[str, str] = field(default_factory=dict)
    depth: tuple[str, ...] = ("config.num_hidden_layers", "config.layer_types")
    start: int = 0
    shared: int = 0
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Everything the native oracle knows about a family.

    sizes: symbol -> parent's size; `blocks.2.heads` and `encoder.heads` are more explicit than `heads`.
    stacks: the stacks of blocks.
    rows, attributes: as in `Stack`, absolute names, for what lies outside blocks.
    coupled: symbols that are one dimension across all blocks and stacks (`hidden`, a RoPE `head_dim`).
    stack_coupled: symbols that are one dimension across the blocks of a stack (T5's heads, by its position bias).
    block_groups: symbol -> groups of blocks within which it is one dimension (sliding and full attention may have a
        RoPE table each); a row outside blocks names a block of the group (`"blocks.0.pairs"`).
    derived: symbol -> (source symbol, function from kept indices and parent's size of the source to kept indices of
        the symbol, function from the parent's size of the source to that of the symbol).
    before: what to do to a model before it is sliced (remove parametrizations, choose an attention).
    folded: parameter -> what to do to a model before it is sliced where an export lacks this parameter, because a tool
        computed ahead what the framework computes from it in each run.
    after: what to do afterwards, given the model and the function that returns the kept indices of a symbol.
    """

    sizes: Mapping[str, int]
    stacks: tuple[Stack, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    coupled: tuple[str, ...] = ("hidden", "vocab")
    stack_coupled: tuple[str, ...] = ()
    block_groups: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    derived: Mapping[str, tuple[str, Callable, Callable]] = field(default_factory=dict)
    before: Callable | None = None
    folded: Mapping[str, Callable] = field(default_factory=dict)
    after: Callable | None = None


def rotary(dims: int | None = None) -> dict[str, tuple[str, Callable, Callable]]:
    """Derive `pairs`, the kept entries of a frequency table, and `rotary`, the rotated part of a head.

    dims: how many of a head's entries are rotated, pairs being `i` and `i + dims / 2`; default all.
    """

    def pairs(kept: np.ndarray, size: int) -> np.ndarray:
        half = (dims or size) // 2
        first = kept[kept < half]
        second = kept[(kept >= half) & (kept < 2 * half)]
        if not np.array_equal(first + half, second):
            raise ValueError(f"RoPE keeps both members of a pair, in pair order: {first.tolist()}, {second.tolist()}")
        return first

    def rotated(kept: np.ndarray, size: int) -> np.ndarray:
        return kept[kept < (dims or size)]

    return {
        "pairs": ("head_dim", pairs, lambda size: (dims or size) // 2),
        "rotary": ("head_dim", rotated, lambda size: dims or size),
    }


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


def candidates(symbol: str, prefix: str, block: int | None) -> list[str]:
    """List the names under which a plan or a size table may give a symbol, the most explicit first.

    >>> candidates("heads", "encoder.", 2)
    ['encoder.blocks.2.heads', 'encoder.blocks.*.heads', 'encoder.heads', 'heads']
    """
    names = []
    if block is not None:
        names += [f"{prefix}blocks.{block}.{symbol}", f"{prefix}blocks.*.{symbol}"]
    names.append(f"{prefix}{symbol}")
    return list(dict.fromkeys([*names, symbol, symbol.rpartition(".")[2]]))
