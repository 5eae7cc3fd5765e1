"""Norms, fused and written out."""

import numpy as np
from onnx import TensorProto

from growth.writer import Writer


def norm(w: Writer, x: str, name: str, width: int = 0) -> str:
    """Normalise the last axis, as the recipe writes it."""
    kind, width = w.recipe.norm, width or w.recipe.hidden
    if kind == "none":
        return x
    if kind in ("group", "instance"):
        return _channel_norm(w, x, name, kind, width)
    gain = w.weight(f"{name}_gain", width, spread=0.5, middle=1.0, free=[0])
    if kind == "rms":
        if w.opset >= 23:
            return w.op("RMSNormalization", x, gain, axis=-1)
        return w.op("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=1e-5)
    if kind == "fused" and w.opset >= 17:
        return w.op("LayerNormalization", x, gain, w.weight(f"{name}_shift", width), axis=-1)
    if kind == "rms_written":
        square = w.op("Mul", x, x)
        mean = w.op("Add", _mean(w, square, width, kind), w.real(1e-5))
        return w.op("Mul", gain, w.op("Mul", x, w.op("Reciprocal", w.op("Sqrt", mean))))
    centred = w.op("Sub", x, _mean(w, x, width, kind))
    mean = _mean(w, w.op("Pow", centred, w.real(2.0)), width, kind)
    deviation = w.op("Sqrt", w.op("Add", mean, w.real(1e-5)))
    scaled = w.op("Mul", w.op("Div", centred, deviation), gain)
    return w.op("Add", scaled, w.weight(f"{name}_shift", width))


def _mean(w: Writer, x: str, width: int, kind: str) -> str:
    if kind == "float_width":
        return w.op("Div", w.reduce("ReduceSum", x), w.real(float(width)))
    if kind == "float_reciprocal":
        return w.op("Mul", w.real(1 / width), w.reduce("ReduceSum", x))
    if kind == "computed_width":
        size = w.op("Cast", w.size(x, 2), to=TensorProto.FLOAT)
        return w.op("Div", w.reduce("ReduceSum", x), size)
    if kind == "uniform":
        return w.op("MatMul", x, w.real(np.full((width, 1), 1 / width)))
    return w.reduce("ReduceMean", x)


def _channel_norm(w: Writer, x: str, name: str, kind: str, width: int) -> str:
    turned = w.transpose(x, 0, 2, 1)
    gain, shift = w.weight(f"{name}_gain", width, middle=1.0), w.weight(f"{name}_shift", width)
    if kind == "group":
        y = w.op("GroupNormalization", turned, gain, shift, num_groups=2)
    else:
        y = w.op("InstanceNormalization", turned, gain, shift)
    return w.transpose(y, 0, 2, 1)


def head_norm(w: Writer, x: str, name: str, size: int) -> str:
    square = w.reduce("ReduceMean", w.op("Pow", x, w.real(2.0)))
    scaled = w.op("Div", x, w.op("Sqrt", w.op("Add", square, w.real(1e-5))))
    return w.op("Mul", scaled, w.weight(name, size, middle=1.0, spread=0.5, free=[0]))
