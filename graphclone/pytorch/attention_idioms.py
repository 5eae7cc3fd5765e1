"""Idioms of attention: scores, mask, softmax and context become one call."""

from graphclone.pytorch.program import Op, Value
from graphclone.pytorch.rewriting import (
    Result,
    Uses,
    idiom,
    made_by,
    new_op,
    new_value,
    number,
    operands,
    reshape,
    swap_last,
    transpose,
)

FORBIDDEN = -1e30
"""An added number below this forbids a position in float32, whatever the score."""


PAST = {("", "Attention"): 4, ("com.microsoft", "MultiHeadAttention"): 6}
"""Where operators take the keys of a cache; the values come next."""


def cache_apart(op: Op, uses: Uses) -> Result:
    """Attention that lengthens a cache: two concatenations, and attention to what they give.

    So the new cache, which is also a result, is computed once.
    """
    slot = PAST.get(op.key)
    present = [*op.outputs[1:3], None, None][:2]
    if slot is None or (op[slot] is None and present == [None, None]):
        return None
    bias = op[3] if slot == 6 else None
    ops: list[Op] = []
    joined = []
    start = op[0].dims[-1]
    for each, past, result in zip(op.inputs[1:3], (op[slot], op[slot + 1]), present, strict=True):
        if each.rank == 3:
            heads = int(op.attribute("num_heads" if slot == 6 else "kv_num_heads"))
            batch, length, width = each.dims
            split = new_value(each.name, (batch, heads, length, width // heads), each.dtype)
            place = {"start": start, "end": start + width}
            ops.append(new_op("SplitHeads", [each, bias], split, op, heads=heads, **place))
            each, start = split, start + width
        if past is not None:
            dims = (*each.dims[:2], each.dims[2] + past.dims[2], each.dims[3])
            longer = new_value(each.name, dims, each.dtype)
            ops.append(new_op("Concat", [past, each], longer, op, domain="", axis=2))
            each = longer
        joined.append(each)
        if result is not None:
            ops.append(new_op("Identity", [each], result, op, domain=""))
    query, inputs = op[0], list(op.inputs)
    if bias is not None:
        heads, (batch, length, width) = int(op.attribute("num_heads")), query.dims
        split = new_value(query.name, (batch, heads, length, width // heads), query.dtype)
        ops.append(new_op("SplitHeads", [query, bias], split, op, heads=heads, start=0, end=width))
        query, inputs[3] = split, None
    inputs[:3] = [query, *joined]
    inputs[slot : slot + 2] = [None] * len(inputs[slot : slot + 2])
    causal = {"behind_cache": op[slot].dims[2]} if op[slot] is not None else {}
    return [*ops, new_op(op.type, inputs, op.output, op, op.domain, **op.attributes, **causal)]


def attention(op: Op, uses: Uses) -> Result:
    """softmax(scale q k' + mask) v."""
    if op.type != "MatMul" or op.domain or op[0].rank < 3:
        return None
    weights = _after_nan_guard(op[0])
    softmax = made_by(weights, "Softmax")
    if softmax is None or softmax.axis(-1) % softmax[0].rank != softmax[0].rank - 1 or softmax.opset < 13:
        return None
    if not uses.once(op[0]):
        return None
    found = _scores(softmax[0], uses)
    if found is None:
        return None
    q, turned, scale, mask, ops = found
    q, q_scale = _unscaled(q)
    turned, k_scale = _unscaled(turned)
    scale *= q_scale * k_scale
    if q.rank != turned.rank or q.rank != op[1].rank or q.rank < 3 or (mask is not None and mask.rank > q.rank):
        return None
    heads = [each.dims[-3] for each in (q, turned, op[1])] if q.rank > 3 else []
    if len(set(heads)) > 1 and not (all(isinstance(each, int) for each in heads) and heads[0] % heads[1] == 0):
        return None
    k = transpose(turned, swap_last(turned.rank), op)
    return [*ops, k, new_op("Attention", [q, k.output, op[1], mask], op.output, op, scale=scale, causal=False)]


def _after_nan_guard(value: Value) -> Value:
    """Look through Where(IsNaN(p), 0, p)."""
    guard = made_by(value, "Where")
    test = made_by(guard[0], "IsNaN") if guard else None
    if test is not None and number(guard[1]) == 0 and test[0] is guard[2]:
        return guard[2]
    return value


def _scores(value: Value, uses: Uses, scale: float = 1.0) -> tuple | None:
    """Return (q, k transposed, scale, mask, operators to add) of what goes into the softmax."""
    op = made_by(value, "Add", "Where", "MatMul", "Mul", "Div")
    if op is None or not uses.once(value):
        return None
    if op.type == "MatMul":
        return (op[0], op[1], scale, None, []) if op[0].weight is None and op[1].weight is None else None
    if op.type == "Add":
        for scores, mask in (op.inputs, op.inputs[::-1]):
            inner = _scores(scores, uses, scale)
            if inner is not None and mask.rank <= scores.rank:
                return _with_mask(inner, mask, op) if mask.known is None else None
        return None
    if op.type == "Where":
        return _filled(op, uses, scale)
    given = operands(op, lambda each: number(each) is not None) if op.type == "Mul" else (op[1], op[0])
    if given is None or number(given[0]) is None:
        return None
    inner = _scores(given[1], uses, scale * number(given[0]) if op.type == "Mul" else scale / number(given[0]))
    return inner if inner is not None and inner[3] is None else None


def _filled(op: Op, uses: Uses, scale: float) -> tuple | None:
    """Read Where(condition, scores, low) or Where(condition, low, scores)."""
    for slot, other in ((1, 2), (2, 1)):
        low = number(op[other])
        if low is None or low > FORBIDDEN:
            continue
        inner = _scores(op[slot], uses, scale)
        if inner is None:
            return None
        zero = new_value("zero", (), op.output.dtype)
        from graphclone.pytorch.known import array

        zero.known = array(0.0)
        mask = new_value("mask", op[0].dims, op.output.dtype)
        mask.is_table = op[0].is_table
        inputs = [op[0], zero, op[2]] if slot == 1 else [op[0], op[1], zero]
        make = new_op("Where", inputs, mask, op, domain="")
        found = _with_mask(inner, mask, op)
        return (*found[:4], [make, *found[4]])
    return None


def _with_mask(inner: tuple, mask: Value, like: Op) -> tuple | None:
    q, k, scale, earlier, ops = inner
    if earlier is None:
        return q, k, scale, mask, ops
    dims = earlier.dims if earlier.rank >= mask.rank else mask.dims
    both = new_value("mask", dims, mask.dtype)
    both.is_table = earlier.is_table and mask.is_table
    return q, k, scale, both, [*ops, new_op("Add", [earlier, mask], both, like, domain="")]


def _unscaled(value: Value) -> tuple[Value, float]:
    """Take a constant factor off q or k."""
    op = made_by(value, "Mul", "Div")
    if op is None:
        return value, 1.0
    pair = operands(op, lambda each: number(each) is not None) if op.type == "Mul" else (op[1], op[0])
    if pair is None or number(pair[0]) is None or pair[1].rank != value.rank:
        return value, 1.0
    return pair[1], number(pair[0]) if op.type == "Mul" else 1 / number(pair[0])


def heads_apart(op: Op, uses: Uses) -> Result:
    """Multiply (b h, s, d) matrices, then reshape to (b, h, ...): the product of the (b, h, s, d) they were.

    Bloom and DeBERTa merge batch and heads for the products, and take them apart for mask and softmax.
    """
    if op.type != "Reshape" or op.domain or op.output.rank != 4 or op[0].rank != 3 or not uses.once(op[0]):
        return None
    batch, heads = op.output.dims[:2]
    return _lifted(op[0], batch, heads, op, uses, op.output) if op.output.dims[2:] == op[0].dims[1:] else None


def _lifted(value: Value, batch, heads, like: Op, uses: Uses, output: Value | None = None) -> list[Op] | None:
    """Return operators that compute a (b h, m, n) value as (b, h, m, n), from the matrices with heads merged on."""
    dims = (batch, heads, *value.dims[1:])
    output = output or new_value(value.name, dims, value.dtype)
    op = made_by(value, "MatMul", "Add", "Mul", "Div", "GatherElements", "Transpose")
    if op is None or not uses.once(value):
        return None
    if op.type == "Transpose" and list(op.attribute("perm") or ()) != [0, 2, 1]:
        return None
    if op.type == "GatherElements" and op.axis(0) % 3 == 0:
        return None
    attributes = dict(op.attributes)
    if op.type == "Transpose":
        attributes["perm"] = [0, 1, 3, 2]
    elif op.type == "GatherElements":
        attributes["axis"] = op.axis(0) % 3 + 1
    ops: list[Op] = []
    inputs = []
    for each in op.inputs:
        if number(each) is not None:
            inputs.append(each)
            continue
        if each.rank != 3 or each.dims[0] != value.dims[0]:
            return None
        lifted = _with_heads(each, batch, heads) or _lifted(each, batch, heads, like, uses)
        if lifted is None:
            lifted = [reshape(each, (batch, heads, *each.dims[1:]), like)]
        source = lifted[-1].output if isinstance(lifted, list) else lifted
        ops += lifted if isinstance(lifted, list) else []
        inputs.append(source)
    return [*ops, new_op(op.type, inputs, output, op, domain="", **attributes)]


def _with_heads(value: Value, batch, heads) -> Value | None:
    """Return the (b, h, m, n) that a (b h, m, n) value is a reshape of."""
    merged = made_by(value, "Reshape", "Flatten")
    dims = (batch, heads, *value.dims[1:])
    return merged[0] if merged is not None and tuple(merged[0].dims) == dims else None


def grouped_queries(op: Op, uses: Uses) -> Result:
    """Attend with fewer key and value heads, where both were repeated to the number of query heads."""
    if idiom(op.output, "Attention") is not op and (op.domain or op.type != "Attention" or op[0].rank != 4):
        return None
    sources = [_repeated(op[1]), _repeated(op[2])]
    if None in sources or sources[0].dims[1] != sources[1].dims[1]:
        return None
    op.inputs[1], op.inputs[2] = sources
    return None


def _repeated(value: Value) -> Value | None:
    """Return k (b, kv, s, d) of Reshape(Expand(Unsqueeze(k, 2))), which is (b, kv * g, s, d)."""
    merge = made_by(value, "Reshape")
    spread = made_by(merge[0], "Expand", "Tile") if merge else None
    lift = made_by(spread[0], "Unsqueeze", "Reshape") if spread else None
    if lift is None or lift[0].rank != 4 or value.rank != 4:
        return None
    source, wide = lift[0], spread.output.dims
    batch, heads, length, size = source.dims
    if tuple(lift.output.dims) != (batch, heads, 1, length, size) or len(wide) != 5:
        return None
    if (wide[0], wide[1], wide[3], wide[4]) != (batch, heads, length, size):
        return None
    return source if tuple(value.dims) == (batch, heads * wide[2], length, size) else None
