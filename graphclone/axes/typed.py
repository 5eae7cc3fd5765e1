"""What the solver finds: axes of tensors, typed nodes, and the places that store sizes."""

from collections import defaultdict
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis
from graphclone.op import Op, Values

Axes = list[Axis]


@dataclass(slots=True)
class Site:
    """A place in the graph that stores sizes of axes; `axes` and `whole` are the store's patterns, bound."""

    op: Op
    slot: int | str
    kind: str
    axes: tuple[Axis, ...]
    whole: tuple[Axis, ...] = ()
    value: float = 0.0
    reported: Values | None = None


@dataclass(slots=True)
class TypedNode:
    """A node with its signature and what its names stand for."""

    op: Op
    text: str
    bound: dict[str, Axis]
    outputs: list[Axes | None]
    constrains: bool = True


@dataclass(slots=True)
class Use:
    """One use of an initializer: the consumer's slot and the axes it has there (slot None: a graph output)."""

    node: gs.Node | None
    slot: int
    axes: Axes


@dataclass(slots=True)
class AxisTyping:
    """The result of a sweep.

    types: axes of every tensor by name (None where unknown). uses: every use of every initializer. nodes: every
    node in order. sites: what surgery rewrites. index_axes: {integer graph input: the axis its values range over},
    position_outputs the same of graph outputs. written: symbolic sizes that only one number fits: {symbol: (the number,
    the node that says so)}.
    minimum: (axis, least size, node) triples. steps: (axis, what its size must be a multiple of, node) triples. fills:
    (axis of a generated fill, axis it broadcasts against) pairs. unknown: nodes without a rule. values: known shape
    arithmetic.
    """

    types: dict[str, Axes | None] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    nodes: list[TypedNode] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    index_axes: dict[str, Axis] = field(default_factory=dict)
    position_outputs: dict[str, Axis] = field(default_factory=dict)
    minimum: list[tuple[Axis, int, str]] = field(default_factory=list)
    steps: list[tuple[Axis, int, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    values: dict[str, Values] = field(default_factory=dict)
    fills: list[tuple[Axis, Axis]] = field(default_factory=list)
    written: dict[str, tuple[int, str]] = field(default_factory=dict)
