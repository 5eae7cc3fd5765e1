"""Axis rules of operators that pick entries: Gather and kin, Scatter and kin, TopK, OneHot."""

from dataclasses import replace

import numpy as np

from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.axes.structure import regroup
from graphclone.op import Op, Values


def gather(op: Op) -> Typing:
    """Pick along one axis: a consecutive run by constants is a slice, other constants fix it, ids range over it."""
    rank = op.rank(0)
    axis = op.axis(rank, 0)
    names, picked = letters(rank), letters(op.rank(1), "i")
    value = op.value(1)
    size = op.sizes(0)[axis]
    if value is not None and rank == 1 and (regrouped := _regrouped(op, value)) is not None:
        return regrouped
    if value is not None and len(set(size)) == 1 and np.array_equal(value[0], value[-1]):
        run = _consecutive(np.asarray(value[0]), size[0])
        if run is not None and op.rank(1) <= 1:
            return _gather_run(op, axis, *run)
        if value[0].ndim == 1 and (step := _strided(np.asarray(value[0]), size[0])):
            inputs = ["(n k)" if i == axis else name for i, name in enumerate(names)]
            outputs = ["n" if i == axis else name for i, name in enumerate(names)]
            stores = (Store(1, "(n k)", "stride", value=step),)
            text = f"{' '.join(inputs)}, . -> {' '.join(outputs)}"
            return Typing(text, {"n": (size[0] // step,), "k": (step,)}, stores, ("k",))
    outputs = " ".join(names[:axis] + picked + names[axis + 1 :])
    indices = " ".join(picked)
    if value is None:
        return Typing(f"{' '.join(names)}, {indices} -> {outputs}", indexes={1: names[axis]}, moves=True)
    return Typing(f"{' '.join(names)}, {indices} -> {outputs}", fixed=(names[axis],), moves=True)


def _regrouped(op: Op, value: Values) -> Typing | None:
    """Pick every entry once, in order: a Reshape, as torch's `as_strided` of contiguous memory is exported."""
    outs = [tuple(sizes) for sizes in zip(*(entry.shape for entry in value), strict=True)]
    if len(outs) < 2 or sum(len(set(sizes)) > 1 for sizes in outs) > 1:
        return None
    for entry, size in zip(value, op.sizes(0)[0], strict=True):
        if entry.size != size or not np.array_equal(np.ravel(entry), np.arange(size)):
            return None
    typing = regroup(op.sizes(0), outs, 1)
    return replace(typing, stores=tuple(replace(store, kind="regroup") for store in typing.stores))


def _consecutive(indices: np.ndarray, size: int) -> tuple[int, int] | None:
    flat = indices.reshape(-1).astype(np.int64)
    flat = np.where(flat < 0, flat + size, flat)
    if flat.size and np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
        return int(flat[0]), int(flat.size)
    return None


def _strided(indices: np.ndarray, size: int) -> int:
    """Return the step of indices that pick every step-th entry, at any offset below it; 0 otherwise."""
    if indices.size < 2:
        return 0
    step = int(indices[1] - indices[0])
    if step < 2 or size != step * indices.size or not 0 <= indices[0] < step:
        return 0
    return step if np.array_equal(indices, np.arange(int(indices[0]), size, step)) else 0


def _gather_run(op: Op, axis: int, start: int, count: int) -> Typing:
    names = letters(op.rank(0))
    size = op.sizes(0)[axis][0]
    inputs = ["(b + i + e)" if n == axis else name for n, name in enumerate(names)]
    outputs = names[:axis] + (["i"] if op.rank(1) == 1 else []) + names[axis + 1 :]
    sizes = {"b": (start,), "i": (count,), "e": (size - start - count,)}
    stores = (Store(1, "b i", "range", "(b + i + e)"),)
    return Typing(f"{' '.join(inputs)}, . -> {' '.join(outputs)}", sizes, stores, moves=True)


def gather_elements(op: Op) -> Typing:
    """Pick per entry along one axis; the other axes go along where both have them whole."""
    rank, axis = op.rank(0), op.axis(op.rank(0), 0)
    data, indices = letters(rank), letters(rank)
    indices[axis] = "k"
    fixed = []
    for i in range(rank):
        if i != axis and op.sizes(0)[i] != op.sizes(1)[i]:
            indices[i] = f"j{i}"
            fixed += [f"a{i}", f"j{i}"]
    text = f"{' '.join(data)}, {' '.join(indices)} -> {' '.join(indices)}"
    return Typing(text, fixed=tuple(fixed), indexes={1: data[axis]})


def gather_nd(op: Op) -> Typing | None:
    """Pick by index tuples: each entry of the last axis of the indices addresses one axis of the data."""
    batch = int(op.attribute("batch_dims", 0))
    if op.rank(1) == 0 or len(set(op.sizes(1)[-1])) > 1:
        return None
    depth = op.sizes(1)[-1][0]
    data = letters(op.rank(0))
    lead = data[:batch]
    indices = lead + [f"i{n}" for n in range(op.rank(1) - 1 - batch)]
    rest = data[batch + depth :]
    addressed = data[batch : batch + depth]
    value = op.value(1)
    text = f"{' '.join(data)}, {' '.join(indices)} _ -> {' '.join(indices + rest)}"
    if depth == 1 and value is None:
        return Typing(text, indexes={1: addressed[0]}, moves=True)
    same = value is not None and np.array_equal(value[0], value[-1])
    if depth == 1 and same and value[0].size == 1 and len(set(op.sizes(0)[batch])) == 1:
        start, size = int(value[0].reshape(-1)[0]) % op.sizes(0)[batch][0], op.sizes(0)[batch][0]
        inputs = " ".join([*lead, "(b + i + e)", *rest])
        ones = " ".join(lead + ["1"] * (op.rank(1) - 1 - batch))
        sizes = {"b": (start,), "i": (1,), "e": (size - start - 1,)}
        stores = (Store(1, "b i", "range", "(b + i + e)"),)
        return Typing(f"{inputs}, {ones} _ -> {ones} {' '.join(rest)}", sizes, stores, moves=True)
    return Typing(text, fixed=tuple(addressed))


def scatter_nd(op: Op) -> Typing | None:
    """Overwrite what index tuples address; addressed axes are fixed, the rest goes along."""
    if op.rank(1) == 0 or len(set(op.sizes(1)[-1])) > 1:
        return None
    depth = op.sizes(1)[-1][0]
    data = letters(op.rank(0))
    indices = letters(op.rank(1) - 1, "i")
    updates = " ".join(indices + data[depth:])
    text = f"{' '.join(data)}, {' '.join(indices)} _, {updates} -> {' '.join(data)}"
    return Typing(text, fixed=tuple(data[:depth]))


def scatter_elements(op: Op) -> Typing:
    """Overwrite per entry along one axis; the other axes go along where both have them whole."""
    rank, axis = op.rank(0), op.axis(op.rank(0), 0)
    data, indices, fixed = letters(rank), letters(rank), []
    for i in range(rank):
        if i == axis or op.sizes(0)[i] != op.sizes(1)[i]:
            indices[i] = f"j{i}"
            fixed += [f"j{i}"] if i == axis else [f"a{i}", f"j{i}"]
    listed = " ".join(indices)
    text = f"{' '.join(data)}, {listed}, {listed} -> {' '.join(data)}"
    return Typing(text, fixed=tuple(fixed), indexes={1: data[axis]})


def one_hot(op: Op) -> Typing | None:
    """A new axis whose positions the indices name; the depth is its size."""
    depth = op.value(1)
    if depth is None:
        return None
    size = tuple(int(np.atleast_1d(entry)[0]) for entry in depth)
    rank = op.rank(0) + 1
    axis = op.axis(rank, -1)
    names = letters(op.rank(0))
    outputs = [*names[:axis], "h", *names[axis:]]
    text = f"{' '.join(names)}, ., . -> {' '.join(outputs)}"
    return Typing(text, {"h": size}, (Store(1, "h"),), indexes={0: "h"})


def top_k(op: Op) -> Typing | None:
    """The k largest along one axis, and their positions on it; the axis must keep at least k."""
    axis = op.axis(op.rank(0), -1)
    names = letters(op.rank(0))
    value = op.integers("k", 1)
    count = op.value(1)
    if value is None and count is None:
        return None
    sizes = (value[0],) if value is not None else tuple(int(np.atleast_1d(entry)[0]) for entry in count)
    inputs = " ".join("~" + n if i == axis else n for i, n in enumerate(names))
    outputs = " ".join("k" if i == axis else n for i, n in enumerate(names))
    text = f"{inputs}, . -> {outputs}, {outputs}"
    return Typing(text, {"k": sizes}, fixed=("k",), yields={1: names[axis]}, minimum={names[axis]: sizes[0]})


def running(op: Op) -> Typing:
    """CumSum: the order along the axis matters, so it is fixed."""
    value = op.integers("axis", 1)
    names = letters(op.rank(0))
    fixed = (names[value[0] % op.rank(0)],) if value is not None else tuple(names)
    return Typing(f"{' '.join(names)}, . -> {' '.join(names)}", fixed=fixed)


def triangle(op: Op) -> Typing:
    """Trilu: positions on the last two axes matter, so they are fixed."""
    return Typing("... p q, . -> ... p q", fixed=("p", "q"))


def non_zero(op: Op) -> Typing:
    """Positions of the entries that are not zero: how many depends on data."""
    rank = op.rank(0)
    return Typing(f"{' '.join('_' for _ in range(rank))} -> r n", {"r": (rank,), "n": (4093, 4099)}, fixed=("r", "n"))


rule("Gather", gather)
rule("GatherElements", gather_elements)
rule("GatherND", gather_nd)
rule("ScatterND", scatter_nd)
rule(["ScatterElements", "Scatter"], scatter_elements)
rule("OneHot", one_hot)
rule("TopK", top_k)
rule("CumSum", running)
rule("Trilu", triangle)
rule("NonZero", non_zero)
