"""Axis rules of numbers of few bits: quantizing, dequantizing, and operators that compute with them.

Scales and zero points are scalars or lie along an axis, which they are cut with. Where a run of entries shares one
scale, the run stays together: the axis is cut in whole blocks.
"""

from dataclasses import replace

import numpy as np

from graphclone.axes.contraction import convolution
from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.op import Op


def _is_single(op: Op, slot: int) -> bool:
    return op.rank(slot) == 0 or op.sizes(slot) == [(1, 1)]


def _per(op: Op, slot: int, name: str) -> str:
    """Name the axis of a scale or zero point; a single one has none."""
    return "." if not op.has(slot) or op.axes[slot] is None or _is_single(op, slot) else name


def quantize(op: Op) -> Typing | str | None:
    """Scales and zero points are scalars, lie along one axis, or serve blocks of it."""
    names = letters(op.rank(0))
    tensor = " ".join(names)
    if _is_single(op, 1):
        return f"{tensor}, ., . -> {tensor}"
    axis = min(op.axis(op.rank(0), 1), op.rank(0) - 1)  # a vector's scales lie along it, whatever the default says
    if op.rank(1) == 1:
        return f"{tensor}, {names[axis]}, {names[axis]} -> {tensor}"
    block = int(op.attribute("block_size", 0))
    if not block or op.sizes(0)[axis] != (block * op.sizes(1)[axis][0],) * 2:
        scale = " ".join("_" if i == axis else name for i, name in enumerate(names))
        return Typing(f"{tensor}, {scale}, {scale} -> {tensor}", fixed=(names[axis],))
    whole = " ".join(f"({name} z)" if i == axis else name for i, name in enumerate(names))
    return Typing(f"{whole}, {tensor}, {tensor} -> {whole}", {"z": (block,)}, fixed=("z",))


def matmul_integer(op: Op) -> str:
    """MatMul of quantized inputs; zero points per tensor, per row or per column, of each matrix apart or of all."""

    def per(slot: int, name: str, apart: str) -> str:
        rank = len(op.axes[slot] or ()) if op.has(slot) else 0
        return "." if not rank else f"{name}?" if rank == 1 else apart

    left, right = per(2, "m", "... m? 1"), per(3, "n", "... 1 n?")
    return f"... m k, ... k n, {left}, {right} -> ... m n"


def qlinear_matmul(op: Op) -> str:
    inputs = ["... m k", _per(op, 1, "m"), _per(op, 2, "m"), "... k n", _per(op, 4, "n"), _per(op, 5, "n"), ".", "."]
    return f"{', '.join(inputs)} -> ... m n"


def matmul_to_float(op: Op) -> str:
    """Integers times integers, and their scales: MatMulIntegerToFloat, DynamicQuantizeMatMul."""
    if op.type == "DynamicQuantizeMatMul":
        return f"... m k, ... k n, {_per(op, 2, 'n')}, {_per(op, 3, 'n')}, n -> ... m n"
    slots = [_per(op, slot, name) for slot, name in ((2, "m"), (3, "n"), (4, "m"), (5, "n"))]
    return f"... m k, ... k n, {', '.join(slots)}, n -> ... m n"


def quantized_gemm(op: Op) -> str:
    """com.microsoft.QGemm: each operand with its scale and zero point, then the bias and those of the output."""
    first = "k m" if op.attribute("transA", 0) else "m k"
    second = "n k" if op.attribute("transB", 0) else "k n"
    bias = " ".join(["m?", "n?"][2 - op.rank(6) :]) if op.has(6) and op.axes[6] is not None else "."
    return f"{first}, ., ., {second}, {_per(op, 4, 'n')}, {_per(op, 5, 'n')}, {bias}, ., . -> m n"


def quantized_convolution(op: Op) -> Typing:
    """Conv with scales and zero points behind each operand (QLinearConv), or zero points at the end (ConvInteger)."""
    weight = 3 if op.type == "QLinearConv" else 1
    plain = Op(op.node, op.opset, [op.axes[0], op.axes[weight]], [])
    typing = convolution(plain)
    left, _, output = typing.text.partition(" -> ")
    data, kernel, _ = left.split(", ")
    channel = kernel[: kernel.rindex(")") + 1] if kernel.startswith("(") else kernel.split()[0]
    scales = ", ".join(_per(op, slot, channel) for slot in ((4, 5) if weight == 3 else (3,)))
    inputs = f"{data}, ., ., {kernel}, {scales}, ., ., {channel}" if weight == 3 else f"{data}, {kernel}, ., {scales}"
    return replace(typing, text=f"{inputs} -> {output}")


def elementwise_quantized(count: int):
    """Return the rule of an operator on `count` tensors, each followed by its scale and zero point."""

    def signature(op: Op) -> str | None:
        slots = [slot for number in range(count) for slot in (3 * number + 1, 3 * number + 2)]
        if any(op.has(slot) and op.axes[slot] is not None and not _is_single(op, slot) for slot in slots):
            return None
        return f"{', '.join(['..., ., .'] * count)}, ., . -> ..."

    return signature


def quantized_softmax(op: Op) -> str:
    """Normalise over one axis, or as `Softmax` did before opset 13 over every axis from it on."""
    rank = op.rank(0)
    axis = op.axis(rank, -1)
    names = letters(rank)
    last = axis if int(op.attribute("opset", 13)) >= 13 else rank - 1
    over = " ".join(f"~{name}" if axis <= i <= last else name for i, name in enumerate(names))
    return f"{over}, ., ., ., . -> {' '.join(names)}"


