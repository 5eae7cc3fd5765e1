"""PyTorch rules of attention and rotary embeddings, as one operator."""

import math

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.registry import rule
from graphclone.pytorch.sizes import Integer, probe_of


def attend(
    q,
    k,
    v,
    mask=None,
    *,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    size=None,
    dropout: float = 0.0,
) -> Code:
    """Return `F.scaled_dot_product_attention` with only the arguments that say something.

    scale: None is 1 / sqrt(head dim); `size` is the head dim, so that the default need not be written.
    """
    text, operands = "F.scaled_dot_product_attention({}, {}, {}", [q, k, v]
    if mask is not None:
        text, operands = text + ", attn_mask={}", [*operands, mask]
    if dropout:
        text, operands = text + ", dropout_p={} if self.training else 0.0", [*operands, dropout]
    if causal:
        text += ", is_causal=True"
    if scale is not None and not (isinstance(size, int) and math.isclose(scale, size**-0.5, rel_tol=1e-6)):
        text, operands = text + ", scale={}", [*operands, scale]
    if grouped:
        text += ", enable_gqa=True"
    return Code(text + ")", *operands)


@rule("Attention", domain="graphclone")
def attention(op: Op) -> Code:
    """Attend; inputs are q, k, v (batch, heads, sequence, head_dim) and a mask."""
    grouped = op[0].dims[-3] != op[1].dims[-3]
    return attend(
        op[0],
        op[1],
        op[2],
        op[3],
        causal=op.attribute("causal", False),
        scale=op.attribute("scale"),
        grouped=grouped,
        size=op[0].dims[-1],
        dropout=op.attribute("dropout", 0.0),
    )


def _both(mask, boolean: bool, allowed: Code) -> Code:
    """Return a mask that forbids what another one does, or what is not allowed."""
    if mask is None:
        return allowed
    return Code("({} & {})" if boolean else "{}.masked_fill(~{}, float('-inf'))", mask, allowed)


@rule("SplitHeads", domain="graphclone")
def split_heads_apart(op: Op) -> Code:
    """Give heads an axis of their own, after adding a part of a bias; inputs are (batch, sequence, hidden), bias."""
    value = op[0]
    if op[1] is not None:
        value = Code("({} + {}[{}:{}])", op[0], op[1], op.attribute("start"), op.attribute("end"))
    return split_heads(value, op.attribute("heads"))


def split_heads(value, count: int) -> Code:
    return Code("{}.unflatten(-1, ({}, -1)).transpose(1, 2)", value, count)


def _visible(queries: Integer, keys: Integer, past: Integer, filled: Value | None) -> Code:
    """Return True where a query may see a key: query i sees keys up to i + past.

    filled: how many keys of each sample are there, where a cache is written outside; its last ones are the queries'.
    """
    if filled is not None:
        seen, asking = (Code("torch.arange({}, device={})", count, DEVICE) for count in (keys, queries))
        return Code("({} - {}[:, None] <= {}[:, None, None, None] - {})", seen, asking, filled, queries)
    if probe_of(keys - past) == probe_of(queries):
        return Code("causal_mask({}, {}, {})", queries, keys, DEVICE)
    return Code("torch.ones({}, {}, dtype=torch.bool, device={}).tril({})", queries, keys, DEVICE, past)


