"""Numbers of few bits as floats: stored ones become trainable tensors, activations are rounded with gradients intact.

A quantized activation is a float tensor that holds integers, so that gradients pass through all that is between
QuantizeLinear and DequantizeLinear.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from onnx import TensorProto

from graphclone.dtypes import integer_range, is_float
from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.known import LARGEST, known_constant
from graphclone.pytorch.program import Op, Program, Unsupported, Value
from graphclone.pytorch.registry import rows, rule
from graphclone.pytorch.rewriting import IDIOMS, Result, Uses, idiom, made_by, new_op, new_value, rewrite
from graphclone.weights import Weight

DOMAINS = ("", "com.microsoft")
PICKING = ("Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""Operators that move entries of their first input, and could as well behind a DequantizeLinear of one scale."""


def fold_quantized(program: Program) -> None:
    """Let stored tensors of few bits be the floats they stand for, before tensors are named."""
    made: dict[tuple, Value] = {}

    def fold(op: Op, uses: Uses) -> Result:
        function = FOLDS.get(op.type) if op.domain in DOMAINS else None
        return None if function is None else function(op, made)

    rewrite(program, fold)


Made = dict[tuple, Value]
"""Floats by what they are made of, so that a shared tensor stays one."""


def _floats(made: Made, key: Sequence, compute: Callable[[], np.ndarray]) -> Value:
    """Return the floats that integers, their scale and their zero point are, under the name they had as floats."""
    key = tuple(key)
    if key not in made:
        scale = key[1] if len(key) > 1 else None
        name = key[0].name if scale is None else original_name(key[0].name, scale.name)
        made[key] = Value(name, weight=Weight.of(compute()))
    return made[key]


def original_name(integers: str, scale: str) -> str:
    """Return what quantizers called a tensor before they made integers and a scale of it.

    Example:
        >>> original_name("fc.weight_quantized", "fc.weight_scale"), original_name("fc.weight_Q4", "fc.weight_scales")
        ('fc.weight', 'fc.weight')
        >>> original_name("fc.bias_quantized", "fc.bias_quantized_scale"), original_name("w", "s")
        ('fc.bias', 'w')
    """
    stem, _, ending = scale.rpartition("_")
    if not ending.startswith("scale") or not integers.startswith(stem) or integers[len(stem) :][:1] not in ("", "_"):
        return integers
    return stem.removesuffix("_quantized").removesuffix("_DQ") or integers


def _are_stored(*values: Value | None) -> bool:
    return all(value is not None and value.weight is not None for value in values)


def _load(value: Value | None) -> np.ndarray | None:
    return None if value is None else value.weight.load()


def _fold_dequantize(op: Op, made: Made) -> Result:
    """A stored tensor, or entries that are picked from one, are floats; else take the zero point as one."""
    if not _are_stored(op[1], op[2] or op[1]):
        return None
    picked = op[0].op
    if picked is not None and (picked.domain or picked.type not in PICKING or op[1].weight.size != 1):
        picked = None
    source = op[0] if picked is None else picked[0]
    if not _are_stored(source):
        return _fold_quantize(op, made)
    axis, block = op.axis(1), int(op.attribute("block_size", 0))
    parts = (source, op[1], op[2])
    floats = _floats(made, (*parts, axis, block), lambda: dequantize(*map(_load, parts), axis, block))
    if picked is None:
        return floats
    return new_op(picked.type, [floats, *picked.inputs[1:]], op.output, picked, "", **picked.attributes)


def _fold_quantize(op: Op, made: Made) -> Result:
    """Note the range of the integers, and let scale and zero point be numbers."""
    if not _are_stored(op[1], op[2] or op[1]):
        return None
    kind = int(op.attribute("output_dtype", 0)) or TensorProto.UINT8
    if op.type == "QuantizeLinear":
        kind = op[2].weight.onnx_dtype if op[2] is not None else kind
        if is_float(kind):
            return None
        op.attributes["range"] = integer_range(kind)
    for slot in range(1, len(op.inputs)):
        if op[slot] is not None:
            op.inputs[slot] = _number(op[slot], made)
    return None


def _number(value: Value, made: Made) -> Value:
    """Return a stored scale or zero point as floats, written into the source where they are few."""
    data = _load(value).astype(np.float32)
    floats = _floats(made, (value,), lambda: data)
    if data.size <= LARGEST:
        data = data.reshape(()) if data.size == 1 else data
        floats.weight, floats.dtype, floats.dims, floats.is_table = None, torch.float32, data.shape, True
        known_constant(floats, data, torch.float32)
    return floats


def _fold_blockwise_matmul(op: Op, made: Made) -> Result:
    """Rows of blocks, packed into bytes, are a float matrix (N, K)."""
    if not _are_stored(op[1], op[2], op[3] or op[2]) or op[4] is not None:
        return None
    weight = _floats(made, op.inputs[1:4], lambda: _rows_of_blocks(op))
    turned, product = new_value(op.output.name, (), None), new_value(op.output.name, (), None)
    last = op.output if op[5] is None else product
    ops = [
        new_op("Transpose", [weight], turned, op, domain="", perm=[1, 0]),
        new_op("MatMul", [op[0], turned], last, op, domain=""),
    ]
    return ops if op[5] is None else [*ops, new_op("Add", [product, op[5]], op.output, op, domain="")]


