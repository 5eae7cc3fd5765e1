"""An axis as a width: what makes two the same, why one cannot be cut, which parts of it count."""

from collections.abc import Iterable

from graphclone.axes.axis import Axis, find, first_lock, is_static, is_unit, leaves, outer_parts


def lock_of(axis: Axis) -> str | None:
    """Return why an axis cannot be cut, or None; of a product one factor suffices: it is then cut in whole groups."""
    axis = find(axis)
    if axis.kind != "product":
        return first_lock(axis)
    parts = [part for part in axis.parts if not is_unit(part)]
    return None if any(lock_of(part) is None for part in parts) else first_lock(axis)


def is_in_groups(axis: Axis) -> bool:
    """Tell whether an axis is cut in whole groups: a product with a factor that is locked and one that is not."""
    return find(axis).kind == "product" and lock_of(axis) is None and first_lock(axis) is not None


def is_of_units(axis: Axis) -> bool:
    """Tell whether an axis consists of entries that are picked one by one: there is nothing in it to cut."""
    return all(is_unit(leaf) for leaf in leaves(axis))


def static_parts(axes: Iterable[Axis]) -> list[Axis]:
    """Return the static axes larger than one; where there is none, those inside products (batch x heads)."""
    axes = list(axes)
    static = [axis for axis in axes if is_static(axis) and not is_unit(axis)]
    return static or [part for axis in axes for part in outer_parts(axis) if is_static(part) and not is_unit(part)]


def axis_key(axis: Axis) -> tuple:
    """Return what two axes share when they are made of the same atoms in the same way."""
    axis = find(axis)
    return (id(axis),) if axis.kind == "atom" else (axis.kind, *(axis_key(part) for part in axis.parts))