@rule("Attention")
def standard_attention(op: Op) -> Code | tuple:
    """Attend as opset 23 and 24 define it, with a cache where there is one."""
    wants = [output is not None for output in op.outputs]
    if any(wants[3:]):
        raise Unsupported("its scores output has no PyTorch counterpart")
    flat = op[0].rank == 3
    heads = int(op.attribute("q_num_heads", 0)) if flat else op[0].dims[1]
    kv_heads = op[1].dims[1] if op[1].rank == 4 else int(op.attribute("kv_num_heads", 0))
    q = split_heads(op[0], heads) if flat else op[0]
    k, v = (split_heads(each, kv_heads) if each.rank == 3 else each for each in (op[1], op[2]))
    keys = op[1].dims[-2]
    if op[4] is not None:
        k, v = Code("torch.cat(({}, {}), dim=2)", op[4], k), Code("torch.cat(({}, {}), dim=2)", op[5], v)
        keys = keys + op[4].dims[2]
    causal, mask = bool(op.attribute("is_causal", 0)), op[3]
    boolean = mask is None or str(mask.dtype) == "torch.bool"
    if mask is not None and mask.dims[-1] != 1 and probe_of(mask.dims[-1]) != probe_of(keys):
        fill = Code("False") if boolean else Code("float('-inf')")
        mask = Code("F.pad({}, (0, {}), value={})", mask, keys - mask.dims[-1], fill)
    past = op.attribute("behind_cache", 0) if op[4] is None else op[4].dims[2]
    visible = _visible(op[0].dims[-2], keys, past, op[6])
    if causal and (mask is not None or op[6] is not None or past):
        mask, causal = _both(mask, boolean, visible), False
    if op[6] is not None:
        filled = Code("(torch.arange({}, device={}) < {}[:, None, None, None])", keys, DEVICE, op[6])
        mask = _both(mask, boolean, filled)
    scale = op.attribute("scale")
    size = op[0].dims[-1] // heads if flat else op[0].dims[-1]
    softcap = float(op.attribute("softcap", 0.0))
    if softcap:
        mask = visible if causal else mask
        result = Code("capped_attention({}, {}, {}, {}, {}, {})", q, k, v, mask, scale or size**-0.5, softcap)
    else:
        drop = op.attribute("dropout", 0.0)
        grouped = heads != kv_heads
        result = attend(q, k, v, mask, causal=causal, scale=scale, grouped=grouped, size=size, dropout=drop)
    if flat:
        result = Code("{}.transpose(1, 2).flatten(2)", result)
    if any(wants[1:3]):
        return (result, k if isinstance(k, Code) else Code("{}", k), v if isinstance(v, Code) else Code("{}", v))
    return result


@rule("RotaryEmbedding")
def rotary_embedding(op: Op) -> Code:
    """Rotate by tables of cosines and sines, looked up by position where positions are given."""
    cos, sin = op[1], op[2]
    if op[3] is not None:
        cos, sin = Code("{}[{}]", cos, op[3]), Code("{}[{}]", sin, op[3])
    return rotate(op, op[0], cos, sin)


def rotate(op: Op, x, cos, sin) -> Code:
    function = "rotary_pairs" if op.attribute("interleaved", 0) else "rotary_halves"
    if op[0].rank == 4:
        return Code(function + "({}, {}, {})", x, cos, sin)
    heads = int(op.attribute("num_heads", 0))
    if not heads and op.domain and not op.attribute("rotary_embedding_dim", 0):
        heads = op[0].dims[-1] // (2 * op[2].dims[-1])
    if not heads:
        raise Unsupported("a rank 3 input needs num_heads")
    return Code("{}.transpose(1, 2).flatten(2)", Code(function + "({}, {}, {})", split_heads(x, heads), cos, sin))


@rule("RotaryEmbedding", domain="com.microsoft")
def contrib_rotary_embedding(op: Op) -> Code:
    """Rotate as onnxruntime's operator does: inputs are x, position ids or the first of them, and the tables."""
    if op.attribute("is_packed_batching", 0) or float(op.attribute("scale", 1.0)) != 1.0:
        raise Unsupported("is_packed_batching and scale have no PyTorch counterpart")
    places: Value | Code = op[1]
    if op[1].rank < 2:
        places = Code("({} + torch.arange({}, device={}))[None]", op[1], op[0].dims[-2], DEVICE)
    return rotate(op, op[0], Code("{}[{}]", op[2], places), Code("{}[{}]", op[3], places))


@rule("Attention", domain="com.microsoft")
def packed_attention(op: Op) -> Code:
    """Project by one packed weight (hidden, 3 * hidden), then attend."""
    if op[6] is not None:
        raise Unsupported("a cache that is written in place has no PyTorch counterpart")
    if op.attribute("do_rotary", 0):
        raise Unsupported("do_rotary has no PyTorch counterpart")
    heads, length = int(op.attribute("num_heads")), op[0].dims[1]
    sizes = op.attribute("qkv_hidden_sizes")
    packed = Code("F.linear({}, {}.t(), {})", op[0], op[1], op[2])
    if sizes:
        raise Unsupported("qkv_hidden_sizes has no PyTorch counterpart")
    split = Code("{}.unflatten(-1, (3, {}, -1)).permute(2, 0, 3, 1, 4)", packed, heads)
    mask = _contrib_mask(op, op[3], op[5], length if op[4] is None else length + op[4].dims[3])
    causal = bool(op.attribute("unidirectional", 0))
    scale = op.attribute("scale") or None
    cached = len(op.outputs) > 1 and op.outputs[1] is not None
    if cached or op[4] is not None:
        size = op[0].dims[-1] // heads
        past = op[4] or Code("{}.new_zeros({})", op[0], (2, op[0].dims[0], heads, 0, size))
        call = "cached_attention(*{}, {}, {}, {}, {})" + ("" if len(op.outputs) > 1 else "[0]")
        return Code(call, split, past, mask, causal, scale)
    if causal and mask is not None:
        mask, causal = _both(mask, False, Code("causal_mask({}, {}, {})", length, length, DEVICE)), False
    call = "F.scaled_dot_product_attention(*{}, attn_mask={}, is_causal={}, scale={}).transpose(1, 2).flatten(2)"
    return Code(call, split, mask, causal, scale)


