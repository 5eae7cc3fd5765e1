"""Axis rules of fused attention and rotary embeddings, of the standard domain and of onnxruntime's."""

import math

from graphclone.axes.registry import Store, Typing, rule
from graphclone.op import Op

HEAD_STEP = 8
"""onnxruntime groups queries only where a head, and each half of the pairs that it turns, is a multiple of this."""


def _scale(head_size: int) -> Store:
    """The default scale follows the head size: write the parent's, so that a cut keeps it."""
    return Store("scale", "d", "scale", value=1.0 / math.sqrt(head_size))


def attention(op: Op) -> Typing | None:
    """Attention of opset 23: queries, keys and values as heads (4-D) or merged with them (3-D); grouped queries."""
    if op.rank(0) == 4:
        heads, groups = op.sizes(0)[1], op.sizes(1)[1]
        head_size = op.sizes(0)[3][0]
        shapes = ("b {h} q d", "b {g} ~k d", "b {g} k v", "b {h} q v")
    else:
        heads, groups = (int(op.attribute("q_num_heads")),), (int(op.attribute("kv_num_heads")),)
        head_size = op.sizes(0)[2][0] // heads[0]
        shapes = ("b q ({h} d)", "b ~k ({g} d)", "b k ({g} v)", "b q ({h} v)")
    grouped = heads[0] != groups[0]
    query, group = ("(g r)", "g") if grouped else ("g", "g")
    sizes = {"g": groups, **({"r": (heads[0] // groups[0],)} if grouped else {}), "d": (head_size,)}
    q, k, v, y = (s.format(h=query, g=group) for s in shapes)
    past = op.has(4) and op.axes[4] is not None
    span = "t" if past else "k"
    if past:
        sizes["t"] = tuple(a + b for a, b in zip(op.sizes(4)[2], op.sizes(1)[2 if op.rank(1) == 4 else 1], strict=True))
    shape = ["b?", f"{query}?", "q?", "_" if past else "k?"]
    mask = " ".join(shape[4 - op.rank(3) :]) if op.has(3) and op.axes[3] is not None else "."
    parts = "b g p d, b g p v" if past else "., ."
    text = f"{q}, {k}, {v}, {mask}, {parts}, . -> {y}, b g {span} d, b g {span} v, b {query} q {span}"
    stores = (Store("q_num_heads", query), Store("kv_num_heads", "g"), _scale(head_size))
    counted = past or op.has(6) or int(op.attribute("is_causal", 0))  # then which token is which matters
    fixed = ("b", "q", "k", "p") if counted else ()
    return Typing(text, sizes, tuple(s for s in stores if s.kind == "scale" or s.slot in op.node.attrs), fixed)


def rotary_embedding(op: Op) -> Typing | None:
    """Rotate pairs of entries of a head; the pairs are cut together, the unrotated rest by itself."""
    partial = int(op.attribute("rotary_embedding_dim", 0))
    interleaved = int(op.attribute("interleaved", 0))
    rank4 = op.rank(0) == 4
    heads = op.sizes(0)[1] if rank4 else (int(op.attribute("num_heads", 0)),)
    cos_slot = 2 if op.domain else 1
    width = op.sizes(cos_slot)[-1][0]
    head_size = op.sizes(0)[3][0] if rank4 else op.sizes(0)[2][0] // heads[0] if heads[0] else 2 * width
    rotated = partial or head_size
    if rotated != 2 * width:
        return None
    pairs = "(p t)" if interleaved else "(p + p)"
    size = f"({pairs} + r)" if rotated < head_size else pairs
    sizes = {"p": (width,), "t": (2,), "r": (head_size - rotated,)}
    if rank4:
        x = f"b h s {size}"
    else:
        sizes["h"] = (op.sizes(0)[2][0] // head_size,)
        x = f"b s (h {size})"
    ids_slot = 1 if op.domain else 3
    each = op.has(ids_slot) and op.axes[ids_slot] is not None and op.rank(ids_slot) == 2
    ids = "b? s" if each else "."
    table = "b? s p" if op.rank(cos_slot) == 3 else "_ p"
    fixed = () if each or op.rank(cos_slot) == 3 else ("s",)  # else the operator counts positions itself
    inputs = f"{x}, {ids}, {table}, {table}" if op.domain else f"{x}, {table}, {table}, {ids}"
    stores = [Store("num_heads", "h")] if op.attribute("num_heads", 0) else []
    stores += [Store("rotary_embedding_dim", pairs)] if partial else []
    return Typing(f"{inputs} -> {x}", sizes, tuple(stores), (*fixed, "t") if interleaved else fixed)


def packed_attention(op: Op) -> Typing | None:
    """com.microsoft.Attention: one input projection to queries, keys and values inside the operator."""
    heads = int(op.attribute("num_heads"))
    listed = op.attribute("qkv_hidden_sizes")
    width = op.sizes(1)[1][0]
    q, _, v = [int(entry) for entry in listed] if listed else [width // 3] * 3
    cached = (op.has(4) and op.axes[4] is not None) or op.wants(1)
    value = "d" if cached and q == v else "v"  # keys and values lie in one cache
    sizes = {"h": (heads,), "d": (q // heads,), "v": (v // heads,)}
    packed = f"((h d) + (h d) + (h {value}))"
    mask = "."
    bias = _bias(op, 5, "h", "s", "_" if cached else "s")
    past = "_ b h p d" if op.has(4) and op.axes[4] is not None else "."
    if cached and q != v:
        return None
    present = "two b h t d" if op.wants(1) else "."
    if op.wants(1):
        sizes |= {"two": (2,), "t": (4093, 4099)}
    text = f"b ~s e, e {packed}, {packed}, {mask}, {past}, {bias}, . -> b s (h {value}), {present}"
    stores = [Store("num_heads", "h"), _scale(q // heads)]
    if listed:
        stores.append(Store("qkv_hidden_sizes", f"(h d) (h d) (h {value})"))
    counted = cached or op.has(3) or int(op.attribute("unidirectional", 0))  # then which token is which matters
    fixed = [*(["b", "s"] if counted else []), *(["two", "t"] if op.wants(1) else [])]
    fixed += ["d"] if op.attribute("do_rotary", 0) else []  # it turns pairs of entries
    return Typing(text, sizes, tuple(stores), tuple(fixed))


def _bias(op: Op, slot: int, heads: str, row: str, column: str) -> str:
    """Return the axes of what is added to the scores."""
    if not op.has(slot) or op.axes[slot] is None or op.rank(slot) != 4:
        return "."
    return f"b? {heads}? {row}? {column}?"


def multi_head_attention(op: Op) -> Typing | None:
    """com.microsoft.MultiHeadAttention: separate, or packed as (B, S, H, 3, D) and (B, S, H, 2, D)."""
    heads = int(op.attribute("num_heads"))
    sizes, stores = {"h": (heads,)}, [Store("num_heads", "h")]
    bias = "((h d) + (h d) + (h v))"
    if op.rank(0) == 5:
        head_size = op.sizes(0)[4][0]
        text = f"b ~s h _ d, ., ., ((h d) + (h d) + (h d)), ., {_bias(op, 5, 'h', 's', 's')} -> b s (h d)"
        fixed = ("b", "s") if op.has(4) or int(op.attribute("unidirectional", 0)) else ()
        return Typing(text, {**sizes, "d": (head_size,)}, (*stores, _scale(head_size)), fixed)
    head_size = op.sizes(0)[2][0] // heads
    sizes["d"] = (head_size,)
    if not op.has(1):
        return None
    if op.rank(1) == 5:
        keys, values, bias = "b ~k h _ d", ".", "((h d) + (h d) + (h d))"
        sizes["v"] = (head_size,)
    elif op.rank(1) == 4:
        keys, values = "b h ~k d", "b h k v"
        sizes["v"] = op.sizes(2)[3]
    else:
        keys, values = "b ~k (h d)", "b k (h v)"
        sizes["v"] = (op.sizes(2)[2][0] // heads,)
    cached = op.has(6) and op.axes[6] is not None
    past = "b h p d, b h p v" if cached else "., ."
    scores = _bias(op, 5, "h", "q", "_" if cached else "k")
    counted = cached or op.wants(1) or op.has(4) or int(op.attribute("unidirectional", 0))
    if op.wants(1):
        sizes["t"] = (4093, 4099)
    output = "d" if values == "." else "v"
    text = (
        f"b q (h d), {keys}, {values}, {bias}, ., {scores}, {past}, ., . -> b q (h {output}), b h t d, b h t {output}"
    )
    return Typing(text, sizes, (*stores, _scale(head_size)), ("b", "q", "k", "p") if counted else ())


def group_query_attention(op: Op) -> Typing | None:
    """com.microsoft.GroupQueryAttention: fewer key/value heads, a cache, optionally rotary tables, a bias and sinks."""
    heads, groups = int(op.attribute("num_heads")), int(op.attribute("kv_num_heads"))
    grouped = heads != groups
    query = "(g r)" if grouped else "g"
    separate = op.has(1) and op.axes[1] is not None
    width = op.sizes(0)[2][0]
    head_size = width // heads if separate else width // (heads + 2 * groups)
    rotary = int(op.attribute("do_rotary", 0)) and op.has(7)
    sizes = {"g": (groups,), **({"r": (heads // groups,)} if grouped else {}), "t": (4093, 4099)}
    head, steps = "d", {"d": HEAD_STEP}
    if rotary:
        table = op.sizes(7)[-1][0]
        sizes |= {"p": (table,), "u": (head_size - 2 * table,)}
        steps = {"p": HEAD_STEP, **({"u": 2 * HEAD_STEP} if head_size != 2 * table else {})}
        if int(op.attribute("rotary_interleaved", 0)):
            head = "(p two)" if head_size == 2 * table else "((p two) + u)"
            sizes["two"] = (2,)
        else:
            head = "(p + p)" if head_size == 2 * table else "(p + p + u)"
    else:
        sizes["d"] = (head_size,)
    cos = "_ p, _ p" if rotary else "., ."
    inputs = f"b q ({query} {head}), b k (g {head}), b k (g {head})"
    if not separate:
        inputs = f"b q (({query} {head}) + (g {head}) + (g {head})), ., ."
    past = f"b g c {head}, b g c {head}" if op.has(3) and op.axes[3] is not None else "., ."
    bias = _bias(op, 10, query, "_", "_")
    sinks = query if op.has(11) and op.axes[11] is not None else "."
    text = f"{inputs}, {past}, ., ., {cos}, ., {bias}, {sinks} -> b q ({query} {head}), b g t {head}, b g t {head}"
    stores = (
        Store("num_heads", query),
        Store("kv_num_heads", "g"),
        Store("scale", head, "scale", value=1.0 / math.sqrt(head_size)),
    )
    counted = ("b", "q", "k", "c")  # each sample has its length, each token sees those before it
    return Typing(text, sizes, stores, (*counted, *(["two"] if "two" in sizes else [])), steps=steps)


def skip_normalization(op: Op) -> str:
    """Add the skip (and a bias), then normalise; the fourth output is the sum."""
    beta = "d, " if op.type == "SkipLayerNormalization" else ""
    return f"... ~d, ... d, d, {beta}d -> ... d, ., ., ... d"


def embed_normalization(op: Op) -> Typing:
    """Sum of word, position and segment embeddings, normalised."""
    segments = ("b s, ", "t d") if op.has(1) and op.axes[1] is not None else ("., ", ".")
    text = f"b s, {segments[0]}w ~d, _ d, {segments[1]}, d, d, ., . -> b s d, b, b s d"
    indexes = {0: "w", **({1: "t"} if segments[1] != "." else {})}
    return Typing(text, indexes=indexes)


rule("Attention", attention)
rule("RotaryEmbedding", rotary_embedding)
rule("RotaryEmbedding", rotary_embedding, domain="com.microsoft")
rule("Attention", packed_attention, domain="com.microsoft")
rule("MultiHeadAttention", multi_head_attention, domain="com.microsoft")
rule("GroupQueryAttention", group_query_attention, domain="com.microsoft")
rule(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"], skip_normalization, domain="com.microsoft")
rule("EmbedLayerNormalization", embed_normalization, domain="com.microsoft")
