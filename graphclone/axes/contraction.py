"""Axis rules of operators that sum products over an axis: MatMul, Gemm, Einsum, convolutions."""

from graphclone.axes.reductions import pooled_sizes
from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.op import Op


def matmul(op: Op) -> str:
    """Contract the last axis of the first with the one before the last of the second."""
    first = "k" if op.rank(0) == 1 else "... m k"
    second = "k" if op.rank(1) == 1 else "... k n"
    output = f"... {'m' if op.rank(0) > 1 else ''} {'n' if op.rank(1) > 1 else ''}"
    return f"{first}, {second} -> {output}"


def fused_matmul(op: Op) -> str | None:
    """MatMul whose operands may be transposed."""
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        return None
    first = "... k m" if op.attribute("transA", 0) else "... m k"
    second = "... n k" if op.attribute("transB", 0) else "... k n"
    return f"{first}, {second} -> ... m n"


def gemm(op: Op) -> str:
    """Matrix product plus a bias that broadcasts."""
    first = "k m" if op.attribute("transA", 0) else "m k"
    second = "n k" if op.attribute("transB", 0) else "k n"
    bias = "."
    if op.has(2) and op.axes[2] is not None:
        bias = " ".join(["m?", "n?"][2 - op.rank(2) :])
    return f"{first}, {second}, {bias} -> m n"


def einsum(op: Op) -> str:
    """The equation, with a letter an axis."""
    left, arrow, right = str(op.attribute("equation")).replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        flat = "".join(inputs).replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))

    def spaced(term: str) -> str:
        return " ".join("..." if c == "@" else c for c in term.replace("...", "@"))

    return f"{', '.join(map(spaced, inputs))} -> {spaced(right)}"


def convolution(op: Op) -> Typing:
    """Channels in groups; the spatial axes and the kernel are fixed, unless it mixes channels place by place."""
    groups = int(op.attribute("group", 1))
    spatial, window, outs, sizes = _places(op)
    if groups == 1:
        output = f"b m {outs}"
        return Typing(f"b c {spatial}, m c {window}, m{_added(op, output)} -> {output}", sizes, fixed=tuple(sizes))
    output = f"b (g m) {outs}"
    text = f"b (g c) {spatial}, (g m) c {window}, (g m){_added(op, output)} -> {output}"
    return Typing(text, {**sizes, "g": (groups,)}, (Store("group", "g"),), fixed=tuple(sizes))


def _places(op: Op) -> tuple[str, str, str, dict]:
    """Return the patterns of the spatial axes, of the kernel's and of the output's, and sizes where those are fixed."""
    outs = letters(op.rank(0) - 2, "o")
    kernel = [size[0] for size in op.sizes(1)[2:]]
    window = " ".join("_" for _ in outs)
    if _is_pointwise(op, kernel):
        return " ".join(outs), window, " ".join(outs), {}
    return window, window, " ".join(outs), dict(zip(outs, pooled_sizes(op, op.sizes(0)[2:], kernel), strict=False))


def _added(op: Op, output: str) -> str:
    """Return the pattern of what a convolution adds to its result, where onnxruntime has fused a sum with it."""
    return f", {output}" if op.domain and op.has(3) else ""


def _is_pointwise(op: Op, kernel: list[int]) -> bool:
    """Tell whether a convolution sees one place at a time and skips none (a linear operator, talking heads, gMLP)."""
    steps = [*kernel, *op.attribute("strides", [])]
    return all(step == 1 for step in steps) and not any(op.attribute("pads", []))


def transposed_convolution(op: Op) -> Typing | None:
    """Channels in groups, the input's first in the weight; the spatial axes and the kernel are fixed."""
    if "output_shape" in op.node.attrs:
        return None
    groups = int(op.attribute("group", 1))
    outs = letters(op.rank(0) - 2, "o")
    sizes = dict(zip(outs, _spread_sizes(op), strict=False))
    fixed, spatial = " ".join("_" for _ in outs), " ".join(outs)
    if groups == 1:
        return Typing(f"b c {fixed}, c m {fixed}, m -> b m {spatial}", sizes, fixed=tuple(outs))
    text = f"b (g c) {fixed}, (g c) m {fixed}, (g m) -> b (g m) {spatial}"
    return Typing(text, {**sizes, "g": (groups,)}, (Store("group", "g"),), fixed=tuple(outs))