def _fold_integer_convolution(op: Op, made: Made) -> Result:
    """A stored kernel is floats in units of its scale; the activation's zero point goes before zeros are padded."""
    if not _are_stored(op[1], op[3] or op[1]):
        return None
    one = np.float32(1)
    weight = _floats(made, (op[1], None, op[3]), lambda: dequantize(_load(op[1]), one, _load(op[3]), 0))
    source, ops = op[0], []
    if op[2] is not None:
        zero = _number(op[2], made) if op[2].weight is not None else op[2]
        source = new_value(op[0].name, (), None)
        ops.append(new_op("Sub", [op[0], zero], source, op, domain=""))
    return [*ops, new_op("Conv", [source, weight], op.output, op, domain="", **op.attributes)]


def _fold_blockwise_gather(op: Op, made: Made) -> Result:
    if not _are_stored(op[0], op[2], op[3] or op[2]):
        return None
    table = _floats(made, (op[0], op[2], op[3]), lambda: _table_of_blocks(op))
    return new_op("Gather", [table, op[1]], op.output, op, domain="", axis=op.axis(0, "gather_axis"))


def _fold_integer_matmul(op: Op, made: Made) -> Result:
    """A stored operand is floats in units of its scale, which the graph multiplies by later."""
    if not _are_stored(op[1], op[3] or op[1]):
        return None
    one = np.float32(1)
    weight = _floats(made, (op[1], None, op[3]), lambda: dequantize(_load(op[1]), one, _load(op[3]), -1))
    op.inputs = [op[0], weight, op[2]]
    return None


def _fold_scaled_product(op: Op, made: Made) -> Result:
    """Integers times integers, as floats, times both scales: a matrix product of what both stand for."""
    cast = op[0].op
    product = cast[0].op if cast is not None and cast.type == "Cast" else None
    scales = op[1].op
    if product is None or product.type != "MatMulInteger" or product[2] is None or scales is None:
        return None
    scale = scales[1]
    if scales.type != "Mul" or not _are_stored(scale) or product[1].weight is None or len(scale.weight.shape) > 1:
        return None
    integers, data = product[1], _load(product[1])
    weight = _floats(made, (integers, scale), lambda: data * _load(scale).astype(np.float32))
    given = new_value(product[0].name, (), None)
    return [
        new_op("DequantizeLinear", [product[0], scales[0], product[2]], given, product, domain=""),
        new_op("MatMul", [given, weight], op.output, product, domain=""),
    ]


FOLDS = {
    "Mul": _fold_scaled_product,
    "DequantizeLinear": _fold_dequantize,
    "QuantizeLinear": _fold_quantize,
    "MatMulNBits": _fold_blockwise_matmul,
    "GatherBlockQuantized": _fold_blockwise_gather,
    "MatMulInteger": _fold_integer_matmul,
    "ConvInteger": _fold_integer_convolution,
}


def dequantize(data, scale, zero, axis: int, block: int = 0) -> np.ndarray:
    """Return (data - zero) * scale in the type of the scale; scale and zero are single, along `axis`, or per block.

    Example:
        >>> dequantize(np.array([[1, 2], [3, 4]], np.uint8), np.float32([1, 10]), np.uint8([0, 1]), axis=0)
        array([[ 1.,  2.],
               [20., 30.]], dtype=float32)
    """

    def spread(values: np.ndarray) -> np.ndarray:
        if values.size == 1:
            return values.reshape(())
        if values.ndim == 1 and data.ndim > 1 and not block:
            return values.reshape([-1 if place == axis % data.ndim else 1 for place in range(data.ndim)])
        if block:
            values = np.repeat(values, block, axis).take(np.arange(data.shape[axis]), axis)
        return values

    whole = data.astype(np.float64)
    if zero is not None:
        whole = whole - spread(zero.astype(np.float64))
    return (whole.astype(np.float32) * spread(scale.astype(np.float32))).astype(scale.dtype)


def _unpacked(data: np.ndarray, count: int) -> np.ndarray:
    """Return numbers of `count` bits, the lowest of each byte first, along the last axis."""
    parts = data.view(np.uint8)[..., None] >> np.arange(0, 8, count, dtype=np.uint8) & (2**count - 1)
    return parts.reshape(*data.shape[:-1], -1)


def _rows_of_blocks(op: Op) -> np.ndarray:
    """Return the (N, K) matrix of a MatMulNBits; blocks without a zero point count from the middle."""
    count, block = int(op.attribute("bits", 4)), int(op.attribute("block_size"))
    data, scale, zero = (_load(each) for each in (op[1], op[2], op[3]))
    rows, blocks = data.shape[:2]
    if zero is None:
        zero = np.full((rows, blocks), 2 ** (count - 1), np.float32)
    elif zero.dtype == np.uint8:
        zero = _unpacked(zero.reshape(rows, -1), count)[:, :blocks]
    whole = _unpacked(data, count).reshape(rows, -1)[:, : int(op.attribute("K"))]
    return dequantize(whole, scale.reshape(rows, blocks), zero.reshape(rows, blocks), 1, block)


