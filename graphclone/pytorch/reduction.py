"""PyTorch rules of reductions, softmax and norms."""

import math

import torch

from graphclone.pytorch.code import Code
from graphclone.pytorch.known import shortest
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.registry import rule

REDUCTIONS = {
    "ReduceMean": "torch.mean({}, dim={}, keepdim={})",
    "ReduceSum": "torch.sum({}, dim={}, keepdim={})",
    "ReduceMax": "torch.amax({}, dim={}, keepdim={})",
    "ReduceMin": "torch.amin({}, dim={}, keepdim={})",
    "ReduceL1": "torch.linalg.vector_norm({}, ord=1, dim={}, keepdim={})",
    "ReduceL2": "torch.linalg.vector_norm({}, dim={}, keepdim={})",
    "ReduceSumSquare": "torch.sum(torch.square({}), dim={}, keepdim={})",
    "ReduceLogSumExp": "torch.logsumexp({}, dim={}, keepdim={})",
    "ReduceLogSum": "torch.log(torch.sum({}, dim={}, keepdim={}))",
}


OVER_NO_AXES = {
    "ReduceL1": "torch.abs({})",
    "ReduceL2": "torch.abs({})",
    "ReduceSumSquare": "torch.square({})",
    "ReduceLogSum": "torch.log({})",
}
"""What is left of a reduction where no axis is reduced; of the others, nothing."""
WHOLE = {
    "ReduceMean": "torch.div(torch.sum({}, dim={}, keepdim={}), {}, rounding_mode='trunc')",
    "ReduceL1": "torch.sum(torch.abs({}), dim={}, keepdim={})",
}
"""How integers are reduced, where torch's own function takes floats alone; the result has to be an integer again."""


@rule(*REDUCTIONS)
def reduction(op: Op) -> Code:
    axes, floating = _axes(op), op[0].dtype.is_floating_point
    if not floating and op.type in ("ReduceL2", "ReduceLogSum", "ReduceLogSumExp"):
        raise Unsupported("a norm or logarithm of integers has no PyTorch counterpart")
    if not axes:
        return Code(OVER_NO_AXES.get(op.type, "{}"), op[0])
    words = [op[0], axes[0] if len(axes) == 1 else tuple(axes), bool(op.attribute("keepdims", 1))]
    if floating or op.type in ("ReduceMax", "ReduceMin"):
        return Code(REDUCTIONS[op.type], *words)
    words += [math.prod(op[0].dims[axis] for axis in axes)] if op.type == "ReduceMean" else []
    return _as_wide(op, Code(WHOLE.get(op.type, REDUCTIONS[op.type]), *words))


@rule("ReduceProd")
def product(op: Op) -> Code:
    result: Value | Code = op[0]
    for axis in sorted((axis % op[0].rank for axis in _axes(op)), reverse=True):
        result = Code("torch.prod({}, dim={}, keepdim={})", result, axis, bool(op.attribute("keepdims", 1)))
    return _as_wide(op, result)


def _axes(op: Op) -> list[int]:
    """Return the axes to reduce: all where none is given, unless the operator says that none means none."""
    axes = op.integers(1, "axes")
    return axes or ([] if op.attribute("noop_with_empty_axes", 0) else list(range(op[0].rank)))


def _as_wide(op: Op, result: Value | Code) -> Code:
    """Return a sum or product in the type of what it sums; torch widens integers to 64 bits."""
    narrow = not op[0].dtype.is_floating_point and op[0].dtype != torch.int64
    return Code("{}.to({})" if narrow else "{}", result, *[op[0].dtype] * narrow)


@rule("ArgMax", "ArgMin")
def arg(op: Op) -> Code:
    """Give the place of an extreme; of the last one that is equal by counting from the end."""
    axis, last = op.axis(0), op.attribute("select_last_index", 0)
    source = Code("{}.flip({})", op[0], axis) if last else op[0]
    function, kept = f"torch.{op.type.lower()}", bool(op.attribute("keepdims", 1))
    place = Code(function + "({}, dim={}, keepdim={})", source, axis, kept)
    return Code("({} - {})", op[0].dims[axis] - 1, place) if last else place


@rule("Softmax", "LogSoftmax")
def softmax(op: Op) -> Code:
    function = "F.softmax" if op.type == "Softmax" else "F.log_softmax"
    if op.opset >= 13:
        return Code(function + "({}, dim={})", op[0], op.axis(-1))
    axis = op.axis(1) % op[0].rank
    if axis == op[0].rank - 1:
        return Code(function + "({}, dim=-1)", op[0])
    flat = Code(function + "({}.flatten({}), dim=-1)", op[0], axis)
    return Code("{}.view({})", flat, tuple(op[0].dims))


@rule("CumSum")
def cumsum(op: Op) -> Code:
    axis = op[1].scalar
    if axis is None:
        raise Unsupported("its axis depends on data")
    backwards = op.attribute("reverse", 0)
    result = Code("torch.cumsum({}, dim={})", Code("{}.flip({})", op[0], axis) if backwards else op[0], axis)
    result = Code("{}.flip({})", result, axis) if backwards else result
    return _as_wide(op, Code("({} - {})", result, op[0]) if op.attribute("exclusive", 0) else result)


def epsilon(op: Op, default: float = 1e-5) -> float:
    """Return the epsilon attribute as the framework wrote it."""
    return shortest(op.attribute("epsilon", default))


