"""PyTorch rules of products of matrices and convolutions."""

from collections.abc import Sequence

from graphclone.pytorch.code import Code
from graphclone.pytorch.known import shortest
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.reduction import only_first
from graphclone.pytorch.registry import rows, rule

rows({"MatMul": "({} @ {})"})


@rule("Gemm")
def gemm(op: Op) -> Code:
    left = Code("{}.t()", op[0]) if op.attribute("transA", 0) else op[0]
    right = Code("{}.t()", op[1]) if op.attribute("transB", 0) else op[1]
    alpha, beta = float(op.attribute("alpha", 1.0)), float(op.attribute("beta", 1.0))
    if op[2] is None:
        return scaled(Code("({} @ {})", left, right), alpha)
    if alpha == beta == 1.0:
        return Code("torch.addmm({}, {}, {})", op[2], left, right)
    return Code("torch.addmm({}, {}, {}, beta={}, alpha={})", op[2], left, right, beta, alpha)


ACTIVATIONS = {
    "": "{}",
    "Relu": "F.relu({})",
    "Sigmoid": "torch.sigmoid({})",
    "Tanh": "torch.tanh({})",
    "LeakyRelu": "F.leaky_relu({}, {})",
    "Clip": "torch.clamp({}, {}, {})",
    "HardSigmoid": "torch.clamp({1} * {0} + {2}, 0.0, 1.0)",
}
"""What fused operators end with, over the result and the activation's own numbers."""


@rule("FusedGemm", domain="com.microsoft")
def fused_gemm(op: Op) -> Code:
    given = [op.attribute(f"activation_{name}") for name in ("alpha", "beta")]
    return _activated(op, gemm(op), [each for each in given if each is not None])


@rule("FusedConv", domain="com.microsoft")
def fused_conv(op: Op) -> Code:
    """Convolve, add the fourth input where there is one, and activate."""
    result = conv(op) if op[3] is None else Code("({} + {})", conv(op), op[3])
    return _activated(op, result, op.attribute("activation_params", ()))


def _activated(op: Op, result: Code, given: Sequence[float]) -> Code:
    activation = op.attribute("activation", "")
    if activation not in ACTIVATIONS:
        raise Unsupported(f"activation {activation!r} has no rule here")
    return Code(ACTIVATIONS[activation], result, *(shortest(each) for each in given))


@rule("FusedMatMul", domain="com.microsoft")
def fused_matmul(op: Op) -> Code:
    """Multiply matrices; transBatch means that the rows are the first axis, before those of the batch."""
    operands = []
    for each, letter in zip(op.inputs, "AB", strict=True):
        each = Code("{}.movedim(0, -2)", each) if op.attribute(f"transBatch{letter}", 0) else each
        operands.append(Code("{}.mT", each) if op.attribute(f"trans{letter}", 0) else each)
    return scaled(Code("({} @ {})", *operands), float(op.attribute("alpha", 1.0)))


def scaled(code: Code, factor: float) -> Code:
    return code if factor == 1.0 else Code("({} * {})", code, factor)


@rule("Einsum")
def einsum(op: Op) -> Code:
    equation = op.attribute("equation").replace(" ", "")
    if set(equation) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,->"):
        raise Unsupported("its equation holds characters that no equation has")
    return Code("torch.einsum({}" + ", {}" * len(op.inputs) + ")", equation, *op.inputs)


@rule("Linear", domain="graphclone")
def linear(op: Op) -> Code:
    """Apply a weight stored (out, in), or (in, out) where the framework keeps it so."""
    weight = Code("{}.t()", op[1]) if op.attribute("transposed", False) else op[1]
    if op[2] is None:
        return Code("F.linear({}, {})", op[0], weight)
    return Code("F.linear({}, {}, {})", op[0], weight, op[2])


def _window(op: Op) -> tuple:
    rank = op[0].rank - 2
    strides = tuple(op.attribute("strides") or (1,) * rank)
    dilations = tuple(op.attribute("dilations") or (1,) * rank)
    return rank, strides, dilations


def padding(op: Op, kernel: tuple[int, ...], strides: tuple, dilations: tuple) -> tuple[tuple, tuple]:
    """Return the padding of each spatial axis before and after it."""
    rank = len(kernel)
    mode = op.attribute("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = op.attribute("pads") or (0,) * 2 * rank
        return tuple(pads[:rank]), tuple(pads[rank:])
    if mode == "VALID":
        return (0,) * rank, (0,) * rank
    before, after = [], []
    for size, window, stride, dilation in zip(op[0].dims[2:], kernel, strides, dilations, strict=True):
        spread = (window - 1) * dilation + 1
        if stride == 1:
            total = spread - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + spread - size, 0)
        else:
            raise Unsupported(f"auto_pad={mode} with a stride needs a fixed image size")
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return tuple(before), tuple(after)


