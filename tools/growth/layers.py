"""Projections and activations, in the ways that exporters write them."""

from collections.abc import Sequence

import numpy as np
import onnx

from growth.writer import Writer


def linear(
    w: Writer, x: str, name: str, ins: int, outs: int, *, free: Sequence[int] = (0, 1), bias: bool = True
) -> str:
    """Project the last axis of a 3-D tensor."""
    how = w.how.linear
    if how == "gemm":
        flat = w.reshape(x, x, [-1, ins])
        matrix = w.weight(name, outs, ins, free=[1 - axis for axis in free], spread=(outs / ins) ** 0.5)
        y = w.op("Gemm", flat, matrix, w.weight(f"{name}_bias", outs), transB=1)
        return w.reshape(y, x, ["B", "S", outs])
    if how == "transposed":
        matrix = w.weight(name, outs, ins, free=[1 - axis for axis in free], spread=(outs / ins) ** 0.5)
        y = w.op("MatMul", x, w.transpose(matrix, 1, 0))
    elif how == "dequantized" and not w.inside:  # in a branch onnxruntime's own optimizer loses the weight
        y = w.op("MatMul", x, _dequantized(w, name, ins, outs, free))
    elif how == "einsum":
        y = w.op("Einsum", x, w.weight(name, ins, outs, free=free), equation="bsi,io->bso")
    else:
        y = w.op("MatMul", x, w.weight(name, ins, outs, free=free))
    return w.op("Add", w.weight(f"{name}_bias", outs), y) if bias else y


def _dequantized(w: Writer, name: str, ins: int, outs: int, free: Sequence[int]) -> str:
    """Return a matrix of whole numbers times a scale for each column."""
    whole = f"{w.scope}.{name}"
    if whole not in w.initializers:
        values = w.random.integers(-100, 100, (ins, outs), dtype=np.int8)
        w.initializers[whole] = onnx.numpy_helper.from_array(values, whole)
        w.widths += [(whole, axis) for axis in free]
    step = 1 / (58 * ins**0.5)  # the whole numbers deviate by 58
    scale = w.weight(f"{name}_scale", outs, middle=step, spread=step / 5)
    zero = f"{w.scope}.{name}_zero"
    w.initializers[zero] = onnx.numpy_helper.from_array(np.arange(outs).astype(np.int8) % 5, zero)
    return w.op("DequantizeLinear", whole, scale, zero, axis=1)


def activate(w: Writer, x: str, kind: str) -> str:
    if kind == "silu":
        return w.op("Mul", x, w.op("Sigmoid", x))
    if kind == "erf":
        inner = w.op("Erf", w.op("Div", x, w.real(1.4142)))
        return w.op("Mul", w.op("Mul", x, w.op("Add", inner, w.real(1.0))), w.real(0.5))
    if kind == "cubic":
        cube = w.op("Mul", w.op("Pow", x, w.real(3.0)), w.real(0.044715))
        inner = w.op("Tanh", w.op("Mul", w.op("Add", x, cube), w.real(0.7978)))
        return w.op("Mul", x, w.op("Add", inner, w.real(1.0)))
    return w.op(kind, x)
