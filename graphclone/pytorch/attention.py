"""PyTorch rules of attention and rotary embeddings, as one operator."""

import math

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.program import Op, Unsupported
from graphclone.pytorch.registry import rule


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


def split_heads(value, count: int) -> Code:
    return Code("{}.unflatten(-1, ({}, -1)).transpose(1, 2)", value, count)


@rule("Attention")
def standard_attention(op: Op) -> Code | tuple:
    """Attend as opset 23 and 24 define it, with a cache where there is one."""
    wants = [output is not None for output in op.outputs]
    if (op.attribute("qk_matmul_output_mode", 0) and len(wants) > 3 and wants[3]) or (len(wants) > 3 and wants[3]):
        raise Unsupported("its scores output has no PyTorch counterpart")
    if op[6] is not None:
        raise Unsupported("nonpad_kv_seqlen has no PyTorch counterpart")
    flat = op[0].rank == 3
    heads, kv_heads = int(op.attribute("q_num_heads", 0)), int(op.attribute("kv_num_heads", 0))
    q, k, v = (
        (split_heads(op[0], heads), split_heads(op[1], kv_heads), split_heads(op[2], kv_heads))
        if flat
        else op.inputs[:3]
    )
    if not flat:
        heads, kv_heads = op[0].dims[1], op[1].dims[1]
    keys = op[1].dims[-2]
    if op[4] is not None:
        k, v = Code("torch.cat(({}, {}), dim=2)", op[4], k), Code("torch.cat(({}, {}), dim=2)", op[5], v)
        keys = keys + op[4].dims[2]
    causal, mask = bool(op.attribute("is_causal", 0)), op[3]
    if causal and (mask is not None or op[4] is not None):
        seen = Code("causal_mask({}, {}, {})", op[0].dims[-2], keys, DEVICE)
        if mask is None:
            mask = seen
        elif str(mask.dtype) == "torch.bool":
            mask = Code("({} & {})", mask, seen)
        else:
            mask = Code("{}.masked_fill(~{}, float('-inf'))", mask, seen)
        causal = False
    scale = op.attribute("scale")
    size = op[0].dims[-1] // heads if flat else op[0].dims[-1]
    softcap = float(op.attribute("softcap", 0.0))
    if softcap:
        if causal:
            mask = Code("causal_mask({}, {}, {})", op[0].dims[-2], keys, DEVICE)
        result = Code("capped_attention({}, {}, {}, {}, {}, {})", q, k, v, mask, scale or size**-0.5, softcap)
    else:
        result = attend(q, k, v, mask, causal=causal, scale=scale, grouped=heads != kv_heads, size=size)
    if flat:
        result = Code("{}.transpose(1, 2).flatten(2)", result)
    if len(wants) > 1 and (wants[1] or wants[2]):
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
    if not heads:
        raise Unsupported("a rank 3 input needs num_heads")
    return Code("{}.transpose(1, 2).flatten(2)", Code(function + "({}, {}, {})", split_heads(x, heads), cos, sin))


@rule("RotaryEmbedding", domain="com.microsoft")
def contrib_rotary_embedding(op: Op) -> Code:
    """Rotate as onnxruntime's operator does: inputs are x, position ids, and the tables."""
    if op[1].rank != 2:
        raise Unsupported("position_ids that are one offset have no PyTorch counterpart")
    return rotate(op, op[0], Code("{}[{}]", op[2], op[1]), Code("{}[{}]", op[3], op[1]))


@rule("Attention", domain="com.microsoft")
def packed_attention(op: Op) -> Code:
    """Project by one packed weight (hidden, 3 * hidden), then attend."""
    if any(op[slot] is not None for slot in (4, 6)) or any(output is not None for output in op.outputs[1:]):
        raise Unsupported("its cache has no PyTorch counterpart")
    heads = int(op.attribute("num_heads"))
    sizes = op.attribute("qkv_hidden_sizes")
    packed = Code("F.linear({}, {}.t(), {})", op[0], op[1], op[2])
    if sizes:
        raise Unsupported("qkv_hidden_sizes has no PyTorch counterpart")
    split = Code("{}.unflatten(-1, (3, {}, -1)).permute(2, 0, 3, 1, 4)", packed, heads)
    mask = _contrib_mask(op, op[3], op[5])
    causal = bool(op.attribute("unidirectional", 0))
    if causal and mask is not None:
        mask = Code(
            "{}.masked_fill(~causal_mask({}, {}, {}), float('-inf'))", mask, op[0].dims[1], op[0].dims[1], DEVICE
        )
        causal = False
    scale = op.attribute("scale") or None
    call = "F.scaled_dot_product_attention(*{}, attn_mask={}, is_causal={}, scale={}).transpose(1, 2).flatten(2)"
    return Code(call, split, mask, causal, scale)