def _table_of_blocks(op: Op) -> np.ndarray:
    """Return the floats of a GatherBlockQuantized; uint8 data holds numbers of `bits` bits along the last axis."""
    data, scale, zero = (_load(each) for each in (op[0], op[2], op[3]))
    if data.dtype == np.uint8:
        count = int(op.attribute("bits", 4))
        data = _unpacked(data, count)
        if zero is None:
            zero = np.full(scale.shape, 2 ** (count - 1), np.uint8)
        else:
            zero = _unpacked(zero, count)[..., : scale.shape[-1]]
    return dequantize(data, scale, zero, op.axis(1, "quantize_axis"), int(op.attribute("block_size", 128)))


STEEP = {"Sqrt": 0, "Reciprocal": 0, "Log": 0, "Div": 1}
"""Operators whose slope is infinite where an operand is zero, and the slot of that operand."""


def hold_at_zero(op: Op, uses: Uses) -> Result:
    """Let no gradient pass where rounding made the operand of a steep operator zero.

    What reads such a quotient cuts its infinity off, so that it gives no gradient back; but no gradient times an
    infinite slope is no number.
    """
    slot = STEEP.get(op.type) if not op.domain else None
    if slot is None or not _is_rounded(op[slot]):
        return None
    at = op[slot]
    held = [
        None if each.known is not None else new_value(each.name, op.output.dims, op.output.dtype) for each in op.inputs
    ]
    holds = [new_op("Hold", [each, at], new, op) for each, new in zip(op.inputs, held, strict=True) if new is not None]
    op.inputs = [new or each for each, new in zip(op.inputs, held, strict=True)]
    return [*holds, op]


def _is_rounded(value: Value | None) -> bool:
    """Tell whether a value was rounded, or is the root of one that was."""
    root = made_by(value, "Sqrt")
    if root is not None:
        hold = idiom(root[0], "Hold")
        return _is_rounded(root[0] if hold is None else hold[0])
    return made_by(value, "DequantizeLinear") is not None


# -- rules ---------------------------------------------------------------------------------------------------------


def _along(op: Op, value: Value | None) -> Value | Code:
    """Return a scale or zero point so that it broadcasts against the first input."""
    if value is None:
        return Code("0.0")
    if value.rank != 1:
        return value
    axis = op.axis(1) % op[0].rank
    return Code("{}.view({})", value, tuple(-1 if place == axis else 1 for place in range(op[0].rank)))


def _refuse_blocks(op: Op) -> None:
    if op.attribute("block_size", 0):
        raise Unsupported("blocks of an activation have no PyTorch counterpart")


@rule("QuantizeLinear")
@rule("QuantizeLinear", domain="com.microsoft")
def quantize_linear(op: Op) -> Code:
    """Round to the integers of a scale, as floats; gradients pass where the numbers lie inside their range."""
    _refuse_blocks(op)
    if "range" not in op.attributes:
        raise Unsupported("a scale or zero point that is computed, and float8, have no PyTorch counterpart")
    source = op[0] if op[0].known is None else Code("torch.tensor({}, device={})", op[0], DEVICE)
    return Code("quantize({}, {}, {}, {}, {})", source, _along(op, op[1]), _along(op, op[2]), *op.attribute("range"))


@rule("DequantizeLinear")
@rule("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(op: Op) -> Code:
    """Give integers their zero point and scale back."""
    _refuse_blocks(op)
    source = op[0] if op[0].dtype.is_floating_point else Code("{}.to({})", op[0], op[1].dtype)
    if op[2] is None or op[2].scalar == 0:
        return Code("({} * {})", source, _along(op, op[1]))
    return Code("(({} - {}) * {})", source, _along(op, op[2]), _along(op, op[1]))


rows({"Hold": "held({}, {})"}, IDIOMS)


@rule("DynamicQuantizeLinear")
def dynamic_quantize_linear(op: Op) -> Code:
    return Code("quantize_dynamically({})", op[0])


@rule("MatMulInteger")
def matmul_integer(op: Op) -> Code:
    """Multiply integers held as floats: exact up to 2 ** 24, rounded as floats are beyond."""
    parts = []
    for slot in (0, 1):
        part = op[slot] if op[slot].dtype.is_floating_point else Code("{}.to({})", op[slot], torch.float32)
        zero = op[slot + 2]
        if slot == 0 and zero is not None and zero.dims not in ((), (1,)):
            raise Unsupported("a zero point per row has no PyTorch counterpart")
        parts.append(part if zero is None else Code("({} - {})", part, zero))
    return Code("({} @ {})", *parts)


@rule("ConvInteger")
@rule("MatMulNBits", "GatherBlockQuantized", domain="com.microsoft")
def unfolded(op: Op) -> Code:
    raise Unsupported("a weight, scale or zero point that is computed, or g_idx, has no PyTorch counterpart")
