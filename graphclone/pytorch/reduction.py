"""PyTorch rules of reductions, softmax and norms."""

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


@rule(*REDUCTIONS)
def reduction(op: Op) -> Code:
    axes = op.integers(1, "axes")
    if not axes:
        if op.attribute("noop_with_empty_axes", 0):
            return Code("{}", op[0])
        axes = list(range(op[0].rank))
    if not axes:
        return Code("{}", op[0])
    return Code(
        REDUCTIONS[op.type], op[0], axes[0] if len(axes) == 1 else tuple(axes), bool(op.attribute("keepdims", 1))
    )


@rule("ReduceProd")
def product(op: Op) -> Code:
    result: Value | Code = op[0]
    axes = op.integers(1, "axes") or list(range(op[0].rank))
    for axis in sorted((axis % op[0].rank for axis in axes), reverse=True):
        result = Code("torch.prod({}, dim={}, keepdim={})", result, axis, bool(op.attribute("keepdims", 1)))
    return result


@rule("ArgMax", "ArgMin")
def arg(op: Op) -> Code:
    if op.attribute("select_last_index", 0):
        raise Unsupported("select_last_index=1 has no PyTorch counterpart")
    return Code(
        f"torch.{op.type.lower()}({{}}, dim={{}}, keepdim={{}})", op[0], op.axis(0), bool(op.attribute("keepdims", 1))
    )


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
    return Code("({} - {})", result, op[0]) if op.attribute("exclusive", 0) else result


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
    return Code("F.layer_norm({}, {}, {}, {}, {})", op[0], normalized(op), op[1], op[2], epsilon(op))


@rule("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(op: Op) -> Code:
    only_first(op)
    return Code("F.rms_norm({}, {}, {}, {})", op[0], normalized(op), op[1], epsilon(op))


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
    return Code("F.batch_norm({}, {}, {}, {}, {}, eps={})", op[0], op[3], op[4], op[1], op[2], epsilon(op))


@rule("LpNormalization")
def lp_norm(op: Op) -> Code:
    return Code("F.normalize({}, p={}, dim={}, eps=0.0)", op[0], int(op.attribute("p", 2)), op.axis(-1))


def only_first(op: Op) -> None:
    """Refuse optional outputs that no transformer reads."""
    if any(output is not None for output in op.outputs[1:]):
        raise Unsupported(f"its output {op.outputs[1].name!r} (mean or deviation) has no PyTorch counterpart")


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
