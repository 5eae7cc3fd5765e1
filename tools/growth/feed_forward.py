"""Feed-forward parts: gates, convolutions, experts, low ranks."""

from growth.layers import activate, linear
from growth.recipe import FeedForward
from growth.writer import Writer


def write_feed_forward(w: Writer, x: str, given: FeedForward, before: str) -> str:
    kind, width, inner = given.kind, w.recipe.hidden, w.recipe.ffn
    act = lambda y: activate(w, y, given.activation)  # noqa: E731
    up, down = f"{before}up", f"{before}down"
    if kind == "gated":
        gate = act(linear(w, x, f"{before}gate", width, inner, bias=False))
        return linear(w, w.op("Mul", gate, linear(w, x, up, width, inner)), down, inner, width)
    if kind == "gated_joint":
        gate, rest = w.parts(linear(w, x, up, width, 2 * inner), [inner, inner])
        return linear(w, w.op("Mul", rest, act(gate)), down, inner, width)
    if kind == "gated_pairs":
        pairs = w.reshape(linear(w, x, up, width, 2 * inner), x, ["B", "S", inner, 2])
        gate = w.op("Gather", pairs, w.number(0, flat=False), axis=3)
        rest = w.op("Gather", pairs, w.number(1, flat=False), axis=-1)
        return linear(w, w.op("Mul", act(gate), rest), down, inner, width)
    if kind == "gated_strided":
        y = linear(w, x, up, width, 2 * inner)
        gate, rest = (w.strided(y, start, 2 * inner) for start in (0, 1))
        return linear(w, w.op("Mul", act(gate), rest), down, inner, width)
    if kind in ("pointwise", "depthwise"):
        return _convolved(w, x, before, kind, act)
    if kind in ("experts", "picked_experts"):
        return _experts(w, x, before, kind, act)
    if kind == "two_paths":
        one = act(linear(w, x, up, width, inner))
        two = w.op("Tanh", linear(w, x, f"{before}side", width, 5))
        return linear(w, w.op("Concat", one, two, axis=-1), down, inner + 5, width)
    if kind == "flat":
        flat = w.op("Reshape", x, w.number(-1, width))
        y = act(w.op("Gemm", flat, w.weight(up, width, inner, free=[0, 1]), w.weight(f"{up}_bias", inner)))
        y = w.op("Gemm", y, w.weight(down, width, inner, free=[0, 1]), transB=1)
        return w.reshape(y, x, ["B", "S", width])
    if kind == "low_rank":
        y = w.op("Add", linear(w, x, up, width, inner), _low_rank(w, x, before, width, inner))
        return linear(w, act(y), down, inner, width)
    return linear(w, act(linear(w, x, up, width, inner)), down, inner, width)


def _low_rank(w: Writer, x: str, before: str, width: int, inner: int) -> str:
    narrow = w.op("MatMul", x, w.weight(f"{before}narrow", width, 3, free=[0, 1]))
    return w.op("MatMul", narrow, w.weight(f"{before}wide", 3, inner, free=[0, 1]))


def _convolved(w: Writer, x: str, before: str, kind: str, act) -> str:
    width, inner = w.recipe.hidden, w.recipe.ffn
    turned = w.transpose(x, 0, 2, 1)
    y = w.op("Conv", turned, w.weight(f"{before}up", inner, width, 1, free=[0, 1]), kernel_shape=[1])
    if kind == "depthwise":
        kernel = w.weight(f"{before}deep", inner, 1, 3, free=[0])
        y = w.op("Conv", y, kernel, group=inner, kernel_shape=[3], pads=[1, 1])
    y = w.op("Conv", act(y), w.weight(f"{before}down", width, inner, 1, free=[0, 1]), kernel_shape=[1])
    return w.transpose(y, 0, 2, 1)


def _experts(w: Writer, x: str, before: str, kind: str, act) -> str:
    width, inner, count = w.recipe.hidden, w.recipe.ffn, 5
    scores = w.op("Softmax", linear(w, x, f"{before}router", width, count, bias=False), axis=-1)
    up = w.weight(f"{before}up", count, width, inner, free=[0, 1, 2])
    down = w.weight(f"{before}down", count, inner, width, free=[0, 1, 2])
    if kind == "experts":
        y = act(w.op("Einsum", x, up, equation="bsh,ehf->bsef"))
        y = w.op("Einsum", y, down, equation="bsef,efh->bseh")
        return w.reduce("ReduceSum", w.op("Mul", y, w.unsqueeze(scores, -1)), 2, keep=0)
    best, places = w.op("TopK", scores, w.number(2), count=2, axis=-1)
    y = w.op("MatMul", w.unsqueeze(x, 2, 3), w.op("Gather", up, places, axis=0))
    y = w.op("MatMul", act(y), w.op("Gather", down, places, axis=0))
    y = w.op("Mul", w.op("Squeeze", y, w.number(3)), w.unsqueeze(best, -1))
    return w.reduce("ReduceSum", y, 2, keep=0)
