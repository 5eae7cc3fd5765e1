"""Quick shapes: results of operators that need no trial run, since torch's own inference is slow for them."""

import itertools

import numpy as np
import torch

from graphclone.pytorch.program import Op
from graphclone.pytorch.sizes import probe_of

SAME = frozenset(
    "Neg Abs Sqrt Reciprocal Exp Log Sin Cos Tan Sinh Cosh Tanh Erf Sigmoid Softplus Relu Floor Ceil Round Sign Gelu "
    "Softmax LogSoftmax LayerNormalization RMSNormalization Identity Not LeakyRelu Elu Dropout CumSum Trilu".split()
)
"""One result, of the first input's shape and type."""
BROADCAST = frozenset("Add Sub Mul Div Pow Min Max Mod And Or Xor".split())
COMPARE = frozenset("Equal Less LessOrEqual Greater GreaterOrEqual IsNaN IsInf".split())

_counts = itertools.count()
"""Numbers results whose size the data decides, so that no two are taken for equal."""


def quick(op: Op, shapes: list[list[tuple[int, ...]]]) -> list[torch.Tensor] | None:
    """Return the result in each probe, or None where only a trial run tells; `shapes` are the inputs' in each probe."""
    if op.domain or len([output for output in op.outputs if output is not None]) != 1:
        return None
    if op.type == "NonZero":
        counts = unforeseen(len(shapes[0]))
        return [torch.empty((op[0].rank, count), dtype=torch.int64, device="meta") for count in counts]
    if op.type in SAME or _keeps_floats(op):
        return [torch.empty(shape, dtype=op[0].dtype, device="meta") for shape in shapes[0]]
    if op.type in BROADCAST or op.type in COMPARE:
        dtype = torch.bool if op.type in COMPARE else op[0].dtype
    elif op.type == "Where":
        dtype = op[1].dtype
    else:
        return None
    try:
        results = [np.broadcast_shapes(*each) for each in zip(*shapes, strict=True)]
    except ValueError:
        return None
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in results]


def _keeps_floats(op: Op) -> bool:
    """Tell whether this rounds an activation to integers held as floats, or gives such back, by one scale."""
    if op.type not in ("QuantizeLinear", "DequantizeLinear"):
        return False
    return op[0].dtype.is_floating_point and op[1].known is not None and op[1].known.ndim == 0


def quick_several(op: Op) -> list[list[torch.Tensor]] | None:
    """Return the results of an operator that has several, each in each probe, or None where only a trial run tells."""
    if op.key == ("", "DynamicQuantizeLinear") and op[0].dims:
        shapes = list(zip(*map(probe_of, op[0].dims), strict=True))
        both = [()] * len(shapes)
        return [[torch.empty(shape, device="meta") for shape in each] for each in (shapes, both, both)]
    if op.key == ("com.microsoft", "GroupQueryAttention") and op[3] is not None and op[6].known is None:
        return _attention_with_cache(op)
    return None


def _attention_with_cache(op: Op) -> list[list[torch.Tensor]]:
    """Return attention's results where the new cache has a size that an input tells."""
    heads, size = int(op.attribute("num_heads")), op[3].dims[3]
    contexts = zip(probe_of(op[0].dims[0]), probe_of(op[0].dims[1]), strict=True)
    shapes = [[(batch, length, heads * size) for batch, length in contexts]]
    for past in op.inputs[3:5]:
        batches = probe_of(past.dims[0])
        columns = zip(batches, unforeseen(len(batches)), strict=True)
        shapes.append([(batch, past.dims[1], length, size) for batch, length in columns])
    return [[torch.empty(shape, dtype=op[0].dtype, device="meta") for shape in each] for each in shapes]


def unforeseen(probes: int) -> list[int]:
    """Return sizes in each probe for an axis that the data decides, unlike those of any other."""
    count = next(_counts)
    return [1009 + 13 * count + 7 * index * index for index in range(probes)]


def either(first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """Return the shape in each probe of what is one of two, None where ranks differ; an axis in doubt is unforeseen."""
    if len(first[0]) != len(second[0]):
        return None
    pairs = zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)
    columns = [left if left == right else unforeseen(len(first)) for left, right in pairs]
    return list(zip(*columns, strict=True)) if columns else first
