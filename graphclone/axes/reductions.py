"""Axis rules of reductions, poolings and normalisations: operators that take statistics over axes."""

from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.op import Op

REDUCTIONS = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare""".split()


def reduction(op: Op) -> str | None:
    """Reduce over the listed axes, all of them when none is listed."""
    rank = op.rank(0)
    axes = op.integers("axes", 1) if "axes" in op.node.attrs or op.has(1) else []
    if axes is None:
        return None
    if not axes:
        axes = [] if op.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return _reduced(letters(rank), {axis % rank for axis in axes if rank}, bool(op.attribute("keepdims", 1)))


def _reduced(names: list[str], axes: set[int], keep: bool) -> str:
    inputs = [f"~{name}" if i in axes else name for i, name in enumerate(names)]
    outputs = ["1" if i in axes else name for i, name in enumerate(names) if keep or i not in axes]
    return f"{' '.join(inputs)}, . -> {' '.join(outputs)}"


def argument(op: Op) -> Typing:
    """ArgMax and ArgMin: the output's values are positions on the reduced axis."""
    axis = op.axis(op.rank(0))
    names = letters(op.rank(0))
    return Typing(_reduced(names, {axis}, bool(op.attribute("keepdims", 1))), yields={0: names[axis]})


def softmax(op: Op) -> str:
    """Normalise over one axis; before opset 13 over every axis from it on."""
    rank = op.rank(0)
    old = op.opset < 13
    axis = op.axis(rank, 1 if old else -1)
    names = letters(rank)
    over = range(axis, rank) if old else [axis]
    inputs = [f"~{name}" if i in over else name for i, name in enumerate(names)]
    return f"{' '.join(inputs)} -> {' '.join(names)}"


def global_pool(op: Op) -> str:
    """Reduce every axis behind the channels."""
    spatial = letters(op.rank(0) - 2, "s")
    return f"b c {' '.join('~' + s for s in spatial)} -> b c {' '.join('1' for _ in spatial)}"


def pool(op: Op) -> Typing:
    """Slide a window over the spatial axes, which it fixes; positions that MaxPool gives count through all axes."""
    rank = op.rank(0) - 2
    sizes = pooled_sizes(op, op.sizes(0)[2:], [int(k) for k in op.attribute("kernel_shape")])
    outs = letters(rank, "o")
    outputs = f"b c {' '.join(outs)}"
    fixed = (*outs, "c") if op.wants(1) else tuple(outs)
    return Typing(
        f"b c {' '.join('_' for _ in outs)} -> {outputs}, {outputs}", dict(zip(outs, sizes, strict=False)), fixed=fixed
    )


