"""What tells queries and keys their place: rotations, slopes, relative distances."""

import numpy as np
from onnx import TensorProto

from growth.writer import POSITIONS, Writer


def angles(w: Writer, x: str, kind: str, size: int) -> tuple[str, str, int]:
    """Return cosines and sines [S, R/2] or [S, R], and how many entries R of a head they rotate."""
    rotated = 2 * (size // 4) if kind == "partial" else size
    pairs = rotated // 2
    if kind == "frequencies":
        speeds = w.real(10.0 ** -np.arange(pairs), f"{w.scope}.speeds")
        places = w.unsqueeze(w.op("Cast", w.range_of(x), to=TensorProto.FLOAT), 1)
        turns = w.op("MatMul", places, w.unsqueeze(speeds, 0))
    else:
        table = np.arange(POSITIONS)[:, None] * 10.0 ** -np.arange(pairs)[None] if pairs else np.zeros((POSITIONS, 1))
        table = w.real(table, f"{w.scope}.angles")
        turns = w.op("Gather", table, w.range_of(x), axis=0)
    if kind != "interleaved":
        turns = w.op("Concat", turns, turns, axis=-1)
    return w.op("Cos", turns), w.op("Sin", turns), rotated


def rotate(w: Writer, x: str, cos: str, sin: str, rotated: int, size: int, kind: str) -> str:
    """Rotate the first entries of each head, in halves or in neighbouring pairs."""
    rest = ""
    if rotated < size:
        x, rest = w.parts(x, [rotated, size - rotated])
    if kind == "interleaved":
        one, two = (w.strided(x, start, size) for start in (0, 1))
        first = w.op("Sub", w.op("Mul", one, cos), w.op("Mul", two, sin))
        second = w.op("Add", w.op("Mul", one, sin), w.op("Mul", two, cos))
        both = w.op("Concat", w.unsqueeze(first, -1), w.unsqueeze(second, -1), axis=-1)
        target = w.op("Concat", w.op("Slice", w.op("Shape", x), w.number(0), w.number(3)), w.number(-1), axis=0)
        return w.op("Reshape", both, target)
    one, two = w.parts(x, [rotated // 2, rotated - rotated // 2])
    turned = w.op("Concat", w.op("Neg", two), one, axis=-1)
    y = w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))
    return w.op("Concat", y, rest, axis=-1) if rest else y


def rotated_by_operator(w: Writer, x: str, size: int) -> str:
    """Rotate whole heads by com.microsoft.RotaryEmbedding."""
    angles = np.arange(POSITIONS)[:, None] * 10.0 ** -np.arange(size // 2)[None]
    cos, sin = w.real(np.cos(angles), "cos"), w.real(np.sin(angles), "sin")
    return w.op("RotaryEmbedding", x, w.number(0), cos, sin, domain="com.microsoft")


def slopes(w: Writer, x: str, total: int) -> str:
    """Return ALiBi's bias: each head's slope times the distance."""
    steepness = w.real(2.0 ** -np.arange(1, total + 1).reshape(total, 1, 1), f"{w.scope}.slopes")
    w.widths.append((steepness, 0))
    places = w.op("Cast", w.range_of(x), to=TensorProto.FLOAT)
    apart = w.op("Sub", w.unsqueeze(places, 0), w.unsqueeze(places, 1))
    return w.op("Mul", steepness, w.unsqueeze(apart, 0))


def relative(w: Writer, x: str, total: int) -> str:
    """Return T5's bias: a table of distances, clipped and picked, heads first."""
    places = w.range_of(x)
    apart = w.op("Sub", w.unsqueeze(places, 0), w.unsqueeze(places, 1))
    bounded = w.op("Clip", apart, w.number(-3, flat=False), w.number(3, flat=False))
    rows = w.op("Add", bounded, w.number(3, flat=False))
    table = w.weight("distances", 7, total, free=[1])
    return w.unsqueeze(w.transpose(w.op("Gather", table, rows, axis=0), 2, 0, 1), 0)