def _spread_sizes(op: Op) -> list:
    """Return the spatial output sizes of a transposed convolution."""
    rank = op.rank(0) - 2
    kernel = [size[0] for size in op.sizes(1)[2:]]
    strides = op.attribute("strides", [1] * rank)
    dilations = op.attribute("dilations", [1] * rank)
    extra = op.attribute("output_padding", [0] * rank)
    pads = op.attribute("pads", [0] * (2 * rank))
    same = op.attribute("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")

    def one(size: int, i: int) -> int:
        if same:
            return size * strides[i]
        return strides[i] * (size - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[i + rank]

    return [tuple(one(entry, i) for entry in size) for i, size in enumerate(op.sizes(0)[2:])]


BLOCK = 16  # channels that onnxruntime stores side by side: 8 or 16, by what the processor has


def blocked_convolution(op: Op) -> Typing | None:
    """com.microsoft.nchwc.Conv, as onnxruntime saves it: whole blocks of output channels lie together in the weight.

    Input channels do not: within a block of output channels lie all blocks of input channels, one behind the other.
    """
    outputs = op.sizes(1)[0][0]
    groups = int(op.attribute("group", 1))
    if groups not in (1, outputs) or outputs % BLOCK:
        return None
    spatial, window, outs, sizes = _places(op)
    output = f"b (m z) {outs}"
    rest = f"(m z){_added(op, output)} -> {output}"
    blocks, fixed = {**sizes, "m": (outputs // BLOCK,), "z": (BLOCK,)}, (*sizes, "z")
    if groups > 1:
        return Typing(f"b (m z) {spatial}, (m z) _ {window}, {rest}", blocks, (Store("group", "(m z)"),), fixed)
    return Typing(f"b c {spatial}, (m z) c {window}, {rest}", blocks, fixed=(*fixed, "c"))


def reorder_input(op: Op) -> Typing:
    """com.microsoft.nchwc.ReorderInput: channels side by side, first or last, become channels in whole blocks."""
    axis = 3 if int(op.attribute("channels_last", 0)) else 1
    data = "b h w c" if axis == 3 else "b c h w"
    channels = op.sizes(0)[axis][0]
    if channels % BLOCK:  # the last block is filled up
        return Typing(f"{data} -> b d h w", {"d": (channels + -channels % BLOCK,)}, fixed=("c", "d"))
    return Typing(f"{data} -> b c h w")


def reorder_output(op: Op) -> Typing:
    """com.microsoft.nchwc.ReorderOutput: channels in blocks become channels side by side, first or last."""
    output = "b h w c" if int(op.attribute("channels_last", 0)) else "b c h w"
    channels = int(op.attribute("channels"))
    if op.sizes(0)[1] != (channels,) * 2:  # the last block was filled up
        return Typing(f"b _ h w -> {output}", {"c": (channels,)}, fixed=("c",))
    return Typing(f"b c h w -> {output}", stores=(Store("channels", "c"),))


rule("Conv", blocked_convolution, domain="com.microsoft.nchwc")
rule("ReorderInput", reorder_input, domain="com.microsoft.nchwc")
rule("ReorderOutput", reorder_output, domain="com.microsoft.nchwc")
rule("MatMul", matmul)
rule("Gemm", gemm)
rule("Einsum", einsum)
rule("Conv", convolution)
rule("ConvTranspose", transposed_convolution)
rule("FusedMatMul", fused_matmul, domain="com.microsoft")
rule(["FusedGemm"], gemm, domain="com.microsoft")
rule("FusedConv", convolution, domain="com.microsoft")