def pooled_sizes(op: Op, sizes: list, kernel: list[int]) -> list:
    """Return the spatial output sizes of a convolution or pooling."""
    rank = len(kernel)
    strides = op.attribute("strides", [1] * rank)
    dilations = op.attribute("dilations", [1] * rank)
    pads = op.attribute("pads", [0] * (2 * rank))
    mode = op.attribute("auto_pad", "NOTSET")
    ceil = op.attribute("ceil_mode", 0)

    def one(size: int, i: int) -> int:
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            return -(-size // strides[i])
        padding = 0 if mode == "VALID" else pads[i] + pads[i + rank]
        span = size + padding - dilations[i] * (kernel[i] - 1) - 1
        return (-(-span // strides[i]) if ceil else span // strides[i]) + 1

    return [tuple(max(0, one(entry, i)) for entry in size) for i, size in enumerate(sizes)]


def layer_normalization(op: Op) -> str:
    """Normalise over the axes from `axis` on, then scale and shift along them."""
    rank = op.rank(0)
    axis = op.axis(rank, -1)
    lead, tail = letters(axis, "a"), letters(rank - axis, "d")
    over = " ".join("~" + name for name in tail)
    scale, shift = (" ".join(_broadcast(op, slot, lead, tail)) for slot in (1, 2))
    statistic = " ".join(lead + ["1"] * len(tail))
    return f"{' '.join(lead)} {over}, {scale}, {shift} -> {' '.join(lead + tail)}, {statistic}, {statistic}"


def _broadcast(op: Op, slot: int, lead: list[str], tail: list[str]) -> list[str]:
    """Return the axes of a weight: those it normalises over, or of another rank, which broadcasts."""
    known = op.has(slot) and op.axes[slot] is not None
    if not known or op.rank(slot) == len(tail):
        return tail
    return [name + "?" for name in (lead + tail)[len(lead) + len(tail) - op.rank(slot) :]]


def scale_matching(op: Op) -> str:
    """Weights of fewer axes than the normalised ones broadcast (RMSNormalization, SimplifiedLayerNormalization)."""
    rank = op.rank(0)
    axis = op.axis(rank, -1)
    lead, tail = letters(axis, "a"), letters(rank - axis, "d")
    weights = (lead + tail)[rank - op.rank(1) :] if op.has(1) and op.axes[1] is not None else tail
    over = " ".join("~" + name for name in tail)
    marked = " ".join(name + "?" for name in weights)
    return (
        f"{' '.join(lead)} {over}, {marked}, {marked} -> {' '.join(lead + tail)}, {' '.join(lead + ['1'] * len(tail))}"
    )


def channels(op: Op) -> str:
    """Per-channel weights; BatchNormalization and InstanceNormalization."""
    spatial = letters(op.rank(0) - 2, "s")
    mark = "~" if op.type == "InstanceNormalization" else ""
    over = " ".join(mark + s for s in spatial)
    weights = ", ".join(["c"] * (len(op.node.inputs) - 1))
    outputs = ", ".join(["b c " + " ".join(spatial)] + ["c"] * (op.output_count - 1))
    return f"b c {over}, {weights} -> {outputs}"


def group_normalization(op: Op) -> Typing:
    """Channels in groups; opset 18 scales per group, later ones per channel."""
    groups = int(op.attribute("num_groups"))
    spatial = letters(op.rank(0) - 2, "s")
    weights = "g" if op.opset < 21 and op.sizes(1)[0][0] == groups else "(g c)"
    over = " ".join("~" + s for s in spatial)
    text = f"b (g ~c) {over}, {weights}, {weights} -> b (g c) {' '.join(spatial)}"
    return Typing(text, {"g": (groups,)}, (Store("num_groups", "g"),))


def lp_normalization(op: Op) -> str:
    """Divide by the norm along one axis."""
    names = letters(op.rank(0))
    axis = op.axis(op.rank(0), -1)
    return " ".join("~" + n if i == axis else n for i, n in enumerate(names)) + " -> " + " ".join(names)


def mean_variance(op: Op) -> str:
    names = letters(op.rank(0))
    axes = {int(a) % op.rank(0) for a in op.attribute("axes", [0, 2, 3])}
    return " ".join("~" + n if i in axes else n for i, n in enumerate(names)) + " -> " + " ".join(names)


rule(REDUCTIONS, reduction)
rule(["ArgMax", "ArgMin"], argument)
rule(["Softmax", "LogSoftmax", "Hardmax"], softmax)
rule(["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"], global_pool)
rule(["AveragePool", "MaxPool", "LpPool"], pool)
rule(["GlobalAveragePool", "GlobalMaxPool"], global_pool, domain="com.microsoft.nchwc")
rule(["AveragePool", "MaxPool"], pool, domain="com.microsoft.nchwc")
rule("LayerNormalization", layer_normalization)
rule(["RMSNormalization", "SimplifiedLayerNormalization"], scale_matching)
rule(["BatchNormalization", "InstanceNormalization"], channels)
rule("GroupNormalization", group_normalization)
rule("LpNormalization", lp_normalization)
rule("MeanVarianceNormalization", mean_variance)
