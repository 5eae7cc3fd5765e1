"""Idioms of norms and activations that exporters write out."""

import math

from graphclone.pytorch.program import Op, Value
from graphclone.pytorch.rewriting import Result, Uses, factors, idiom, is_number, made_by, new_op, number, operands
from graphclone.pytorch.weight_idioms import is_parameter
from graphclone.weights import Weight

SCALED_BY_CHANNEL = 21
"""The opset from which GroupNormalization has a scale for each channel instead of each group."""


def rms_norm(op: Op, uses: Uses) -> Result:
    """x / sqrt(mean(x^2) + eps), in its spellings."""
    if op.domain or op.type not in ("Mul", "Div"):
        return None
    if op.type == "Mul":
        pair = operands(op, lambda value: _root(value) is not None)
        if pair is None:
            return None
        root, x = _root(pair[0]), pair[1]
    else:
        root, x = made_by(op[1], "Sqrt"), op[0]
        if root is None:
            return None
    found = _mean_square(root[0])
    if found is None or found[0] is not x:
        return None
    return new_op("RMSNorm", [x, None], op.output, op, epsilon=found[1])


def _root(value: Value) -> Op | None:
    """Return the Sqrt whose reciprocal the value is."""
    reciprocal = made_by(value, "Reciprocal")
    if reciprocal is not None:
        return made_by(reciprocal[0], "Sqrt")
    division = made_by(value, "Div")
    if division is not None and is_number(division[0], 1.0):
        return made_by(division[1], "Sqrt")
    power = made_by(value, "Pow")
    return power if power is not None and is_number(power[1], -0.5) else None


def _mean(value: Value | None, *, squared: bool = False) -> Value | None:
    """Return what a value is the mean of, or the mean of its square, over the last axis, which stays as one."""
    pooled = made_by(value, "GlobalAveragePool")
    if pooled is not None:
        return pooled[0] if pooled[0].rank == 3 else None
    op = made_by(value, "Mul", "Div")
    total = value
    if op is not None:
        pair = operands(op, lambda each: number(each) is not None) if op.type == "Mul" else (op[1], op[0])
        if pair is None or number(pair[0]) is None:
            return None
        total = pair[1]
    kept = made_by(total, "Unsqueeze", "Reshape")
    kind = "ReduceMean" if op is None else "ReduceSumSquare" if squared else "ReduceSum"
    reduced = made_by(kept[0] if kept is not None else total, kind)
    if reduced is None or bool(reduced.attribute("keepdims", 1)) == (kept is not None):
        return None
    source, axes = reduced[0], reduced.integers(1, "axes")
    if axes is None or [axis % source.rank for axis in axes] != [source.rank - 1]:
        return None
    if tuple(total.dims) != (*source.dims[:-1], 1):
        return None
    if op is not None and not is_number(pair[0], 1 / source.dims[-1] if op.type == "Mul" else source.dims[-1]):
        return None
    return source


def _mean_square(value: Value) -> tuple[Value, float] | None:
    """Return (x, epsilon) of mean(x^2, last axis) + epsilon."""
    total = made_by(value, "Add")
    pair = operands(total, lambda each: number(each) is not None) if total else None
    if pair is None:
        return None
    square = _mean(pair[1], squared=True) if made_by(pair[1], "Mul", "Div") else None
    if square is None and (mean := _mean(pair[1])) is not None:
        square = _square(mean)
    return None if square is None else (square, number(pair[0]))


def _variance(value: Value) -> tuple[Value, float] | None:
    """Return (x, epsilon) of the variance of x + epsilon, from its centred values or from its squares."""
    found = _mean_square(value)
    if found is None:
        return _difference_of_squares(value)
    gap = made_by(found[0], "Sub")
    return (gap[0], found[1]) if gap is not None and _mean(gap[1]) is gap[0] else None


def _difference_of_squares(value: Value) -> tuple[Value, float] | None:
    """Return (x, epsilon) of mean(x^2) - mean(x)^2 + epsilon, the difference kept from below zero or not."""
    total = made_by(value, "Add")
    pair = operands(total, lambda each: number(each) is not None) if total else None
    if pair is None:
        return None
    gap, kept = made_by(pair[1], "Sub"), made_by(pair[1], "Max", "Clip", "Relu")
    if kept is not None:
        zeros = [each for each in (*kept.inputs[1:], kept.attribute("min")) if each is not None]
        if kept.type != "Relu" and (len(zeros) != 1 or not (zeros[0] == 0.0 or is_number(zeros[0], 0.0))):
            return None
        gap = made_by(kept[0], "Sub")
    squares, mean = (_mean(gap[0]), _square(gap[1])) if gap is not None else (None, None)
    x = _mean(mean) if mean is not None else None
    return (x, number(pair[0])) if x is not None and squares is not None and _square(squares) is x else None