def normalized(op: Op, default: int = -1) -> tuple:
    """Return the sizes of the axes that a norm spans."""
    axis = op.axis(default)
    return tuple(op[0].dims[axis % op[0].rank :])


@rule("LayerNormalization")
def layer_norm(op: Op) -> Code:
    only_first(op)
    dims = normalized(op)
    weight, bias = (each if each is None or tuple(each.dims) == dims else None for each in (op[1], op[2]))
    spread = (op[1] is not None and weight is None) or (op[2] is not None and bias is None)
    if not spread:
        return Code("F.layer_norm({}, {}, {}, {}, {})", op[0], dims, weight, bias, epsilon(op))
    return _affine(Code("F.layer_norm({}, {}, eps={})", op[0], dims, epsilon(op)), op[1], op[2])


@rule("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(op: Op) -> Code:
    only_first(op)
    dims = normalized(op)
    if op[1] is not None and tuple(op[1].dims) != dims:
        return _affine(Code("F.rms_norm({}, {}, eps={})", op[0], dims, epsilon(op)), op[1], None)
    return Code("F.rms_norm({}, {}, {}, {})", op[0], dims, op[1], epsilon(op))


def _affine(normed: Code, weight: Value | None, bias: Value | None) -> Code:
    """Return a norm times a weight plus a bias of shapes that torch's own norms do not take."""
    normed = normed if weight is None else Code("({} * {})", normed, weight)
    return normed if bias is None else Code("({} + {})", normed, bias)


rule("SimplifiedLayerNormalization", domain="com.microsoft")(rms_norm)


@rule("LayerNorm", domain="graphclone")
def layer_norm_idiom(op: Op) -> Code:
    return Code("F.layer_norm({}, {}, {}, {}, {})", op[0], (op[0].dims[-1],), op[1], op[2], op.attribute("epsilon"))


@rule("RMSNorm", domain="graphclone")
def rms_norm_idiom(op: Op) -> Code:
    return Code("F.rms_norm({}, {}, {}, {})", op[0], (op[0].dims[-1],), op[1], op.attribute("epsilon"))


@rule("InstanceNormalization")
def instance_norm(op: Op) -> Code:
    return Code("F.instance_norm({}, weight={}, bias={}, eps={})", op[0], op[1], op[2], epsilon(op))


@rule("GroupNormalization")
def group_norm(op: Op) -> Code:
    groups = int(op.attribute("num_groups"))
    if op.opset >= 21:
        return Code("F.group_norm({}, {}, {}, {}, {})", op[0], groups, op[1], op[2], epsilon(op))
    plain = Code("F.group_norm({}, {}, eps={})", op[0], groups, epsilon(op))
    per, rest = op[0].dims[1] // groups, (1,) * (op[0].rank - 2)
    spread = [Code("{}.repeat_interleave({}).view({})", op[i], per, (-1, *rest)) for i in (1, 2)]
    return Code("({} * {} + {})", plain, *spread)


@rule("BatchNormalization")
def batch_norm(op: Op) -> Code:
    only_first(op)
    if op.attribute("training_mode", 0):
        raise Unsupported("the graph was exported in training mode; export it in evaluation mode")
    return Code("F.batch_norm({}, {}, {}, {}, {}, eps={})", op[0], op[3], op[4], op[1], op[2], epsilon(op))


@rule("LpNormalization")
def lp_norm(op: Op) -> Code:
    """Divide by the norm; zeros stay zeros."""
    return Code("F.normalize({}, p={}, dim={})", op[0], int(op.attribute("p", 2)), op.axis(-1))


def only_first(op: Op) -> None:
    """Refuse optional outputs that no transformer reads."""
    further = next((output for output in op.outputs[1:] if output is not None), None)
    if further is not None:
        raise Unsupported(f"its output {further.name!r:.80} has no PyTorch counterpart")


@rule("GlobalAveragePool")
def global_average_pool(op: Op) -> Code:
    return Code("torch.mean({}, dim={}, keepdim=True)", op[0], tuple(range(2, op[0].rank)))


@rule("GlobalMaxPool")
def global_max_pool(op: Op) -> Code:
    return Code("torch.amax({}, dim={}, keepdim=True)", op[0], tuple(range(2, op[0].rank)))


@rule("TopK")
def topk(op: Op) -> Code:
    count = op.integers(1, "k")[0]
    largest, ordered = bool(op.attribute("largest", 1)), bool(op.attribute("sorted", 1))
    return Code("torch.topk({}, {}, dim={}, largest={}, sorted={})", op[0], count, op.axis(-1), largest, ordered)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_layer_norm(op: Op) -> Code | tuple:
    """Add the skip and the bias, then norm; output 3 is the sum."""
    if any(output is not None for output in op.outputs[1:3]):
        raise Unsupported("its mean and deviation outputs have no PyTorch counterpart")
    simple = op.type != "SkipLayerNormalization"
    bias = op[3] if simple else op[4]
    summed = Code("({} + {})", op[0], op[1]) if bias is None else Code("({} + {} + {})", op[0], op[1], bias)
    dims = (op[0].dims[-1],)
    if simple:
        normed = Code("F.rms_norm({}, {}, {}, {})", summed, dims, op[2], epsilon(op))
    else:
        normed = Code("F.layer_norm({}, {}, {}, {}, {})", summed, dims, op[2], op[3], epsilon(op))
    if len(op.outputs) > 3 and op.outputs[3] is not None:
        return (normed, None, None, summed)
    return normed
