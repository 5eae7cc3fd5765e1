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


def fused_matmul(op: Op) -> str:
    """MatMul whose operands may be transposed."""
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
    """Channels in groups; the spatial axes and the kernel are fixed."""
    rank = op.rank(0) - 2
    groups = int(op.attribute("group", 1))
    kernel = [size[0] for size in op.sizes(1)[2:]]
    outs = letters(rank, "o")
    sizes = dict(zip(outs, pooled_sizes(op, op.sizes(0)[2:], kernel)))
    spatial, window = " ".join("_" for _ in outs), " ".join("_" for _ in outs)
    if groups == 1:
        text = f"b c {spatial}, m c {window}, m -> b m {' '.join(outs)}"
        return Typing(text, sizes, fixed=tuple(outs))
    text = f"b (g c) {spatial}, (g m) c {window}, (g m) -> b (g m) {' '.join(outs)}"
    return Typing(text, {**sizes, "g": (groups,)}, (Store("group", "g"),), fixed=tuple(outs))


def transposed_convolution(op: Op) -> Typing | None:
    rank = op.rank(0) - 2
    if int(op.attribute("group", 1)) != 1 or "output_shape" in op.node.attrs:
        return None
    kernel = [size[0] for size in op.sizes(1)[2:]]
    strides = op.attribute("strides", [1] * rank)
    dilations = op.attribute("dilations", [1] * rank)
    extra = op.attribute("output_padding", [0] * rank)
    pads = op.attribute("pads", [0] * (2 * rank))
    outs = letters(rank, "o")
    sizes = {
        name: tuple(
            strides[i] * (entry - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[i + rank]
            for entry in op.sizes(0)[2 + i]
        )
        for i, name in enumerate(outs)
    }
    fixed = " ".join("_" for _ in outs)
    return Typing(f"b c {fixed}, c m {fixed}, m -> b m {' '.join(outs)}", sizes, fixed=tuple(outs))


rule("MatMul", matmul)
rule("Gemm", gemm)
rule("Einsum", einsum)
rule("Conv", convolution)
rule("ConvTranspose", transposed_convolution)
rule("FusedMatMul", fused_matmul, domain="com.microsoft")
rule(["FusedGemm"], gemm, domain="com.microsoft")
rule(["FusedConv", "NhwcFusedConv"], convolution, domain="com.microsoft")
