"""The table of axis rules: one row per operator, keyed by (domain, operator).

A row is a signature (see `notation`), or a function from an `Op` to one for operators whose signature depends on
attributes, ranks or stored sizes. An operator without a row locks every axis it touches, and says so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from graphclone.axes.axis import Size
from graphclone.op import Op


@dataclass(frozen=True, slots=True)
class Store:
    """A place where a node stores sizes of axes, to be rewritten after a cut.

    slot: the input that holds them (a number), or the attribute (a name).
    pattern: the axes, in the notation, whose sizes the slot lists.
    kind: `sizes` (a list of them; -1, 0 and a broadcasting 1 stay), `begin` and `end` (bounds of a slice:
        the size of what lies before them; `whole` is the pattern of the sliced axes), `range` (consecutive
        indices from the size of the first axis on, as many as the second has), `split` (sizes of the outputs),
        `regroup` (the slot holds indices that only regroup axes to these: the node becomes a Reshape),
        `select` (the output lists positions of the axis: keep those that stay),
        `scale` (a float attribute whose default would follow the cut: write the parent's value).
    """

    slot: int | str
    pattern: str
    kind: str = "sizes"
    whole: str = ""
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Typing:
    """What a rule says about one node.

    text: its signature. sizes: of names that the inputs alone do not determine. stores: sizes kept in the node.
    fixed: names this operator forbids to cut. indexes: {input: name} where the input's values are positions on an
    axis; yields: {output: name} where the output's values are. moves: the first output rearranges the first input's
    values without computing. minimum: {name: least size}. steps: {name: what its size must be a multiple of}. fills:
    names of new axes along which the output repeats itself.
    """

    text: str
    sizes: Mapping[str, Size] = field(default_factory=dict)
    stores: tuple[Store, ...] = ()
    fixed: tuple[str, ...] = ()
    indexes: Mapping[int, str] = field(default_factory=dict)
    yields: Mapping[int, str] = field(default_factory=dict)
    moves: bool = False
    minimum: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    fills: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table."""

    op: str
    domain: str
    signature: str | Callable[[Op], "str | Typing | None"]
    stores: Mapping[str, str] = field(default_factory=dict)
    moves: bool = False
    note: str = ""

    def read(self, op: Op) -> Typing | None:
        """Return what the rule says about a node; None where it cannot tell (sizes that depend on data)."""
        if isinstance(self.signature, str):
            sizes = {name: (int(op.attribute(key)),) for key, name in self.stores.items() if key in op.node.attrs}
            stores = tuple(Store(key, name) for key, name in self.stores.items() if key in op.node.attrs)
            return Typing(self.signature, sizes, stores, moves=self.moves)
        typing = self.signature(op)
        return Typing(typing, moves=self.moves) if isinstance(typing, str) else typing


RULES: dict[tuple[str, str], Rule] = {}


def rule(
    ops: str | Iterable[str],
    signature: str | Callable[[Op], "str | Typing | None"],
    *,
    domain: str = "",
    stores: Mapping[str, str] | None = None,
    moves: bool = False,
    note: str = "",
) -> None:
    """Add rows to the table; an existing row of the same operator is replaced.

    ops: one operator type or several that behave alike. signature: text, or a function of an `Op`.
    domain: the operators' domain, "" for the standard one. stores: {integer attribute: name of the axis whose size
    it stores}. moves: the operator rearranges values without computing.

    Example:
        >>> rule("MyScale", "... d, d -> ... d", domain="example.ops")
        >>> find_rule("example.ops", "MyScale").signature
        '... d, d -> ... d'
    """
    for op in [ops] if isinstance(ops, str) else ops:
        RULES[domain, op] = Rule(op, domain, signature, dict(stores or {}), moves, note)


def find_rule(domain: str, op: str) -> Rule | None:
    """Return the row of an operator, or None."""
    return RULES.get((domain, op))


def letters(count: int, prefix: str = "a") -> list[str]:
    """Return names for a run of axes: a0 a1 a2."""
    return [f"{prefix}{i}" for i in range(count)]
