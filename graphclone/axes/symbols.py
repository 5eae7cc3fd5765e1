"""The sizes a graph leaves open: a pair of primes for each symbol, one for each of two imagined runs."""

import ast
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Size, divide, multiply
from graphclone.graphs import holds_floats

SMALL_PRIMES = [(2, 3), (5, 7), (11, 13), (17, 19), (23, 29), (31, 37), (41, 43), (47, 53), (59, 61), (67, 71)]
LARGE_PRIMES = [(1601, 2003), (1607, 2011), (1609, 2017), (1613, 2027)]
Regrouping = tuple[Size, tuple[Size, ...], str]  # entries read, the target of a Reshape entry by entry, the node
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


class Symbols:
    """Probe sizes of symbols; `same` maps symbols to those, or to the numbers, an earlier sweep found them to equal.

    Every symbol of a graph input gets its own pair of sizes; those of images and waves are large.
    """

    def __init__(self, inputs: Iterable[gs.Variable], same: Mapping[str, str | int]):
        self._same = same
        self._known: dict[str, Size] = {}
        self._places: dict[str, set[int]] = defaultdict(set)  # symbol -> which axis of graph inputs it is
        small, large = itertools.cycle(SMALL_PRIMES), itertools.cycle(LARGE_PRIMES)
        for tensor in inputs:
            floats = tensor.dtype is not None and holds_floats(tensor)
            for axis, size in enumerate(tensor.shape or ()):
                size = same.get(size, size)
                self._places[size].add(axis)
                if isinstance(size, str) and size.isidentifier() and size not in self._known:
                    spatial = floats and (axis >= 2 or len(tensor.shape) == 2 > axis > 0)
                    self._known[size] = next(large if spatial else small)
        self._fed = tuple(self._known)
        self.numbers = {symbol: size for symbol, size in same.items() if isinstance(size, int)}

    def size(self, size: int | str | None, where: str) -> Size:
        """Return the probe sizes of an entry of a shape; `where` names the axis, for an entry without a name."""
        if isinstance(size, (int, np.integer)):
            return (int(size), int(size))
        text = size if isinstance(size, str) and size else where
        text = self._same.get(text, text)
        if isinstance(text, int):
            return (text, text)
        if text not in self._known:
            pairs = {**self._known, **{name: (size, size) for name, size in self.numbers.items()}}
            known = [_evaluate(text, {name: pair[probe] for name, pair in pairs.items()}) for probe in (0, 1)]
            fresh = SMALL_PRIMES[len(self._known) % len(SMALL_PRIMES)]
            self._known[text] = tuple(known) if all(known) else fresh
        return self._known[text]

    def coinciding(self, conflicts: Iterable[tuple[Size, Size]]) -> dict[str, str]:
        """Return the symbols that a graph equates with others: {symbol: the one to use in its place}.

        conflicts: pairs of sizes that equations asked to be one.
        """
        by_size: dict[Size, list[str]] = defaultdict(list)
        for symbol, size in self._known.items():
            by_size[size].append(symbol)
        found: dict[str, str] = {}
        for sizes in conflicts:
            first, second = (by_size[size][0] if size in by_size else None for size in sizes)
            if first is not None and second is not None:
                first, second = (found.get(symbol, symbol) for symbol in (first, second))
                if first != second:
                    found = {symbol: first if other == second else other for symbol, other in found.items()}
                    found[second] = first
        return found

    def regrouped(self, regroupings: Iterable[Regrouping]) -> dict[str, str]:
        """Return a symbol that a Reshape takes for another: {symbol: the one to use in its place}; empty where none is.

        A decoder groups what it reads of the encoder by the batch of its own ids, which the file calls another symbol.
        Symbols are one where the same axis of two inputs is meant, and the Reshape then has as many entries as it
        reads.
        """
        for read, target, _ in regroupings:
            for symbol in self._fed:
                if self._known[symbol] not in target:
                    continue
                others = [
                    other for other in self._fed if other != symbol and self._places[other] & self._places[symbol]
                ]
                fitting = [other for other in others if _fits(read, target, self._known[symbol], self._known[other])]
                if len(fitting) == 1:
                    return {symbol: fitting[0]}
        return {}

    def written_out(self, regroupings: Iterable[Regrouping]) -> dict[str, tuple[int, str]]:
        """Return the symbols that a graph has one size alone for: {symbol: (the size, the node that says so)}.

        An exporter that traces a length as a number writes it into a Reshape, and still calls the axis dynamic.
        regroupings: Reshapes whose target has another number of entries than what they read.
        """
        found: dict[str, tuple[int, str]] = {}
        for read, target, where in regroupings:
            if any(min(entry) <= 0 for entry in target):
                continue
            fitting = {symbol: self._fitting(self._known[symbol], read, multiply(target)) for symbol in self._fed}
            fitting = {symbol: size for symbol, size in fitting.items() if size is not None}
            if len(fitting) == 1:
                symbol, size = fitting.popitem()
                found.setdefault(symbol, (size, where))
        return found

    @staticmethod
    def _fitting(symbol: Size, read: Size, target: Size) -> int | None:
        """Return the one size of a symbol with which a Reshape reads as many entries as its target has."""
        sizes = {
            size * wanted // given if given % size == 0 and size * wanted % given == 0 else None
            for size, given, wanted in zip(symbol, read, target, strict=True)
        }
        return sizes.pop() if len(sizes) == 1 else None


def _fits(read: Size, target: Sequence[Size], old: Size, new: Size) -> bool:
    """Tell whether a Reshape has a target for all it reads once every entry of one size is of another."""
    listed = [new if entry == old else entry for entry in target if min(entry) > 0]
    left = divide(read, multiply(listed))
    return left is not None and (len(listed) < len(target) or set(left) == {1})


def _evaluate(text: str, known: Mapping[str, int]) -> int | None:
    """Evaluate a size written as a sum or product of symbols, as in `past_length + 1`; None where it is not one."""

    def value(tree) -> int:
        if isinstance(tree, ast.BinOp):
            return OPERATORS[type(tree.op)](value(tree.left), value(tree.right))
        if isinstance(tree, ast.Constant):
            return int(tree.value)
        return known[tree.id]

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, ValueError, TypeError):
        return None
