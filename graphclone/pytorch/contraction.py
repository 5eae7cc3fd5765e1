"""PyTorch rules of products of matrices and convolutions."""

from graphclone.pytorch.code import Code
from graphclone.pytorch.program import Op, Unsupported, Value
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


ACTIVATIONS = {"": "{}", "Relu": "F.relu({})", "Sigmoid": "torch.sigmoid({})", "Tanh": "torch.tanh({})"}


@rule("FusedGemm", domain="com.microsoft")
def fused_gemm(op: Op) -> Code:
    activation = op.attribute("activation", "")
    activation = activation.decode() if isinstance(activation, bytes) else activation
    if activation not in ACTIVATIONS:
        raise Unsupported(f"activation {activation!r} has no rule here")
    return Code(ACTIVATIONS[activation], gemm(op))


@rule("FusedMatMul", domain="com.microsoft")
def fused_matmul(op: Op) -> Code:
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        raise Unsupported("transBatchA and transBatchB have no PyTorch counterpart")
    left = Code("{}.mT", op[0]) if op.attribute("transA", 0) else op[0]
    right = Code("{}.mT", op[1]) if op.attribute("transB", 0) else op[1]
    return scaled(Code("({} @ {})", left, right), float(op.attribute("alpha", 1.0)))


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


def padded(value: Value, before: tuple, after: tuple, fill: str = "0.0") -> Code:
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
    rank, strides, dilations = _window(op)
    before, after = padding(op, tuple(op[1].dims[2:]), strides, dilations)
    if before != after or op.attribute("output_shape"):
        raise Unsupported("asymmetric pads and output_shape have no PyTorch counterpart")
    extra = tuple(op.attribute("output_padding") or (0,) * rank)
    return Code(
        f"F.conv_transpose{rank}d({{}}, {{}}, {{}}, stride={{}}, padding={{}}, "
        "output_padding={}, groups={}, dilation={})",
        op[0],
        op[1],
        op[2],
        strides,
        before,
        extra,
        int(op.attribute("group", 1)),
        dilations,
    )


@rule("MaxPool", "AveragePool")
def pool(op: Op) -> Code:
    rank, strides, dilations = _window(op)
    kernel = tuple(op.attribute("kernel_shape"))
    before, after = padding(op, kernel, strides, dilations)
    ceil = bool(op.attribute("ceil_mode", 0))
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
    if before != after:
        raise Unsupported("asymmetric pads have no PyTorch counterpart")
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
    place = axis % op[0].rank
    return Code("fourier({}, {}, {}, {}, {})", op[0], place, length[0] if length else None, inverse, onesided)