def _square(value: Value) -> Value | None:
    """Return what a value is the square of."""
    op = made_by(value, "Pow", "Mul")
    if op is None:
        return None
    if op.type == "Pow":
        return op[0] if is_number(op[1], 2.0) else None
    return op[0] if op[0] is op[1] else None


def rms_norm_weight(op: Op, uses: Uses) -> Result:
    """Multiply a norm by a vector: its weight."""
    if op.type != "Mul" or op.domain:
        return None
    pair = operands(op, lambda value: is_parameter(value, 1))
    norm = idiom(pair[1], "RMSNorm") if pair else None
    if norm is None or norm[1] is not None or not uses.once(pair[1]) or pair[0].dims[0] != op.output.dims[-1]:
        return None
    return new_op("RMSNorm", [norm[0], pair[0]], op.output, op, **norm.attributes)


def layer_norm(op: Op, uses: Uses) -> Result:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps), in its spellings."""
    if op.domain or op.type not in ("Mul", "Div"):
        return None
    if op.type == "Mul":
        pair = operands(op, lambda value: _root(value) is not None)
        root, centred = (_root(pair[0]), pair[1]) if pair else (None, None)
    else:
        root, centred = made_by(op[1], "Sqrt"), op[0]
    gap = made_by(centred, "Sub")
    if root is None or gap is None or _mean(gap[1]) is not gap[0]:
        return None
    found = _variance(root[0])
    if found is None or found[0] is not gap[0]:
        return None
    return new_op("LayerNorm", [gap[0], None, None], op.output, op, epsilon=found[1])


def folded_layer_norm(op: Op, uses: Uses) -> Result:
    """x s + (bias - mean(x) s), where s = weight / sqrt(variance(x) + eps): a norm as batch norms are written."""
    if op.type != "Add" or op.domain:
        return None
    for scaled, shift in (op.inputs[:2], op.inputs[1::-1]):
        product = made_by(scaled, "Mul")
        for x, scale in (product.inputs[:2], product.inputs[1::-1]) if product is not None else ():
            pair = operands(made_by(scale, "Mul") or op, lambda each: _root(each) is not None)
            found = _variance(_root(pair[0])[0]) if pair is not None else None
            bias = _shift(shift, x, scale)
            if found is None or found[0] is not x or bias is None or _vector(pair[1], x) is None:
                continue
            inputs = [x, _vector(pair[1], x), bias]
            return new_op("LayerNorm", inputs, op.output, op, epsilon=found[1])
    return None


def _shift(value: Value, x: Value, scale: Value) -> Value | None:
    """Return the bias of bias - mean(x) scale."""
    op = made_by(value, "Add", "Sub")
    if op is None:
        return None
    for bias, product in (op.inputs[:2], op.inputs[1::-1]) if op.type == "Add" else (op.inputs[:2],):
        pair = operands(made_by(product, "Mul") or op, lambda each: each is scale)
        if pair is None or _vector(bias, x) is None:
            continue
        negative = made_by(pair[1], "Neg")
        mean = pair[1] if op.type == "Sub" else negative[0] if negative is not None else None
        if _mean(mean) is x:
            return _vector(bias, x)
    return None


def _vector(value: Value, x: Value) -> Value | None:
    """Return the parameter along the last axis of x that a value is, whatever axes of one it was given."""
    op = made_by(value, "Reshape", "Unsqueeze")
    source = op[0] if op is not None else value
    return source if is_parameter(source, 1) and value.dims[-1] == source.dims[0] == x.dims[-1] else None


def layer_norm_weight(op: Op, uses: Uses) -> Result:
    """Multiply by a vector, then add one: weight and bias of a norm."""
    if op.domain or op.type not in ("Mul", "Add"):
        return None
    pair = operands(op, lambda value: is_parameter(value, 1))
    norm = idiom(pair[1], "LayerNorm") if pair else None
    if norm is None or not uses.once(pair[1]) or pair[0].dims[0] != op.output.dims[-1] or norm[2] is not None:
        return None
    if op.type == "Mul":
        return (
            None
            if norm[1] is not None
            else new_op("LayerNorm", [norm[0], pair[0], None], op.output, op, **norm.attributes)
        )
    if norm[1] is None:
        return None
    return new_op("LayerNorm", [norm[0], norm[1], pair[0]], op.output, op, **norm.attributes)


def standard_norms(op: Op, uses: Uses) -> Result:
    """Bring the norms that are operators already into the same form."""
    if op.type in ("RMSNormalization", "SimplifiedLayerNormalization") and op.domain in ("", "com.microsoft"):
        kind, inputs = "RMSNorm", [op[0], op[1]]
    elif op.type == "LayerNormalization" and not op.domain:
        kind, inputs = "LayerNorm", [op[0], op[1], op[2]]
    else:
        return None
    if any(output is not None for output in op.outputs[1:]) or op.axis(-1) % op[0].rank != op[0].rank - 1:
        return None
    if any(each is not None and tuple(each.dims) != tuple(op[0].dims[-1:]) for each in inputs[1:]):
        return None
    from graphclone.pytorch.reduction import epsilon

    return new_op(kind, inputs, op.output, op, epsilon=epsilon(op))


def group_norm(op: Op, uses: Uses) -> Result:
    """Norm each group as an image of one channel, then scale and shift each channel: what exporters make of one call.

    Looked for before tensors are named: the weight (channels, 1, ...) and the bias are vectors in the framework.
    """
    scaled = made_by(op[0], "Mul") if op.type == "Add" and not op.domain else None
    apart = made_by(scaled[0], "Reshape") if scaled else None
    norm = made_by(apart[0], "InstanceNormalization") if apart else None
    joined = made_by(norm[0], "Reshape") if norm else None
    sizes = made_by(apart[1], "Shape") if joined else None
    if (
        sizes is None
        or sizes[0] is not joined[0]
        or any(v.weight is None for v in (scaled[1], op[1], *norm.inputs[1:]))
    ):
        return None
    ones, zeros = (each.weight.load() for each in norm.inputs[1:])
    if (ones != 1).any() or zeros.any() or joined[1].weight is None:
        return None
    if joined[1].weight.load().tolist() != [0, ones.size, -1]:
        return None
    vectors = []
    for each in (scaled[1], op[1]):
        if each.weight.size != each.weight.shape[0] or each.weight.size % ones.size:
            return None
        vectors.append(Value(each.name, weight=Weight.of(each.weight.load().reshape(-1))))
    given = {"num_groups": ones.size, "epsilon": norm.attribute("epsilon", 1e-5)}
    made = new_op("GroupNormalization", [joined[0], *vectors], op.output, op, domain="", **given)
    made.opset = SCALED_BY_CHANNEL
    return made


def gelu(op: Op, uses: Uses) -> Result:
    """0.5 x (1 + erf(x / sqrt 2)) and its tanh approximation, multiplied in any order."""
    if op.type != "Mul" or op.domain:
        return None
    parts = factors(op.output, uses)
    halves = [part for part in parts if is_number(part, 0.5)]
    sums = [part for part in parts if made_by(part, "Add") is not None]
    rest = [part for part in parts if part not in halves and part not in sums[:1]]
    if len(halves) != 1 or not sums or len(parts) != 3:
        return None
    if len(rest) != 1:
        return None
    x = rest[0]
    pair = operands(sums[0].op, lambda value: is_number(value, 1.0))
    if pair is None:
        return None
    erf, tanh = made_by(pair[1], "Erf"), made_by(pair[1], "Tanh")
    if erf is not None and _scaled(erf[0], x, math.sqrt(0.5)):
        return new_op("Gelu", [x], op.output, op, approximate="none")
    if tanh is not None and _tanh_argument(tanh[0], x, uses):
        return new_op("Gelu", [x], op.output, op, approximate="tanh")
    return None


def _scaled(value: Value, x: Value, factor: float) -> bool:
    op = made_by(value, "Mul", "Div")
    if op is None:
        return False
    if op.type == "Div":
        return op[0] is x and is_number(op[1], 1 / factor)
    pair = operands(op, lambda each: is_number(each, factor))
    return pair is not None and pair[1] is x


def _tanh_argument(value: Value, x: Value, uses: Uses) -> bool:
    """Recognise sqrt(2 / pi) (x + 0.044715 x^3), and x sqrt(2 / pi) (1 + 0.044715 x^2)."""
    parts = factors(value, uses)
    parts = [part for part in parts if not is_number(part, math.sqrt(2 / math.pi))]
    sums = [part for part in parts if made_by(part, "Add") is not None and part is not x]
    if len(sums) != 1:
        return False
    others = [part for part in parts if part is not sums[0]]
    total = sums[0].op
    if not others:
        pair = operands(total, lambda each: each is x)
        return pair is not None and _cubic(pair[1], x, 3, uses)
    pair = operands(total, lambda each: is_number(each, 1.0))
    return others == [x] and pair is not None and _cubic(pair[1], x, 2, uses)


def _cubic(value: Value, x: Value, power: int, uses: Uses) -> bool:
    parts = factors(value, uses)
    degree = 0
    for part in parts:
        raised = made_by(part, "Pow")
        if part is x:
            degree += 1
        elif raised is not None and raised[0] is x and number(raised[1]) is not None:
            degree += int(number(raised[1]))
        elif not is_number(part, 0.044715):
            return False
    return degree == power and sum(is_number(part, 0.044715) for part in parts) == 1


def silu(op: Op, uses: Uses) -> Result:
    """x sigmoid(x)."""
    if op.type != "Mul" or op.domain:
        return None
    pair = operands(op, lambda value: made_by(value, "Sigmoid") is not None)
    if pair is None or pair[0].op[0] is not pair[1]:
        return None
    return new_op("Silu", [pair[1]], op.output, op)
