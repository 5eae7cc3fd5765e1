"""Sizes: integer arithmetic over the sizes of dynamic axes, exact as polynomials."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

PROBES = 3
"""How many sets of input sizes a graph is walked through with."""


@dataclass(frozen=True, eq=False)
class Symbol:
    """The size of one axis of one tensor, unknown until the module runs.

    Attributes: `probe` is its value in each probe, `value` and `axis` say where it can be read.
    """

    probe: tuple[int, ...]
    value: Any
    axis: int


@dataclass(frozen=True)
class Quotient:
    """An operation on sizes that polynomials do not close over; `template` is its Python text."""

    template: str
    operands: tuple
    probe: tuple[int, ...]


class Size:
    """A polynomial over symbols: `terms` maps a tuple of atoms (a monomial) to its coefficient.

    Arithmetic returns a plain int wherever nothing dynamic is left.

    Example:
        >>> batch, sequence = (Size.of(Symbol(p, None, i)) for i, p in enumerate([(2, 3, 5), (7, 11, 13)]))
        >>> (batch * sequence * 48) // (batch * 16) == sequence * 3
        True
        >>> sequence - sequence
        0
    """

    __slots__ = ("__dict__", "terms")

    def __init__(self, terms: dict[tuple, int]):
        self.terms = terms

    @staticmethod
    def of(atom: Symbol | Quotient) -> "Size":
        return Size({(atom,): 1})

    @functools.cached_property
    def probe(self) -> tuple[int, ...]:
        """Its value in each probe."""
        return tuple(
            sum(factor * math.prod(atom.probe[index] for atom in atoms) for atoms, factor in self.terms.items())
            for index in range(PROBES)
        )

    def __add__(self, other):
        return _combine(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other):
        return _combine(self, other, -1)

    def __rsub__(self, other):
        return _combine(_size(other), self, -1)

    def __neg__(self):
        return self * -1

    def __mul__(self, other):
        result: dict[tuple, int] = {}
        for left, one in self.terms.items():
            for right, two in _size(other).terms.items():
                atoms = tuple(sorted(left + right, key=id))
                result[atoms] = result.get(atoms, 0) + one * two
        return _plain(result)

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return _divide(self, _size(other))

    def __rfloordiv__(self, other):
        return _divide(_size(other), self)

    def __mod__(self, other):
        exact = _exact(self, _size(other))
        return 0 if exact is not None else operation("({} % {})", lambda a, b: a % b, self, other)

    def __rmod__(self, other):
        return operation("({} % {})", lambda a, b: a % b, other, self)

    def __eq__(self, other):
        return isinstance(other, Size) and self.terms == other.terms

    def __hash__(self):
        return hash(frozenset(self.terms.items()))

    def __repr__(self):
        return render(self, lambda atom: f"n{atom.axis}")


Integer = int | Size


def _size(given: Integer) -> Size:
    return given if isinstance(given, Size) else Size({(): int(given)} if given else {})


def _plain(terms: dict[tuple, int]) -> Integer:
    kept = {atoms: factor for atoms, factor in terms.items() if factor}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    return Size(kept)


def _combine(left: Size, right: Integer, sign: int) -> Integer:
    result = dict(left.terms)
    for atoms, factor in _size(right).terms.items():
        result[atoms] = result.get(atoms, 0) + sign * factor
    return _plain(result)


def _exact(left: Size, right: Size) -> Integer | None:
    if len(right.terms) != 1:
        return 1 if left.terms == right.terms else None
    ((below, divisor),) = right.terms.items()
    result = {}
    for atoms, factor in left.terms.items():
        rest = list(atoms)
        for atom in below:
            if atom not in rest:
                return None
            rest.remove(atom)
        if factor % divisor:
            return None
        result[tuple(rest)] = factor // divisor
    return _plain(result)


def _divide(left: Size, right: Size) -> Integer:
    exact = _exact(left, right)
    if exact is not None:
        return exact
    return operation("({} // {})", lambda a, b: a // b, _plain(left.terms), _plain(right.terms))


def probe_of(given: Integer) -> tuple[int, ...]:
    """Return the value in each probe."""
    return given.probe if isinstance(given, Size) else (int(given),) * PROBES


def operation(template: str, compute: Callable[..., int], *operands: Integer) -> Integer:
    """Return `compute` of the operands: an int where all are, else an atom with this Python text."""
    if not any(isinstance(operand, Size) for operand in operands):
        return int(compute(*map(int, operands)))
    probe = tuple(int(compute(*values)) for values in zip(*map(probe_of, operands), strict=True))
    return Size.of(Quotient(template, operands, probe))


def equal(left: Integer, right: Integer) -> bool | None:
    """Tell whether two sizes are equal, or None where that depends on the sizes of the run.

    Sizes of axes are taken to be at least 1.
    """
    gap = left - right
    if not isinstance(gap, Size):
        return gap == 0
    sign = {factor > 0 for factor in gap.terms.values()}
    simple = all(isinstance(atom, Symbol) for atoms in gap.terms for atom in atoms)
    lowest = sum(gap.terms.values())
    if simple and len(sign | {lowest > 0}) == 1 and lowest:
        return False
    return None


def render(given: Integer, name: Callable[[Symbol], str]) -> str:
    """Return Python text for a size, `name` giving the text of each symbol."""
    if not isinstance(given, Size):
        return str(int(given))

    def atom_text(atom) -> str:
        if isinstance(atom, Symbol):
            return name(atom)
        return atom.template.format(*(render(operand, name) for operand in atom.operands))

    parts = []
    for atoms, factor in sorted(given.terms.items(), key=lambda item: not item[0]):
        words = [atom_text(atom) for atom in atoms]
        if abs(factor) != 1 or not words:
            words.append(str(abs(factor)))
        parts.append(("-" if factor < 0 else "+", " * ".join(words)))
    parts.sort(key=lambda part: part[0] == "-")
    text = "".join(f" {sign} {words}" for sign, words in parts).strip()
    return "(" + text.removeprefix("+ ") + ")" if len(parts) > 1 or text.startswith("-") else text.removeprefix("+ ")


def symbols(given: Integer) -> set[Symbol]:
    """Return the symbols a size is made of."""
    if not isinstance(given, Size):
        return set()
    found: set[Symbol] = set()
    for atoms in given.terms:
        for atom in atoms:
            if isinstance(atom, Symbol):
                found.add(atom)
            else:
                found.update(*(symbols(operand) for operand in atom.operands))
    return found


@dataclass
class SizeTable:
    """Known sizes by their values in the probes: how a measured axis gets its expression back."""

    known: dict[tuple[int, ...], Integer] = field(default_factory=dict)
    roots: list[Symbol] = field(default_factory=list)

    def learn(self, given: Integer) -> None:
        if isinstance(given, Size) and all(isinstance(a, Symbol) for atoms in given.terms for a in atoms):
            self.known.setdefault(given.probe, given)

    def shape(self, value, shapes: Iterable[tuple[int, ...]]) -> tuple[Integer, ...]:
        """Return the sizes of `value`'s axes from its shape in each probe."""
        return tuple(self.find(probe, value, axis) for axis, probe in enumerate(zip(*shapes, strict=True)))

    def find(self, probe: tuple[int, ...], value, axis: int) -> Integer:
        """Return a constant, a known size, a line or product of known symbols, or a new symbol."""
        if len(set(probe)) == 1:
            return probe[0]
        if probe not in self.known:
            self.known[probe] = self._fit(probe) or self._new(probe, value, axis)
        return self.known[probe]

    def _new(self, probe, value, axis) -> Size:
        symbol = Symbol(probe, value, axis)
        self.roots.append(symbol)
        return Size.of(symbol)

    def _fit(self, probe: tuple[int, ...]) -> Integer | None:
        for symbol in self.roots:
            slope, rest = divmod(probe[1] - probe[0], symbol.probe[1] - symbol.probe[0])
            offset = probe[0] - slope * symbol.probe[0]
            line = tuple(slope * size + offset for size in symbol.probe)
            if not rest and slope > 0 and line == probe:
                return Size.of(symbol) * slope + offset
        for index, left in enumerate(self.roots):
            for right in self.roots[index:]:
                product = Size.of(left) * Size.of(right)
                factors = {p / q for p, q in zip(probe, product.probe, strict=True)}
                if len(factors) == 1 and (factor := factors.pop()).is_integer():
                    return product * int(factor)
        return None
