"""Bind a signature to one node: what each of its names stands for, and the axes its outputs have."""

import functools
from collections.abc import Iterator, Sequence

from graphclone.axes.axis import (
    Axis,
    Equations,
    Size,
    divide,
    is_fill,
    is_static,
    is_unit,
    leaves,
    lock,
    multiply,
    product,
    total,
)
from graphclone.axes.notation import Pattern, names_in, parse, parse_axes
from graphclone.axes.registry import Store, Typing
from graphclone.axes.typed import Axes, Site
from graphclone.op import Op

Group = tuple[Pattern, Axis]


class Binding:
    """What the names of a signature stand for at one node; making it adds the node's equations.

    op, typing: the node, and what its rule says. equations: where its equations go. fills: where pairs go of a fill's
    axis and the axis it broadcasts against, which are no equation.
    """

    def __init__(self, op: Op, typing: Typing, equations: Equations, fills: list[tuple[Axis, Axis]]):
        self.op = op
        self.signature = parse(typing.text)
        self.sizes: dict[str, Size] = {name: size if len(size) > 1 else size * 2 for name, size in typing.sizes.items()}
        self.bound: dict[str, Axis] = {}
        self._equations = equations
        self._fills = fills
        self._torn: dict[str, str] = {}  # name of an axis that an input has otherwise than its pattern says -> why
        self._strange = ""  # why the signature does not speak of the inputs as they are
        groups = self._bind_inputs()
        for pattern, axis in self._solvable_first(groups):
            built = self._build(pattern, axis.size)
            if built is None:
                lock(axis, f"{op.where} groups it")
                self._torn |= dict.fromkeys(names_in(pattern), f"{op.where} groups it")
            else:
                equations.equate(built, axis)
        for name in typing.fills:
            self._name(name).fill = True
        for name, reason in {**dict.fromkeys(typing.fixed, f"{op.where} fixes it"), **self._torn}.items():
            if name in self.bound or name in self.sizes:
                lock(self._name(name), reason)
        if self._strange:
            for axis in (*self._lead, *map(self._name, {**self.bound, **self.sizes})):
                lock(axis, self._strange)

    def outputs(self) -> list[Axes | None]:
        """Return the axes of each output that the signature has; None where it says nothing of them."""
        return [
            self._output(patterns) for patterns, _ in zip(self.signature.outputs, self.op.node.outputs, strict=False)
        ]

    def site(self, store: Store) -> Site:
        """Return the place where the node stores sizes of axes, as a store of its rule says."""
        axes = tuple(self._listed(p) for p in parse_axes(store.pattern)) if store.pattern else ()
        whole = tuple(self._listed(p) for p in parse_axes(store.whole)) if store.whole else ()
        return Site(self.op, store.slot, store.kind, axes, whole, store.value)

    # inputs -----------------------------------------------------------------------------------------------------

    def _bind_inputs(self) -> list[Group]:
        """Bind what stands alone; return the products and sums, which are solved behind."""
        spread: list[Sequence[Axis]] = []
        groups: list[Group] = []
        for patterns, axes in zip(self.signature.inputs, self.op.axes, strict=False):
            if axes is None:
                continue
            if patterns and patterns[0].kind == "any":
                if len(axes) == 1:
                    lock(axes[0], f"{self.op.where} reads it whole")
                continue
            self._bind_tensor(patterns, axes, spread, groups)
        for slot, axes in enumerate(self.op.axes[len(self.signature.inputs) :], len(self.signature.inputs)):
            if any(not is_unit(axis) for axis in axes or ()):
                self._give_up(axes, f"{self.op.where} has an input {slot} that its rule does not speak of")
        for name in _statistics(self.signature.text):
            for leaf in leaves(self.bound[name]) if name in self.bound else ():
                leaf.fill = False  # a statistic depends on how often its entries repeat
        self._lead = self._broadcast(spread)
        return groups

    def _bind_tensor(self, patterns: tuple[Pattern, ...], axes: Axes, spread: list, groups: list[Group]) -> None:
        if len(patterns) == 1 and patterns[0].kind == "fixed":
            patterns = patterns * len(axes)
        where = next((i for i, pattern in enumerate(patterns) if pattern.kind == "broadcast"), None)
        if where is not None:
            count = len(axes) - len(patterns) + 1
            if count >= 0:
                spread.append(axes[where : where + count])
                axes = axes[:where] + axes[where + count :]
                patterns = patterns[:where] + patterns[where + 1 :]
        if len(axes) != len(patterns):
            return self._give_up(axes, f"{self.op.where} has an input of unexpected rank {len(axes)}")
        for pattern, axis in zip(patterns, axes, strict=True):
            if pattern.optional and is_unit(axis):
                continue
            if pattern.kind == "name":
                known = self.bound.setdefault(pattern.name, axis)
                if known is not axis:
                    self._equations.equate(known, axis)
            elif pattern.kind == "fixed":
                lock(axis, f"{self.op.where} fixes it")
            elif pattern.kind == "unit":
                if not is_unit(axis):
                    lock(axis, f"{self.op.where} expects size one")
            else:
                groups.append((pattern, axis))

    def _give_up(self, axes: Axes, reason: str) -> None:
        """Lock the axes of an input that the signature does not describe; all others are locked in the end."""
        for axis in axes:
            lock(axis, reason)
        self._strange = self._strange or reason

    def _broadcast(self, spread: Sequence[Sequence[Axis]]) -> Axes:
        """Equate the leading axes of the inputs from behind, and return those of the output."""
        if len(spread) == 1:
            return list(spread[0])
        rank = max((len(axes) for axes in spread), default=0)
        result: Axes = []
        for position in range(-rank, 0):
            chosen = None
            for axes in spread:
                if len(axes) < -position:
                    continue
                axis = axes[position]
                if chosen is None or is_unit(chosen):
                    chosen = axis
                elif is_fill(chosen) != is_fill(axis) and is_static(axis):
                    fill, real = (chosen, axis) if is_fill(chosen) else (axis, chosen)
                    if not is_unit(real):
                        self._fills.append((fill, real))
                        chosen = real
                elif not is_unit(axis):
                    self._equations.equate(chosen, axis)
            result.append(chosen)
        return result

    def _solvable_first(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Yield groups whose names are known but for one before those that learn from them."""
        waiting = list(groups)
        while waiting:
            ready = [group for group in waiting if len(self._unknown(group[0])) <= 1]
            batch = ready or waiting
            yield from batch
            waiting = [group for group in waiting if not any(group is done for done in batch)]

    # what a pattern stands for ----------------------------------------------------------------------------------

    def _unknown(self, pattern: Pattern) -> set[str]:
        return {name for name in names_in(pattern) if name not in self.bound and name not in self.sizes}

    def _name(self, name: str) -> Axis:
        if name not in self.bound:
            self.bound[name] = Axis(self.sizes[name])
        return self.bound[name]

    def _build(self, pattern: Pattern, size: Size | None = None) -> Axis | None:
        """Return the axis a pattern stands for, making atoms for new names; `size` settles one unknown name."""
        if pattern.kind == "name":
            if pattern.name not in self.bound:
                known = self.sizes.get(pattern.name, size)
                if known is None or (size is not None and known != size):
                    return None
                self.bound[pattern.name] = Axis(known)
            return self.bound[pattern.name]
        if pattern.kind in ("unit", "fixed"):
            return Axis((1, 1))
        known = [None if self._unknown(part) else self._build(part) for part in pattern.parts]
        if None in known:
            missing = known.index(None)
            rest = [axis.size for axis in known if axis is not None]
            left = None if size is None or known.count(None) > 1 else _left(pattern, size, rest)
            if left is None or min(left) < 0:
                return None
            known[missing] = self._build(pattern.parts[missing], left)
            if known[missing] is None:
                return None
        for part in known:
            for leaf in leaves(part):
                leaf.fill = False  # where other entries lie beside or inside them, entries cannot become one
        whole = product(known) if pattern.kind == "product" else total(known)
        return None if size is not None and whole.size != size else whole

    def _output(self, patterns: Sequence[Pattern]) -> Axes | None:
        axes: Axes = []
        for pattern in patterns:
            if pattern.kind == "any":
                return None
            if pattern.kind == "broadcast":
                axes += self._lead
                continue
            axis = self._build(pattern)
            if axis is None:
                return None
            axes.append(axis)
        return axes

    def _listed(self, pattern: Pattern) -> Axis | None:
        if pattern.kind == "name" and pattern.name == "0":
            return Axis((0, 0))
        return None if pattern.kind == "fixed" else self._build(pattern)


def _left(pattern: Pattern, size: Size, rest: Sequence[Size]) -> Size | None:
    """Return the size of a group's one unknown part; None where the known ones do not divide the whole."""
    if not rest:
        return size
    if pattern.kind == "product":
        return divide(size, multiply(rest))
    return tuple(a - sum(column) for a, column in zip(size, zip(*rest, strict=True), strict=True))


@functools.cache
def _statistics(text: str) -> frozenset[str]:
    """Return the names of what a signature takes statistics over."""

    def within(pattern: Pattern) -> set[str]:
        if pattern.statistic:
            return set(names_in(pattern))
        return {name for part in pattern.parts for name in within(part)}

    return frozenset(name for patterns in parse(text).inputs for pattern in patterns for name in within(pattern))
