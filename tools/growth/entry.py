"""What a graph begins with: ids, positions, segments, floats, an image."""

import numpy as np
from onnx import TensorProto

from growth.layers import linear
from growth.writer import POSITIONS, VOCABULARY, Writer, filled


def write_entry(w: Writer) -> str:
    kind, width = w.recipe.entry, w.recipe.hidden
    w.scope = "entry"
    if kind == "floats":
        x = w.graph_input("x", TensorProto.FLOAT, ["B", "S", 9])
        return linear(w, x, "project", 9, width, free=[1])
    if kind == "tokens":
        x = w.graph_input("inputs_embeds", TensorProto.FLOAT, ["B", "S", width])
        return w.op("Add", x, w.weight("kind", width, free=[0]))
    if kind == "image":
        return _patches(w, width)
    ids = w.graph_input("input_ids", TensorProto.INT64, ["B", "S"])
    table = w.weight("table", VOCABULARY, width, spread=VOCABULARY**0.5, free=[0, 1])
    x = w.op("Gather", table, ids, axis=0)
    if kind == "segments":
        segments = w.graph_input("token_type_ids", TensorProto.INT64, ["B", "S"])
        x = w.op("Add", x, w.op("Gather", w.weight("segments", 3, width, free=[1]), segments, axis=0))
    if kind in ("positions", "segments"):
        places = w.weight("places", POSITIONS, width, spread=4.0, free=[1])
        length = w.size(ids, 1)
        x = w.op("Add", x, w.op("Slice", places, w.number(0), length, w.number(0)))
    if kind == "ranged_positions":
        places = w.weight("places", POSITIONS, width, spread=4.0, free=[1])
        x = w.op("Add", x, w.op("Gather", places, w.range_of(ids), axis=0))
    return x


def _patches(w: Writer, width: int) -> str:
    pixels = w.graph_input("pixel_values", TensorProto.FLOAT, ["B", 3, 8, 12])
    kernel = w.weight("patch", width, 3, 4, 4, free=[0])
    x = w.op("Conv", pixels, kernel, w.weight("patch_bias", width), kernel_shape=[4, 4], strides=[4, 4])
    batch = w.size(pixels, 0)
    if w.how.reshape in ("zero", "constant"):
        flat = w.op("Reshape", x, w.number(0, 0, -1))
    else:
        flat = w.op("Reshape", x, w.op("Concat", batch, w.size(x, 1), w.number(-1), axis=0))
    x = w.transpose(flat, 0, 2, 1)
    token = w.weight("class", 1, 1, width)
    if w.how.reshape == "sliced":  # as the TorchScript exporter writes expand(-1, -1, -1)
        wanted = w.op("Concat", batch, w.number(-1, -1), axis=0)
        ones = w.op("ConstantOfShape", w.number(3), value=filled(np.int64))
        wanted = w.op("Where", w.op("Equal", wanted, w.op("Mul", ones, w.number(-1))), ones, wanted)
    else:
        wanted = w.op("Concat", batch, w.number(1, width), axis=0)
    x = w.op("Concat", w.op("Expand", token, wanted), x, axis=1)
    return w.op("Add", x, w.weight("places", 1, 7, width, free=[2]))
