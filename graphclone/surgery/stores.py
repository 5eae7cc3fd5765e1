"""Rewrite what a node stores of sizes: an editor for each kind of site, see `graphclone.axes.registry.Store`."""

import functools
import math

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, Size, find
from graphclone.axes.typed import Site
from graphclone.dtypes import is_float, onnx_dtype_of
from graphclone.surgery.child import Child, Editor
from graphclone.surgery.vectors import patched, rescaled
from graphclone.weights import weight_of

# lists of sizes -------------------------------------------------------------------------------------------------


def _sizes(child: Child, site: Site, node: gs.Node) -> None:
    stored = _stored(site)
    if stored is None:
        return
    wanted = []
    for i, (value, axis) in enumerate(zip(stored, site.axes, strict=True)):
        if axis is not None and value == find(axis).size:
            value = child.cut.size(axis)
        elif axis is not None and value == (0, 0) and site.op.type == "Reshape" and i < len(site.op.axes[0]):
            if child.cut.size(site.op.axes[0][i]) != child.cut.size(axis):  # a zero copies the size of the input
                value = child.cut.size(axis)
        wanted.append(value)
    _write(child, site, node, stored, wanted)


def _stored(site: Site) -> list[Size] | None:
    """Return what the slot holds, an entry per axis and a value per probe."""
    if isinstance(site.slot, str):
        value = site.op.attribute(site.slot)
        return None if value is None else [(int(v), int(v)) for v in np.atleast_1d(value)]
    value = site.op.value(site.slot)
    return None if value is None else list(zip(*([int(v) for v in np.ravel(probe)] for probe in value), strict=True))


def _write(child: Child, site: Site, node: gs.Node, stored: list[Size], wanted: list[Size]) -> None:
    if stored == wanted:
        return
    if isinstance(site.slot, str):
        new = [entry[0] for entry in wanted]
        node.attrs[site.slot] = new if isinstance(node.attrs[site.slot], (list, tuple)) else new[0]
        return
    shape = np.shape(site.op.value(site.slot)[0])
    node.inputs[site.slot] = patched(child, node, node.inputs[site.slot], stored, wanted, shape, site.slot)


def _split(child: Child, site: Site, node: gs.Node) -> None:
    sizes = [child.cut.size(axis)[0] for axis in site.axes]
    if sizes == [find(axis).size[0] for axis in site.axes]:
        return
    if isinstance(site.slot, str):
        node.attrs["split"] = sizes
        return
    listed = site.op.has(1)
    if not listed and len(set(sizes)) == 1:
        return
    node.attrs.pop("num_outputs", None)
    constant = child.constant(node, 1, np.array(sizes, np.int64))
    if len(node.inputs) > 1:
        node.inputs[1] = constant
    else:
        node.inputs.append(constant)


# bounds and indices ---------------------------------------------------------------------------------------------


def _bounds(child: Child, site: Site, node: gs.Node) -> None:
    stored = _stored(site)
    entries = zip(stored, site.axes, site.whole, strict=True)
    _write(child, site, node, stored, [_bound(child, *entry) for entry in entries])


def _bound(child: Child, value: Size, axis: Axis | None, whole: Axis | None) -> Size:
    """Return the new value of a slice's bound: kept where it still means the required position."""
    if axis is None or whole is None:
        return value
    required, total = child.cut.size(axis), child.cut.size(whole)
    meant = tuple(min(max(v + t if v < 0 else v, 0), t) for v, t in zip(value, total, strict=True))
    if meant == required:
        return value
    return tuple(r - t if v < 0 and r < t else r for v, r, t in zip(value, required, total, strict=True))


def _range(child: Child, site: Site, node: gs.Node) -> None:
    begin, count = (child.cut.size(axis)[0] for axis in site.axes)
    total = child.cut.size(site.whole[0])[0]
    old = np.asarray(site.op.value(site.slot)[0])
    flat = old.reshape(-1)
    meant = np.where(flat < 0, flat + total, flat)
    if np.array_equal(meant, np.arange(begin, begin + count)):
        return
    new = np.arange(begin, begin + count, dtype=old.dtype)
    node.inputs[site.slot] = child.constant(node, site.slot, new.reshape(old.shape if old.size == count else (count,)))


def _stride(child: Child, site: Site, node: gs.Node) -> None:
    total, step = child.cut.size(site.axes[0])[0], int(site.value)
    old = np.asarray(site.op.value(site.slot)[0])
    new = np.arange(int(old[0]), total, step, dtype=old.dtype)
    if not np.array_equal(new, old):
        node.inputs[site.slot] = child.constant(node, site.slot, new)


def _regroup(child: Child, site: Site, node: gs.Node) -> None:
    """Write the Reshape that a Gather of every entry in order means: its indices are of the old sizes."""
    sizes = [child.cut.size(axis) for axis in site.axes]
    if sizes == [find(axis).size for axis in site.axes]:
        return
    target = [size[0] if len(set(size)) == 1 else -1 for size in sizes]
    node.op = "Reshape"
    node.attrs.clear()
    node.inputs[1] = child.constant(node, 1, np.array(target, np.int64))


def _select(child: Child, site: Site, node: gs.Node) -> None:
    picks = child.cut.picks(site.axes[0])
    if picks is None:
        return
    output = node.outputs[0]
    whole = gs.Variable(child.fresh(f"{output.name}_whole"), output.dtype)
    node.outputs[0] = whole
    indices = child.constant(node, 1, np.asarray(picks, np.int64))
    name = child.fresh_node(f"{node.name}_kept")
    child.behind[id(node)].append(gs.Node("Gather", name, {"axis": 0}, [whole, indices], [output]))


# scalars --------------------------------------------------------------------------------------------------------


def _scale(child: Child, site: Site, node: gs.Node) -> None:
    given = node.attrs.get("scale")
    if given in (None, 0.0) and child.cut.size(site.axes[0]) != find(site.axes[0]).size:
        node.attrs["scale"] = float(site.value)


def _denominator(child: Child, site: Site, node: gs.Node, less: int = 0) -> None:
    """Let a statistic's divisor or multiplier, (size - less) ** power, follow the size of the statistic's axes."""
    old = math.prod(find(axis).size[0] for axis in site.axes) - less
    new = math.prod(child.cut.size(axis)[0] for axis in site.axes) - less
    if old == new:
        return
    tensor, power = node.inputs[site.slot], site.value
    known = site.op.value(site.slot)
    if site.op.is_constant(site.slot) or np.array_equal(known[0], known[-1]):
        like = weight_of(tensor).load() if site.op.is_constant(site.slot) else known[0]
        node.inputs[site.slot] = child.constant(node, site.slot, np.full_like(like, float(new) ** power))
    elif is_float(onnx_dtype_of(known[0].dtype)):
        scaled = gs.Variable(child.fresh(f"{tensor.name}_rescaled"), tensor.dtype)
        factor = child.constant(node, site.slot, np.asarray((new / old) ** power, known[0].dtype))
        step = gs.Node("Mul", child.fresh_node(f"{node.name}_ratio"), {}, [tensor, factor], [scaled])
        child.before[id(node)].append(step)
        node.inputs[site.slot] = scaled
    else:
        node.inputs[site.slot] = rescaled(child, node, tensor, [(new,)], [(old,)], np.shape(known[0]))


STORES: dict[str, Editor] = {
    "sizes": _sizes,
    "split": _split,
    "begin": _bounds,
    "end": _bounds,
    "range": _range,
    "stride": _stride,
    "regroup": _regroup,
    "select": _select,
    "scale": _scale,
    "denominator": _denominator,
    "denominator_less_one": functools.partial(_denominator, less=1),
}
