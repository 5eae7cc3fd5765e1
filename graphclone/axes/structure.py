"""Axis rules of operators that rearrange axes: Reshape, Transpose, Concat, Split, Slice, Expand, Tile, Pad, Resize."""

import numpy as np

from graphclone.axes.axis import Size, divide, multiply
from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.op import Op


def transpose(op: Op) -> str:
    names = letters(op.rank(0))
    order = op.attribute("perm", list(range(op.rank(0)))[::-1])
    return f"{' '.join(names)} -> {' '.join(names[i] for i in order)}"


def squeeze(op: Op) -> str | None:
    """Drop axes of size one."""
    names = letters(op.rank(0))
    axes = op.integers("axes", 1)
    if axes is None and (op.has(1) or "axes" in op.node.attrs):
        return None
    if axes is None:
        axes = [i for i, size in enumerate(op.sizes(0)) if set(size) == {1}]
    dropped = {axis % len(names) for axis in axes if names}
    inputs = ["1" if i in dropped else name for i, name in enumerate(names)]
    return f"{' '.join(inputs)}, . -> {' '.join(name for i, name in enumerate(names) if i not in dropped)}"


def unsqueeze(op: Op) -> str | None:
    """Insert axes of size one."""
    axes = op.integers("axes", 1)
    if axes is None:
        return None
    rank = op.rank(0) + len(axes)
    added = {axis % rank for axis in axes}
    names = iter(letters(op.rank(0)))
    return f"{' '.join(letters(op.rank(0)))}, . -> {' '.join('1' if i in added else next(names) for i in range(rank))}"


def reshape(op: Op) -> Typing | None:
    """Regroup axes in row-major order; the target lists the new sizes."""
    target = op.value(1)
    if target is None and op.attribute("shape") is not None:
        target = (np.array(op.attribute("shape")),) * 2
    if target is None or len({entry.size for entry in target}) != 1:
        return None
    sizes = op.sizes(0)
    columns = [_resolve(entry, [size[p] for size in sizes], op) for p, entry in enumerate(target)]
    if any(column is None for column in columns):
        return None
    outs = [tuple(column[i] for column in columns) for i in range(target[0].size)]
    return regroup(sizes, outs, 1)


