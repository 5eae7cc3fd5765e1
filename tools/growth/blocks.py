"""Blocks: where their norms and sums are, branches around the FFN, detours of the stream behind them."""

import numpy as np
from onnx import TensorProto, helper

from growth.attention import write_attention
from growth.feed_forward import write_feed_forward
from growth.norms import norm
from growth.recipe import Block, FeedForward
from growth.writer import Writer


def write_block(w: Writer, x: str, block: Block) -> str:
    attend = (lambda y: write_attention(w, y, block.attention)) if block.attention else (lambda y: y)
    feed = lambda y: _branch(w, y, block)  # noqa: E731
    if block.placement == "parallel" and block.attention:
        y = norm(w, x, "norm")
        x = w.op("Add", w.op("Add", attend(y), feed(y)), x)
    elif block.placement == "post":
        x = norm(w, w.op("Add", x, attend(x)), "norm_0") if block.attention else x
        x = norm(w, w.op("Add", feed(x), x), "norm_1")
    elif block.placement == "sandwich":
        x = w.op("Add", x, norm(w, attend(norm(w, x, "norm_0")), "norm_1")) if block.attention else x
        x = w.op("Add", x, norm(w, feed(norm(w, x, "norm_2")), "norm_3"))
    else:
        x = w.op("Add", x, attend(norm(w, x, "norm_0"))) if block.attention else x
        x = w.op("Add", x, feed(norm(w, x, "norm_1")))
    return _detour(w, x, block.detour)


def _branch(w: Writer, x: str, block: Block) -> str:
    """Run the FFN, perhaps in a branch that the length of the sequence decides."""
    if block.branch == "none":
        return write_feed_forward(w, x, block.ffn, "")
    long = w.op("Greater", w.op("Squeeze", w.size(x, 1), w.number(0)), w.number(6, flat=False))
    bodies = []
    for name in ("then_branch", "else_branch"):
        with w.body() as nodes:
            if name == "then_branch":
                y = write_feed_forward(w, x, block.ffn, "")
            else:
                y = w.op("Identity", x) if block.branch == "skip" else write_feed_forward(w, x, FeedForward(), "else_")
        bodies.append(
            helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(y, TensorProto.FLOAT, [None] * 3)])
        )
    return w.op("If", long, then_branch=bodies[0], else_branch=bodies[1])


def _detour(w: Writer, x: str, kind: str) -> str:
    width = w.recipe.hidden
    if kind == "halves":
        first, second = w.parts(x, [width // 2, width - width // 2])
        return w.op("Concat", first, second, axis=-1)
    if kind == "weighted_half":
        first, second = w.parts(x, [width // 2, width - width // 2])
        first = w.op("Mul", first, w.weight("half", width // 2, free=[0]))
        return w.op("Concat", first, second, axis=2)
    if kind == "flat":
        return w.reshape(w.op("Tanh", w.op("Reshape", x, w.number(-1, width))), x, ["B", "S", width])
    if kind == "transposed":
        return w.transpose(w.transpose(x, 2, 0, 1), 1, 2, 0)
    if kind == "padded":
        wide = w.op("Pad", x, w.number(0, 1, 0, 0, 0, 0))
        return w.op("Slice", wide, w.number(1), w.number(np.iinfo(np.int64).max), w.number(1))
    if kind == "scaled":
        return w.op("Mul", x, w.weight("layer_scale", width, middle=1.0, free=[0]))
    return x
