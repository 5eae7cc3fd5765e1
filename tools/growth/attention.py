"""Attention: projections, heads that share keys, operators that do all of it."""

from growth.layers import linear
from growth.mixing import mix
from growth.norms import head_norm
from growth.positions import angles, rotate, rotated_by_operator
from growth.recipe import GROUPED, Attention
from growth.writer import Writer


def write_attention(w: Writer, x: str, given: Attention) -> str:
    """Return what attention adds to the stream; queries, keys and values are [B, H, S, D] on the way."""
    heads, size, width = w.recipe.heads, w.recipe.head, w.recipe.hidden
    groups = given.groups if given.projection in ("separate", "thirds") and given.mixing in GROUPED else 1
    total = heads * groups
    q, k, v = _project(w, x, given, heads, groups)
    if given.position == "norm":
        q, k = (head_norm(w, t, name, size) for t, name in ((q, "q_norm"), (k, "k_norm")))
    if given.position in ("halves", "interleaved", "partial", "frequencies"):
        cos, sin, rotated = angles(w, x, given.position, size)
        q, k = (rotate(w, t, cos, sin, rotated, size, given.position) for t in (q, k))
    if given.position == "operator":
        q, k = (rotated_by_operator(w, t, size) for t in (q, k))
    if given.mixing in ("Attention", "Attention4", "MultiHeadAttention"):
        return linear(w, _fused(w, x, given, q, k, v, heads, groups), "out", total * size, width)
    if groups > 1 and given.repeat != "broadcast":
        k, v = (_repeat(w, t, x, given.repeat, heads, groups) for t in (k, v))
    elif groups > 1:
        q = _regroup(w, q, x, [heads, groups], size)
        k, v = w.unsqueeze(k, 2), w.unsqueeze(v, 2)
    y = mix(w, x, given, q, k, v, total)
    if groups > 1 and given.repeat == "broadcast":
        y = _regroup(w, y, x, [total], size)
    if w.how.linear == "einsum" and given.projection == "einsum":
        out = w.weight("out", total, size, width, free=[0, 1, 2])
        return w.op("Einsum", y, out, equation="bhsd,hdo->bso")
    merged = w.reshape(w.transpose(y, 0, 2, 1, 3), x, ["B", "S", total * size])
    return linear(w, merged, "out", total * size, width)


def _regroup(w: Writer, t: str, x: str, heads: list[int], size: int) -> str:
    """Change how [B, H, S, D] counts its heads; the length stays where it is."""
    if w.how.reshape in ("constant", "zero"):
        return w.op("Reshape", t, w.op("Concat", w.number(-1, *heads), w.size(x, 1), w.number(size), axis=0))
    parts = [w.size(x, 0), w.number(*heads), w.size(x, 1), w.number(size)]
    return w.op("Reshape", t, w.op("Concat", *parts, axis=0))


def _project(w: Writer, x: str, given: Attention, heads: int, groups: int) -> list[str]:
    size, width, total = w.recipe.head, w.recipe.hidden, heads * groups
    if given.projection == "einsum":
        weights = [w.weight(name, width, heads, size, free=[0, 1, 2]) for name in "qkv"]
        return [w.op("Einsum", x, matrix, equation="bsi,ihd->bhsd") for matrix in weights]
    if given.projection == "by_head":  # GPT-NeoX: heads, then q, k and v
        joint = w.reshape(linear(w, x, "qkv", width, heads * 3 * size), x, ["B", "S", heads, 3 * size])
        taken = w.parts(joint, [size] * 3)
    elif given.projection == "by_kind":  # one axis of q, k and v, each picked
        joint = w.reshape(linear(w, x, "qkv", width, 3 * heads * size), x, ["B", "S", 3, heads, size])
        turned = w.transpose(joint, 2, 0, 3, 1, 4)
        return [w.op("Gather", turned, w.number(i, flat=False), axis=0) for i in range(3)]
    elif given.projection == "thirds":
        sizes = [total * size, heads * size, heads * size]
        parts = w.parts(linear(w, x, "qkv", width, sum(sizes)), sizes)
        taken = [w.reshape(p, p, ["B", "S", n // size, size]) for p, n in zip(parts, sizes, strict=True)]
    else:
        names = (("q", total), ("k", heads), ("v", heads))
        parts = [(linear(w, x, name, width, n * size), n) for name, n in names]
        taken = [w.reshape(p, x, ["B", "S", n, size]) for p, n in parts]
    return [w.transpose(t, 0, 2, 1, 3) for t in taken]


def _repeat(w: Writer, t: str, x: str, how: str, heads: int, groups: int) -> str:
    """Repeat each key's or value's head for the queries that share it."""
    size = w.recipe.head
    if how == "gather":
        return w.op("Gather", t, w.number(*(h for h in range(heads) for _ in range(groups))), axis=1)
    wide = w.unsqueeze(t, 2)
    if how == "tile":
        wide = w.op("Tile", wide, w.number(1, 1, groups, 1, 1))
    elif how == "concat":
        wide = w.op("Concat", *[wide] * groups, axis=2)
    else:
        sizes = [w.size(x, 0), w.number(heads, groups), w.size(x, 1), w.number(size)]
        target = w.number(1, 1, groups, 1, 1) if w.how.reshape == "zero" else w.op("Concat", *sizes, axis=0)
        wide = w.op("Expand", wide, target)
    return _regroup(w, wide, x, [heads * groups], size)


def _fused(w: Writer, x: str, given: Attention, q: str, k: str, v: str, heads: int, groups: int) -> str:
    """Return attention [B, S, H D] computed by one operator."""
    size, total = w.recipe.head, heads * groups
    if given.mixing == "Attention4":
        y = w.op("Attention", q, k, v)
        return w.reshape(w.transpose(y, 0, 2, 1, 3), x, ["B", "S", total * size])
    flat = [
        w.reshape(w.transpose(t, 0, 2, 1, 3), x, ["B", "S", n * size]) for t, n in ((q, total), (k, heads), (v, heads))
    ]
    if given.mixing == "Attention":
        y = w.op("Attention", *flat, q_num_heads=total, kv_num_heads=heads)
        return w.reshape(y, x, ["B", "S", total * size])  # onnxruntime's shape inference fails without it
    return w.op("MultiHeadAttention", *flat, domain="com.microsoft", num_heads=total)