def _resolve(target, sizes: list[int], op: Op) -> list[int] | None:
    """Return the sizes a target means: 0 copies (unless allowzero), -1 makes up the rest."""
    entries = [int(entry) for entry in np.atleast_1d(target)]
    if not op.attribute("allowzero", 0):
        if any(entry == 0 and i >= len(sizes) for i, entry in enumerate(entries)):
            return None
        entries = [sizes[i] if entry == 0 else entry for i, entry in enumerate(entries)]
    if entries.count(-1) == 1:
        known = int(np.prod([entry for entry in entries if entry != -1]))
        count = int(np.prod(sizes)) if sizes else 1
        if known == 0 or count % known:
            return None
        entries = [count // known if entry == -1 else entry for entry in entries]
    return None if np.prod(entries) != np.prod(sizes) else entries


def flatten(op: Op) -> Typing:
    """Merge the axes before and from `axis` on."""
    axis = op.axis(op.rank(0), 1)
    sizes = op.sizes(0)
    ones = (1,) * (len(sizes[0]) if sizes else 2)
    return regroup(sizes, [multiply(sizes[:axis] or [ones]), multiply(sizes[axis:] or [ones])])


def regroup(ins: list[Size], outs: list[Size], slot: int | None = None) -> Typing:
    """Return the signature of a row-major regrouping: the common refinement of both lists of sizes.

    Example:
        >>> regroup([(2, 3), (5, 7), (48, 48)], [(2, 3), (5, 7), (3, 3), (16, 16)]).text
        'a3 a2 (a1 a0), . -> a3 a2 a1 a0'
    """
    groups_in: list[list[str]] = [[] for _ in ins]
    groups_out: list[list[str]] = [[] for _ in outs]
    sizes: dict[str, Size] = {}
    fixed: set[tuple[str, int]] = set()
    i, j = len(ins) - 1, len(outs) - 1
    rest_in = rest_out = None
    while True:
        while i >= 0 and rest_in is None and set(ins[i]) == {1}:
            i -= 1
        while j >= 0 and rest_out is None and set(outs[j]) == {1}:
            j -= 1
        if i < 0 or j < 0:
            break
        left, right = rest_in or ins[i], rest_out or outs[j]
        if left == right or divide(right, left):
            shared = left
        elif divide(left, right):
            shared = right
        elif rest_in is None and rest_out is None:
            i, j = _fix_until_equal(ins, outs, i, j, fixed)
            continue
        else:
            fixed |= {("in", n) for n in range(i + 1)} | {("out", n) for n in range(j + 1)}
            break
        name = f"a{len(sizes)}"
        sizes[name] = shared
        groups_in[i].insert(0, name)
        groups_out[j].insert(0, name)
        rest_in, rest_out = divide(left, shared), divide(right, shared)
        if set(rest_in) == {1}:
            i, rest_in = i - 1, None
        if set(rest_out) == {1}:
            j, rest_out = j - 1, None

    def is_whole(which: str, position: int) -> bool:
        names = (groups_in if which == "in" else groups_out)[position]
        size = (ins if which == "in" else outs)[position]
        return (which, position) not in fixed and multiply([(1,) * len(size), *(sizes[n] for n in names)]) == size

    def axis_text(which: str, position: int) -> str:
        names = (groups_in if which == "in" else groups_out)[position]
        if not is_whole(which, position):
            return "_" if which == "in" else f"z{position}"
        return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"

    torn = {name for n, group in enumerate(groups_in) if not is_whole("in", n) for name in group}
    torn |= {name for n, group in enumerate(groups_out) if not is_whole("out", n) for name in group}
    lost = {f"z{position}": size for position, size in enumerate(outs) if not is_whole("out", position)}
    output = " ".join(axis_text("out", position) for position in range(len(outs)))
    text = f"{' '.join(axis_text('in', position) for position in range(len(ins)))}, . -> {output}"
    stores = (Store(slot, output),) if slot is not None else ()
    return Typing(text, {**sizes, **lost}, stores, tuple(sorted(torn)) + tuple(lost), moves=True)


def _fix_until_equal(ins, outs, i: int, j: int, fixed: set) -> tuple[int, int]:
    """Fix axes on both sides until their products agree again; return the positions after them."""
    left, right = ins[i], outs[j]
    fixed |= {("in", i), ("out", j)}
    while left != right:
        if (left[0] < right[0] and i > 0) or j == 0:
            i -= 1
            if i < 0:
                break
            left = multiply((left, ins[i]))
            fixed.add(("in", i))
        else:
            j -= 1
            right = multiply((right, outs[j]))
            fixed.add(("out", j))
    return i - 1, j - 1


def concat(op: Op) -> str | None:
    """Lay the inputs behind each other along one axis."""
    rank = op.rank(0)
    axis = op.axis(rank, 1)
    names = letters(rank)
    parts = letters(len(op.node.inputs), "p")
    inputs = [" ".join(part if i == axis else name for i, name in enumerate(names)) for part in parts]
    joined = f"({' + '.join(parts)})" if len(parts) > 1 else parts[0]
    output = " ".join(joined if i == axis else name for i, name in enumerate(names))
    return f"{', '.join(inputs)} -> {output}"


def split(op: Op) -> Typing | None:
    """Cut one axis into consecutive parts."""
    rank, count = op.rank(0), op.output_count
    axis = op.axis(rank, 0)
    size = op.sizes(0)[axis]
    listed = op.integers("split", 1)
    if listed is None and op.has(1):
        return None
    if listed is None:
        chunk = -(-size[0] // count)
        listed = [min(chunk, size[0] - i * chunk) for i in range(count)]
        if len(set(size)) > 1:
            part = divide(size, (count,) * len(size)) or (4093, 4099)
            return _split_fixed(op, axis, [part] * count)
    if len(set(size)) > 1:
        return _split_fixed(op, axis, [(part,) for part in listed])
    names = letters(rank)
    parts = letters(count, "p")
    inputs = " ".join(f"({' + '.join(parts)})" if i == axis else name for i, name in enumerate(names))
    outputs = [" ".join(part if i == axis else name for i, name in enumerate(names)) for part in parts]
    stores = (Store("split" if "split" in op.node.attrs or op.opset < 13 else 1, " ".join(parts), "split"),)
    return Typing(f"{inputs}, . -> {', '.join(outputs)}", {p: (n,) for p, n in zip(parts, listed, strict=True)}, stores)


def _split_fixed(op: Op, axis: int, sizes: list[Size]) -> Typing:
    names, parts = letters(op.rank(0)), letters(op.output_count, "p")
    inputs = " ".join("_" if i == axis else name for i, name in enumerate(names))
    outputs = [" ".join(part if i == axis else name for i, name in enumerate(names)) for part in parts]
    return Typing(f"{inputs}, . -> {', '.join(outputs)}", dict(zip(parts, sizes, strict=True)), fixed=tuple(parts))


def slice_(op: Op) -> Typing | None:
    """Keep a range of some axes: what lies before, the range, what lies behind."""
    rank = op.rank(0)
    starts, ends = (_bounds(op, name, slot) for name, slot in (("starts", 1), ("ends", 2)))
    axes, steps = op.integers("axes", 3), op.integers("steps", 4)
    computed = any(op.has(slot) and known is None for slot, known in ((3, axes), (4, steps)))
    if starts is None or ends is None or computed:
        return _slice_unknown(op)
    axes = list(range(len(starts[0]))) if axes is None else [axis % rank for axis in axes]
    steps = steps or [1] * len(axes)
    inputs, outputs, sizes, fixed = letters(rank), letters(rank), {}, []
    begins, stops, whole = [], [], []
    for n, (axis, step) in enumerate(zip(axes, steps, strict=False)):
        size = op.sizes(0)[axis]
        spans = [_span(starts[p][n], ends[p][n], step, size[p]) for p in range(len(size))]
        counts = tuple(len(span) for span in spans)
        before, inside, after = f"b{n}", f"i{n}", f"e{n}"
        if counts == size and step == 1:
            begin, stop, total = "", inputs[axis], inputs[axis]
        elif step == 1 and len(set(size)) == 1 and len(set(spans)) == 1:
            sizes |= {before: (spans[0].start,), inside: (counts[0],), after: (size[0] - spans[0].stop,)}
            if counts[0] == 0:
                sizes |= {before: size, after: (0,)}
            inputs[axis] = total = f"({before} + {inside} + {after})"
            begin, stop, outputs[axis] = before, f"({before} + {inside})", inside
        elif step > 1 and len(set(size)) == 1 and size[0] % step == 0 and counts[0] * step == size[0]:
            sizes |= {inside: (counts[0],), after: (step,)}
            fixed.append(after)
            inputs[axis] = total = f"({inside} {after})"
            begin, stop, outputs[axis] = None, total, inside
        else:
            sizes[inside] = counts
            fixed.append(inside)
            inputs[axis], outputs[axis] = "_", inside
            begin = stop = total = None
        begins.append(begin)
        stops.append(stop)
        whole.append(total)
    stores = []
    for slot, name, patterns, kind in ((1, "starts", begins, "begin"), (2, "ends", stops, "end")):
        where = name if name in op.node.attrs else slot
        text = " ".join("_" if pattern is None else pattern or "0" for pattern in patterns)
        stores.append(Store(where, text, kind, " ".join("_" if total is None else total for total in whole)))
    text = f"{' '.join(inputs)}, ., ., ., . -> {' '.join(outputs)}"
    return Typing(text, sizes, tuple(stores), tuple(fixed), moves=True)


def _bounds(op: Op, name: str, slot: int) -> list[list[int]] | None:
    if name in op.node.attrs:
        return [[int(entry) for entry in op.attribute(name)]] * 2
    value = op.value(slot)
    return None if value is None else [[int(entry) for entry in np.atleast_1d(probe)] for probe in value]


def _span(start: int, end: int, step: int, size: int) -> range:
    return range(*slice(start, None if step < 0 and end < -size else end, step).indices(size))


def _slice_unknown(op: Op) -> Typing | None:
    """Bounds that depend on data fix the sliced axes; their new sizes are unknown, so dynamic."""
    axes = op.integers("axes", 3)
    if axes is None:
        return None
    rank = op.rank(0)
    sliced = {axis % rank for axis in axes}
    inputs = ["_" if i in sliced else name for i, name in enumerate(letters(rank))]
    outputs = [f"u{i}" if i in sliced else name for i, name in enumerate(letters(rank))]
    unknown = {f"u{i}": (4093, 4099) for i in sliced}
    return Typing(f"{' '.join(inputs)}, ., ., ., . -> {' '.join(outputs)}", unknown, fixed=tuple(unknown))


def expand(op: Op) -> Typing | None:
    """Broadcast to a stored shape; new entries along an axis of size one are a new axis."""
    target = op.value(1)
    if target is None or len({entry.size for entry in target}) != 1:
        return None
    rank = max(op.rank(0), target[0].size)
    pad = rank - op.rank(0)
    inputs, outputs, sizes = [], [], {}
    for i in range(rank):
        size = op.sizes(0)[i - pad] if i >= pad else (1, 1)
        offset = i - (rank - target[0].size)
        wanted = tuple(int(entry[offset]) for entry in target) if offset >= 0 else (1, 1)
        if set(size) == {1} and set(wanted) != {1}:
            name = f"n{i}"
            sizes[name] = wanted
            inputs += ["1"] if i >= pad else []
            outputs.append(name)
        else:
            name = f"a{i}" if set(size) != {1} else "1"
            inputs += [name] if i >= pad else []
            outputs.append(name)
    listed = " ".join(outputs[rank - target[0].size :])
    text = f"{' '.join(inputs)}, . -> {' '.join(outputs)}"
    return Typing(text, sizes, (Store(1, listed),), moves=True, fills=tuple(sizes))


def tile(op: Op) -> Typing | None:
    """Repeat axes as a whole: the repetition is the outer factor."""
    repeats = op.value(1)
    if repeats is None:
        return None
    names, sizes, outputs, listed = letters(op.rank(0)), {}, [], []
    for i, name in enumerate(names):
        count = tuple(int(np.atleast_1d(entry)[i]) for entry in repeats)
        if set(count) == {1}:
            outputs.append(name)
            listed.append("1")
        else:
            sizes[f"r{i}"] = count
            outputs.append(f"(r{i} {name})")
            listed.append(f"r{i}")
    text = f"{' '.join(names)}, . -> {' '.join(outputs)}"
    return Typing(text, sizes, (Store(1, " ".join(listed)),), moves=True)


def pad(op: Op) -> Typing | None:
    """Lay constants around an axis; other modes fix the axes they pad."""
    rank = op.rank(0)
    value = op.integers("pads", 1)
    if value is None:
        return None
    axes = op.integers("axes", 3) if op.has(3) else list(range(rank))
    if axes is None:
        return None
    pads = {axis % rank: (value[n], value[n + len(axes)]) for n, axis in enumerate(axes)}
    inputs, outputs, sizes, fixed = letters(rank), letters(rank), {}, []
    for axis, (before, after) in pads.items():
        if before == after == 0:
            continue
        size = tuple(entry + before + after for entry in op.sizes(0)[axis])
        if str(op.attribute("mode", "constant")) == "constant" and before >= 0 and after >= 0:
            sizes |= {f"b{axis}": (before,), f"e{axis}": (after,)}
            fixed += [f"b{axis}", f"e{axis}"]
            outputs[axis] = f"(b{axis} + {inputs[axis]} + e{axis})"
        else:
            sizes[f"o{axis}"] = size
            fixed.append(f"o{axis}")
            inputs[axis], outputs[axis] = "_", f"o{axis}"
    return Typing(f"{' '.join(inputs)}, ., ., . -> {' '.join(outputs)}", sizes, fixed=tuple(fixed))


def resize(op: Op) -> Typing | None:
    """Axes that keep their size pass; resized ones are fixed."""
    rank = op.rank(0)
    slot = 3 if op.has(3) else (2 if op.type == "Resize" and op.opset > 10 else 1)
    value = op.value(slot)
    if value is None or np.size(value[0]) != rank or not _is_plain_resize(op):
        return None
    columns = [
        [int(v) if slot == 3 else int(np.floor(size[p] * v)) for v, size in zip(entry, op.sizes(0), strict=True)]
        for p, entry in enumerate(value)
    ]
    outs = [tuple(column[i] for column in columns) for i in range(rank)]
    inputs, outputs, sizes = letters(rank), letters(rank), {}
    for i, (old, new) in enumerate(zip(op.sizes(0), outs, strict=True)):
        if old != new or (slot != 3 and any(entry[i] != 1 for entry in value)):
            inputs[i], outputs[i], sizes[f"o{i}"] = "_", f"o{i}", new
    stores = (Store(3, " ".join(outputs)),) if slot == 3 else ()
    return Typing(f"{' '.join(inputs)}, ., ., . -> {' '.join(outputs)}", sizes, stores, tuple(sizes))


def _is_plain_resize(op: Op) -> bool:
    """Tell whether sizes and scales speak of every axis in order, and axes of the same size stay as they are."""
    policy = str(op.attribute("keep_aspect_ratio_policy", "stretch"))
    crops = str(op.attribute("coordinate_transformation_mode", "")) == "tf_crop_and_resize"
    return policy == "stretch" and not crops and "axes" not in op.node.attrs


def space_to_depth(op: Op) -> Typing:
    """Blocks of the image become channels; the block's offsets are the outer factor."""
    block = int(op.attribute("blocksize"))
    sizes = {"h": tuple(e // block for e in op.sizes(0)[2]), "w": tuple(e // block for e in op.sizes(0)[3])}
    return Typing("b c (h p) (w q) -> b (p q c) h w", {**sizes, "p": (block,), "q": (block,)}, fixed=("p", "q"))


def depth_to_space(op: Op) -> Typing:
    block = int(op.attribute("blocksize"))
    inner = "p q c" if str(op.attribute("mode", "DCR")) == "DCR" else "c p q"
    return Typing(f"b ({inner}) h w -> b c (h p) (w q)", {"p": (block,), "q": (block,)}, fixed=("p", "q"))


rule("Transpose", transpose, moves=True)
rule("Squeeze", squeeze, moves=True)
rule("Unsqueeze", unsqueeze, moves=True)
rule("Reshape", reshape)
rule("Flatten", flatten)
rule("Concat", concat)
rule("Split", split)
rule("Slice", slice_)
rule("Expand", expand)
rule("Tile", tile)
rule("Pad", pad)
rule(["Resize", "Upsample"], resize)
rule("SpaceToDepth", space_to_depth)
rule("DepthToSpace", depth_to_space)