def quantized_concat(op: Op) -> str:
    """Scale and zero point of the output, then each tensor with its own."""
    rank, count = op.rank(2), (len(op.node.inputs) - 2) // 3
    axis = op.axis(rank)
    names = letters(rank)

    def tensor(part: str) -> str:
        return " ".join(part if i == axis else name for i, name in enumerate(names))

    parts = [f"p{number}" for number in range(count)]
    inputs = ", ".join(f"{tensor(part)}, ., ." for part in parts)
    return f"., ., {inputs} -> {tensor('(' + ' + '.join(parts) + ')') if count > 1 else tensor(parts[0])}"


def blockwise_matmul(op: Op) -> Typing:
    """com.microsoft.MatMulNBits: rows of the weight in blocks with a scale each; zero points packed into bytes."""
    width, block, bits = (int(op.attribute(name, 4)) for name in ("K", "block_size", "bits"))
    blocks = op.sizes(1)[1][0]
    packed = op.has(3) and op.axes[3] is not None and _is_byte(op, 3)
    together = 8 // bits if packed else 1  # zero points that share a byte
    bias = "." if not op.has(5) or op.axes[5] is None else "n"
    zeros = op.has(3) and op.axes[3] is not None

    def per_block(slot: int, names: str) -> str:
        return f"n ({names})" if op.rank(slot) == 2 else f"(n {names})"

    if width != blocks * block or blocks % together or op.has(4):  # a short block, or rows in groups: they stay whole
        count = op.sizes(3)[-1][0] // (1 if op.rank(3) == 2 else op.sizes(1)[0][0]) if zeros else 1
        zero = per_block(3, "q") if zeros else "."
        text = f"... m k, n c _, {per_block(2, 'c')}, {zero}, ., {bias} -> ... m n"
        fixed = ("k", "c", "q") if zeros else ("k", "c")
        return Typing(text, {"c": (blocks,), "q": (count,)}, (Store("N", "n"),), fixed)
    zero = per_block(3, "c" if packed else "c t") if zeros else "."
    text = f"... m (c t z), n (c t) _, {per_block(2, 'c t')}, {zero}, ., {bias} -> ... m n"
    sizes = {"c": (blocks // together,), "t": (together,), "z": (block,)}
    return Typing(text, sizes, (Store("K", "(c t z)"), Store("N", "n")), ("t", "z"))


def blockwise_gather(op: Op) -> Typing | None:
    """com.microsoft.GatherBlockQuantized: rows of a table whose width is quantized in blocks, two to a byte or not."""
    if op.rank(0) != 2 or op.rank(2) != 2 or op.axis(2, 1, "quantize_axis") != 1 or op.axis(2, 0, "gather_axis") != 0:
        return None
    block, blocks = int(op.attribute("block_size", 128)), op.sizes(2)[1][0]
    packed = _is_byte(op, 0) and int(op.attribute("bits", 4)) == 4
    stored = block // 2 if packed else block
    if op.sizes(0)[1] != (blocks * stored,) * 2:
        return None
    ids = " ".join(letters(op.rank(1), "i"))
    zero = "." if not op.has(3) or op.axes[3] is None else "v _" if packed else "v c"
    fixed = ("z", "y", "c") if zero == "v _" else ("z", "y")
    text = f"v (c y), {ids}, v c, {zero} -> {ids} (c z)"
    return Typing(text, {"c": (blocks,), "z": (block,), "y": (stored,)}, fixed=fixed, indexes={1: "v"})


def _is_byte(op: Op, slot: int) -> bool:
    dtype = op.node.inputs[slot].dtype
    return dtype is not None and str(np.dtype(dtype)) in ("uint8", "int8")


def packed_quantized_attention(op: Op) -> Typing | None:
    """com.microsoft.QAttention: the projection inside, quantized; its scale per tensor or per output."""
    heads = int(op.attribute("num_heads"))
    if (op.has(8) and op.axes[8] is not None) or op.wants(1):
        return None
    width = op.sizes(1)[1][0] // 3
    packed = "((h d) + (h d) + (h d))"
    scale, zero = _per(op, 4, packed), _per(op, 7, packed)
    text = f"b s e, e {packed}, {packed}, ., {scale}, ., ., {zero} -> b s (h d)"
    return Typing(text, {"h": (heads,), "d": (width // heads,)}, (Store("num_heads", "h"),), ("d",))


UNARY = ["QLinearSigmoid", "QLinearLeakyRelu"]
BINARY = ["QLinearAdd", "QLinearMul"]

rule(["QuantizeLinear", "DequantizeLinear"], quantize)
rule(["QuantizeLinear", "DequantizeLinear"], quantize, domain="com.microsoft")
rule("DynamicQuantizeLinear", "... -> ..., , ")
rule("MatMulInteger", matmul_integer)
rule("QLinearMatMul", qlinear_matmul)
rule(["MatMulIntegerToFloat", "DynamicQuantizeMatMul"], matmul_to_float, domain="com.microsoft")
rule("QGemm", quantized_gemm, domain="com.microsoft")
rule(UNARY, elementwise_quantized(1), domain="com.microsoft")
rule(BINARY, elementwise_quantized(2), domain="com.microsoft")
rule(["QLinearConv", "ConvInteger"], quantized_convolution)
rule("QLinearWhere", "..., ..., ., ., ..., ., ., ., . -> ...", domain="com.microsoft")
rule("QLinearSoftmax", quantized_softmax, domain="com.microsoft")
rule("QLinearConcat", quantized_concat, domain="com.microsoft")
rule("MatMulNBits", blockwise_matmul, domain="com.microsoft")
rule("GatherBlockQuantized", blockwise_gather, domain="com.microsoft")
rule("QAttention", packed_quantized_attention, domain="com.microsoft")
