"""The notation of axis signatures, parsed: `b s (h d), d ~e -> b s h e`.

Each side lists one pattern per tensor, separated by commas; a pattern lists its axes:

    name      an axis; the same name is the same axis everywhere in the signature
    ~name     an axis the operator takes statistics over (it may be cut, the statistics then change)
    name?     an axis that may also have size one here (it broadcasts)
    (h d)     the row-major product of axes; (q + k) their concatenation; both nest
    ...       any leading axes, broadcast against every other `...`
    1         an axis of size one
    _         an axis this operator fixes; a pattern that is only `_` fixes every axis of that tensor
    .         a pattern that is only `.` is a tensor whose axes do not matter (a shape vector, a scalar)
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"\.\.\.|[()+~?,.]|->|[A-Za-z_][A-Za-z_0-9]*|\d+")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One axis of a pattern: `kind` is name, product, sum, broadcast, unit, fixed or any."""

    kind: str
    name: str = ""
    parts: tuple["Pattern", ...] = ()
    statistic: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """A parsed signature: one tuple of patterns per input and per output."""

    text: str
    inputs: tuple[tuple[Pattern, ...], ...]
    outputs: tuple[tuple[Pattern, ...], ...]


class NotationError(ValueError):
    """A signature that does not parse."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Signature:
    """Parse a signature.

    Example:
        >>> len(parse("... m k, k n -> ... m n").inputs)
        2
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise NotationError(f"no '->' in the signature {text!r}; write 'inputs -> outputs'")
    return Signature(text, _tensors(left, text), _tensors(right, text))


@lru_cache(maxsize=4096)
def parse_axes(text: str) -> tuple[Pattern, ...]:
    """Parse the axes of one tensor, as in `b (h d)`."""
    return _tensors(text, text)[0]


def moves(signature: Signature, fixed: Iterable[str] = ()) -> bool:
    """Tell whether an operator asks nothing of its inputs' axes: each is passed on, moved or merged into another.

    Example:
        >>> [moves(parse(text)) for text in ("a 1 c, . -> (a c)", "(a b) c, . -> a b c", "... k, k n -> ... n")]
        [True, False, False]
    """
    patterns = [pattern for tensor in signature.inputs for pattern in tensor if pattern.kind != "any"]
    names = [pattern.name or pattern.kind for pattern in patterns if pattern.kind != "unit"]
    plain = all(pattern.kind in ("name", "broadcast", "unit") and not pattern.statistic for pattern in patterns)
    return plain and len(names) == len(set(names)) and not any(fixed)


def names_in(*patterns: Pattern) -> Iterator[str]:
    """Yield the names in patterns, in order, with repetitions.

    Example:
        >>> list(names_in(*parse_axes("b (h d)")))
        ['b', 'h', 'd']
    """
    for pattern in patterns:
        if pattern.kind == "name":
            yield pattern.name
        else:
            yield from names_in(*pattern.parts)


def _tensors(side: str, text: str) -> tuple[tuple[Pattern, ...], ...]:
    if leftover := _TOKEN.sub("", side).strip():
        raise NotationError(f"cannot read {leftover!r} in the signature {text!r}")
    tensors = []
    for part in side.split(","):
        tokens = _TOKEN.findall(part)
        patterns, rest = _axes(tokens, text)
        if rest:
            raise NotationError(f"unbalanced ')' in the signature {text!r}")
        tensors.append(tuple(patterns))
    return tuple(tensors)


def _axes(tokens: list[str], text: str) -> tuple[list[Pattern], list[str]]:
    patterns: list[Pattern] = []
    while tokens and tokens[0] not in (")", "+"):
        token, tokens = tokens[0], tokens[1:]
        statistic = token == "~"
        if statistic:
            token, tokens = tokens[0], tokens[1:]
        if token == "(":
            pattern, tokens = _group(tokens, text)
        elif token == "...":
            pattern = Pattern("broadcast")
        elif token == ".":
            pattern = Pattern("any")
        elif token == "_":
            pattern = Pattern("fixed")
        elif token == "1":
            pattern = Pattern("unit")
        else:
            pattern = Pattern("name", token)
        optional = bool(tokens) and tokens[0] == "?"
        if optional:
            tokens = tokens[1:]
        if statistic or optional:
            pattern = Pattern(pattern.kind, pattern.name, pattern.parts, statistic, optional)
        patterns.append(pattern)
    return patterns, tokens


def _group(tokens: list[str], text: str) -> tuple[Pattern, list[str]]:
    operands = []
    while True:
        factors, tokens = _axes(tokens, text)
        operands.append(factors[0] if len(factors) == 1 else Pattern("product", parts=tuple(factors)))
        if not tokens:
            raise NotationError(f"no ')' for a '(' in the signature {text!r}")
        closing, tokens = tokens[0], tokens[1:]
        if closing == ")":
            break
    pattern = operands[0] if len(operands) == 1 else Pattern("sum", parts=tuple(operands))
    return pattern, tokens