def padded(value: Value | Code, before: tuple, after: tuple, fill: str = "0.0") -> Code:
    """Return the value padded over its last axes."""
    pads = tuple(entry for pair in zip(before[::-1], after[::-1], strict=True) for entry in pair)
    return Code("F.pad({}, {}, value=" + fill + ")", value, pads)


@rule("Conv")
def conv(op: Op) -> Code:
    rank, strides, dilations = _window(op)
    kernel = tuple(op[1].dims[2:])
    before, after = padding(op, kernel, strides, dilations)
    source = op[0]
    if before != after:
        source, before = padded(op[0], before, after), (0,) * rank
    group = int(op.attribute("group", 1))
    return Code(
        f"F.conv{rank}d({{}}, {{}}, {{}}, stride={{}}, padding={{}}, dilation={{}}, groups={{}})",
        source,
        op[1],
        op[2],
        strides,
        before,
        dilations,
        group,
    )


@rule("ConvTranspose")
def conv_transpose(op: Op) -> Code:
    """Convolve backwards; pads that differ cut the whole result."""
    rank, strides, dilations = _window(op)
    extra = tuple(op.attribute("output_padding") or (0,) * rank)
    before, after = _cropping(op, strides, dilations, extra)
    result = Code(
        f"F.conv_transpose{rank}d({{}}, {{}}, {{}}, stride={{}}, padding={{}}, "
        "output_padding={}, groups={}, dilation={})",
        op[0],
        op[1],
        op[2],
        strides,
        before if before == after else (0,) * rank,
        extra,
        int(op.attribute("group", 1)),
        dilations,
    )
    return result if before == after else padded(result, *(tuple(-each for each in side) for side in (before, after)))


def _cropping(op: Op, strides: tuple, dilations: tuple, extra: tuple) -> tuple[tuple, tuple]:
    """Return what a ConvTranspose cuts off before and after each spatial axis."""
    mode, wanted = op.attribute("auto_pad", "NOTSET"), op.attribute("output_shape")
    rank, kernel = len(strides), op[1].dims[2:]
    if mode == "VALID":
        return (0,) * rank, (0,) * rank
    if not wanted and mode in ("NOTSET", ""):
        pads = tuple(op.attribute("pads") or (0,) * 2 * rank)
        return pads[:rank], pads[rank:]
    before, after = [], []
    for axis, size in enumerate(op[0].dims[2:]):
        whole = (size - 1) * strides[axis] + extra[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        total = whole - (wanted[axis - rank] if wanted else size * strides[axis])
        if not isinstance(total, int) or total < 0:
            raise Unsupported("output_shape needs an image of fixed size and no less than is computed")
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return tuple(before), tuple(after)


@rule("MaxPool", "AveragePool")
def pool(op: Op) -> Code:
    rank, strides, dilations = _window(op)
    kernel = tuple(op.attribute("kernel_shape"))
    before, after = padding(op, kernel, strides, dilations)
    ceil = bool(op.attribute("ceil_mode", 0))
    only_first(op)
    if op.type == "MaxPool":
        if before != after or any(p > k // 2 for p, k in zip(before, kernel, strict=True)):
            source, before = padded(op[0], before, after, 'float("-inf")'), (0,) * rank
        else:
            source = op[0]
        return Code(
            f"F.max_pool{rank}d({{}}, {{}}, stride={{}}, padding={{}}, dilation={{}}, ceil_mode={{}})",
            source,
            kernel,
            strides,
            before,
            dilations,
            ceil,
        )
    if before != after or any(each != 1 for each in dilations):
        raise Unsupported("pads that differ before and after, and dilations, have no PyTorch counterpart")
    return Code(
        f"F.avg_pool{rank}d({{}}, {{}}, stride={{}}, padding={{}}, ceil_mode={{}}, count_include_pad={{}})",
        op[0],
        kernel,
        strides,
        before,
        ceil,
        bool(op.attribute("count_include_pad", 0)),
    )


@rule("DFT")
def fourier(op: Op) -> Code:
    """Transform along an axis; the last axis holds real numbers, or complex ones as pairs."""
    axes = op.integers(2) if op.opset >= 20 else None
    axis = axes[0] if axes else op.axis(1 if op.opset < 20 else -2)
    length = op.integers(1)
    inverse, onesided = bool(op.attribute("inverse", 0)), bool(op.attribute("onesided", 0))
    if inverse and onesided:
        raise Unsupported("a onesided inverse has no PyTorch counterpart")
    if onesided and op[0].dims[-1] == 2:
        raise Unsupported("one side of complex numbers has no PyTorch counterpart")
    place = axis % op[0].rank
    return Code("fourier({}, {}, {}, {}, {})", op[0], place, length[0] if length else None, inverse, onesided)