@rule("MultiHeadAttention", domain="com.microsoft")
def multi_head_attention(op: Op) -> Code:
    """Attend over unpacked queries, keys and values (batch, sequence, hidden)."""
    if op[8] is not None or op[9] is not None:
        raise Unsupported("a cache that is written in place has no PyTorch counterpart")
    if len(op.outputs) > 3 and op.outputs[3] is not None:
        raise Unsupported("its scores output has no PyTorch counterpart")
    if op[1] is None or op[2] is None:
        raise Unsupported("packed queries, keys and values have no PyTorch counterpart")
    heads, length = int(op.attribute("num_heads")), op[0].dims[-2]
    parts = list(op.inputs[:3])
    if op[3] is not None:
        first, second = op[0].dims[-1], op[0].dims[-1] + op[1].dims[-1]
        bounds = [(None, first), (first, second), (second, None)] if op[1].rank == 3 else [(None, first)]
        for slot, (start, end) in enumerate(bounds):
            window = ("" if start is None else str(start)) + ":" + ("" if end is None else str(end))
            parts[slot] = Code("({} + {}[" + window + "])", parts[slot], op[3])
    q, k, v = (
        split_heads(part, heads) if value.rank == 3 else part for part, value in zip(parts, op.inputs[:3], strict=True)
    )
    keys = op[1].dims[-2]
    if op[6] is not None:
        k, v = Code("torch.cat(({}, {}), dim=2)", op[6], k), Code("torch.cat(({}, {}), dim=2)", op[7], v)
        keys = keys + op[6].dims[2]
    mask = _contrib_mask(op, op[4], op[5], keys)
    causal = bool(op.attribute("unidirectional", 0))
    past = op.attribute("behind_cache", 0) if op[6] is None else op[6].dims[2]
    visible = _visible(length, keys, past, None)
    uneven = probe_of(keys - past) != probe_of(length)
    if uneven:  # onnxruntime hides keys from all queries but the last
        last = Code("(torch.arange({}, device={}) == {})", length, DEVICE, length - 1)
        visible = Code("({} | {}[:, None])", visible, last)
    if causal and (mask is not None or uneven or probe_of(past) != probe_of(0)):
        mask, causal = _both(mask, mask is None, visible), False
    result = attend(q, k, v, mask, causal=causal, scale=op.attribute("scale") or None)
    result = Code("{}.transpose(1, 2).flatten(2)", result)
    return (result, *(Code("{}", each) for each in (k, v))) if op.outputs[1:] else result


def _contrib_mask(op: Op, mask, bias, keys):
    """Return the additive mask: key padding (batch, keys) of zeros and ones, plus a bias."""
    low = float(op.attribute("mask_filter_value", -10000.0))
    if mask is None:
        return bias
    if mask.rank == 1:
        if probe_of(mask.dims[0]) != probe_of(op[0].dims[0]):
            raise Unsupported("a mask of starts and ends has no PyTorch counterpart; give (batch, keys) zeros and ones")
        allowed = Code("(torch.arange({}, device={}) < {}[:, None])", keys, DEVICE, mask)
    else:
        allowed = Code("({} != 0)", mask)
    shaped = {1: "[:, None, None, :]", 2: "[:, None, None, :]", 3: "[:, None]"}.get(mask.rank, "")
    added = Code("torch.where({}" + shaped + ", 0.0, {})", allowed, low)
    return added if bias is None else Code("({} + {})", added, bias)


