"""Masks that are added to scores, or choose among them."""

import numpy as np
from onnx import TensorProto

from growth.writer import Writer, filled


def write_mask(w: Writer, x: str, kind: str, total: int) -> str:
    if kind == "none" or (kind == "padding" and w.recipe.entry == "image"):
        return ""
    if kind == "padding":
        given = w.graph_input("attention_mask", TensorProto.INT64, ["B", "S"])
        wide = w.op("Cast", w.unsqueeze(given, 1, 2), to=TensorProto.FLOAT)
        return w.op("Mul", w.op("Sub", w.real(1.0), wide), w.real(-1e4))
    places = w.range_of(x)
    allowed = w.op("LessOrEqual", w.unsqueeze(places, 0), w.unsqueeze(places, 1))
    if kind == "where":
        return w.unsqueeze(allowed, 0, 1)
    length = w.size(x, 1)
    if kind == "causal":
        square = w.op("Expand", w.real(-1e4), w.op("Concat", length, length, axis=0))
        return w.op("Where", allowed, w.real(0.0), square)
    batch = w.size(x, 0)
    if kind == "expanded":
        plain = w.op("Where", allowed, w.real(0.0), w.real(-1e4))
        sizes = w.op("Concat", batch, w.number(total), length, length, axis=0)
        return w.op("Expand", w.unsqueeze(plain, 0, 1), sizes)
    sizes = w.op("Concat", w.number(1, total), length, length, axis=0)
    zeros = w.op("ConstantOfShape", sizes, value=filled(np.float32, 0.0))
    return w.op("Add", zeros, w.unsqueeze(w.op("Where", allowed, w.real(0.0), w.real(-1e4)), 0, 1))