@rule("MultiHeadAttention", domain="com.microsoft")
def multi_head_attention(op: Op) -> Code:
    """Attend over unpacked queries, keys and values (batch, sequence, hidden)."""
    if any(op[slot] is not None for slot in (6, 7)) or any(output is not None for output in op.outputs[1:]):
        raise Unsupported("its cache has no PyTorch counterpart")
    if op[0].rank != 3 or op[1] is None or op[2] is None:
        raise Unsupported("packed queries, keys and values have no PyTorch counterpart")
    heads = int(op.attribute("num_heads"))
    parts = list(op.inputs[:3])
    if op[3] is not None:
        first, second = op[0].dims[-1], op[0].dims[-1] + op[1].dims[-1]
        bounds = [(None, first), (first, second), (second, None)]
        for slot, (start, end) in enumerate(bounds):
            window = ("" if start is None else str(start)) + ":" + ("" if end is None else str(end))
            parts[slot] = Code("({} + {}[" + window + "])", parts[slot], op[3])
    q, k, v = (
        split_heads(part, heads) if value.rank == 3 else part for part, value in zip(parts, op.inputs[:3], strict=True)
    )
    mask = _contrib_mask(op, op[4], op[5])
    causal = bool(op.attribute("unidirectional", 0))
    if causal and mask is not None:
        raise Unsupported("unidirectional=1 with a mask has no PyTorch counterpart")
    result = attend(q, k, v, mask, causal=causal, scale=op.attribute("scale") or None)
    return Code("{}.transpose(1, 2).flatten(2)", result)


def _contrib_mask(op: Op, mask, bias):
    """Return the additive mask: key padding (batch, keys) of zeros and ones, plus a bias."""
    low = float(op.attribute("mask_filter_value", -10000.0))
    if mask is None:
        return bias
    if mask.rank == 1:
        keys = op[0].dims[1]
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
    lengths = Code("torch.sum({}, dim=-1)", mask) if mask is not None else Code("{}.new_zeros({})", ids, (ids.dims[0],))
    return (normed, lengths, summed) if len(op.outputs) > 2 else (normed, lengths)


@rule("GroupQueryAttention", domain="com.microsoft")
def group_query_attention(op: Op) -> Code | tuple:
    """Attend causally with shared keys and values, and no past; rows of right padding hold nothing that counts.

    The second and third output are what a cache would take over, (batch, kv heads, sequence, head_dim).
    """
    if op[3] is not None or op[4] is not None:
        raise Unsupported("its in-place cache has no PyTorch counterpart; export without a cache")
    if op[1] is None or op[2] is None:
        raise Unsupported("packed queries, keys and values have no PyTorch counterpart")
    if op[10] is not None or op[11] is not None or op.attribute("smooth_softmax", 0) == 1:
        raise Unsupported("an attention bias, a sink and smooth_softmax have no PyTorch counterpart")
    heads, kv_heads = int(op.attribute("num_heads")), int(op.attribute("kv_num_heads"))
    length, size = op[0].dims[1], op[0].dims[-1] // heads
    q, k, v = split_heads(op[0], heads), split_heads(op[1], kv_heads), split_heads(op[2], kv_heads)
    if op.attribute("do_rotary", 0):
        function = "rotary_pairs" if op.attribute("rotary_interleaved", 0) else "rotary_halves"
        cut = "{}[{}]" if op[9] is not None else "{}[None, :{}]"
        cos, sin = (Code(cut, table, op[9] if op[9] is not None else length) for table in (op[7], op[8]))
        q, k = (Code(function + "({}, {}, {})", each, cos, sin) for each in (q, k))
    window, softcap = int(op.attribute("local_window_size", -1)), float(op.attribute("softcap", 0.0))
    mask = None
    if window > 0 or softcap:
        mask = Code("causal_mask({}, {}, {})", length, length, DEVICE)
    if window > 0:
        mask = Code("{}.triu({})", mask, 1 - window)
    scale = op.attribute("scale") or None
    if softcap:
        result = Code("capped_attention({}, {}, {}, {}, {}, {})", q, k, v, mask, scale or size**-0.5, softcap)
    else:
        result = attend(q, k, v, mask, causal=mask is None, scale=scale, grouped=heads != kv_heads, size=size)
    result = Code("{}.transpose(1, 2).flatten(2)", result)
    return (result, k, v) if any(output is not None for output in op.outputs[1:]) else result