@rule("EmbedLayerNormalization", domain="com.microsoft")
def embed_layer_norm(op: Op) -> Code | tuple:
    """Sum word, position and segment embeddings, then norm; the second output is the mask's lengths."""
    ids, segments, words, positions, kinds, gamma, beta, mask, position_ids = (op[slot] for slot in range(9))
    summed = Code("F.embedding({}, {})", ids, words)
    if position_ids is None:
        summed = Code("({} + {}[:{}])", summed, positions, ids.dims[1])
    else:
        summed = Code("({} + F.embedding({}, {}))", summed, position_ids, positions)
    if segments is not None:
        summed = Code("({} + F.embedding({}, {}))", summed, segments, kinds)
    from graphclone.pytorch.reduction import epsilon

    normed = Code("F.layer_norm({}, {}, {}, {}, {})", summed, (words.dims[1],), gamma, beta, epsilon(op, 1e-12))
    if len(op.outputs) == 1:
        return normed
    none = Code("{}.new_zeros({})", ids, (ids.dims[0],))
    lengths = none if mask is None else Code("torch.sum({}, dim=-1).to({})", mask, mask.dtype)
    return (normed, lengths, summed) if len(op.outputs) > 2 else (normed, lengths)


@rule("GroupQueryAttention", domain="com.microsoft")
def group_query_attention(op: Op) -> Code | tuple:
    """Attend causally with shared keys and values; rows of right padding hold nothing that counts.

    The second and third output are the cache, (batch, kv heads, sequence, head_dim): what is past, if there is a past,
    and behind it, at each sample's own place, what is new.
    """
    if any(op[slot] is not None for slot in (11, 12, 13, 14, 15)) or op.attribute("smooth_softmax", 0) == 1:
        raise Unsupported("a sink, smooth_softmax, norms and a quantized cache have no PyTorch counterpart")
    if not op.attribute("causal", 1) or op.attribute("sliding_window_cache", 0) or op.attribute("qk_output", 0):
        raise Unsupported("causal=0, sliding_window_cache and qk_output have no PyTorch counterpart")
    heads, kv_heads = int(op.attribute("num_heads")), int(op.attribute("kv_num_heads"))
    length, size = op[0].dims[1], op[0].dims[-1] // heads
    parts = op.inputs[:3]
    if op[1] is None:
        size = op[0].dims[-1] // (heads + 2 * kv_heads)
        ends = (heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size)
        parts = [
            Code("{}[..., {}:{}]", op[0], end - width, end)
            for end, width in zip(ends, (heads * size, kv_heads * size, kv_heads * size), strict=True)
        ]
    q, k, v = (split_heads(part, count) for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True))
    places = Code("cache_places({}, {})", op[5], length)
    if op.attribute("do_rotary", 0):
        function = "rotary_pairs" if op.attribute("rotary_interleaved", 0) else "rotary_halves"
        turned = op[9] if op[9] is not None else length if op[3] is None else places
        cut = "{}[None, :{}]" if turned is length else "{}[{}]"
        cos, sin = (Code(cut, table, turned) for table in (op[7], op[8]))
        q, k = (Code(function + "({}, {}, {})", each, cos, sin) for each in (q, k))
    window, softcap = int(op.attribute("local_window_size", -1)), float(op.attribute("softcap", 0.0))
    scale = op.attribute("scale") or None
    if op[3] is not None:
        total = op[6].scalar if op[6].known is not None else Code("int({})", op[6])
        call = "grouped_attention({}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {})" + ("" if len(op.outputs) > 1 else "[0]")
        behind = (op[3], op[4], places, total, op[10], scale, window if window > 0 else None, softcap)
        return Code(call, q, k, v, *behind)
    mask = None
    if window > 0 or softcap or op[10] is not None:
        mask = Code("causal_mask({}, {}, {})", length, length, DEVICE)
    if window > 0:
        mask = Code("{}.triu({})", mask, 1 - window)
    if op[10] is not None:
        mask = _both(op[10], False, mask)
    if softcap:
        result = Code("capped_attention({}, {}, {}, {}, {}, {})", q, k, v, mask, scale or size**-0.5, softcap)
    else:
        result = attend(q, k, v, mask, causal=mask is None, scale=scale, grouped=heads != kv_heads, size=size)
    result = Code("{}.transpose(1, 2).flatten(2)", result)
    return (result, k, v) if any(output is not None for output in op.outputs[1:]) else result
