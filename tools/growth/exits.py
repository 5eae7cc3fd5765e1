"""What a graph ends with: the stream, logits, a pooled token, a mean."""

from onnx import TensorProto

from growth.layers import linear
from growth.writer import Writer


def write_exit(w: Writer, x: str) -> None:
    kind, width = w.recipe.exit, w.recipe.hidden
    if kind in ("stream", "both"):
        w.graph_output(x)
    if kind in ("tied", "both", "argmax") and "entry.table" in w.initializers:
        logits = w.op("MatMul", x, w.transpose("entry.table", 1, 0))
        if kind == "argmax":
            w.graph_output(w.op("ArgMax", logits, axis=-1, keepdims=0), 2, TensorProto.INT64)
        w.graph_output(logits)
    elif kind in ("untied", "tied", "argmax"):
        w.graph_output(linear(w, x, "head", width, 11))
    elif kind == "first":
        first = w.op("Gather", x, w.number(0, flat=False), axis=1)
        pooled = w.op("Gemm", first, w.weight("pool", width, 9, free=[0, 1]), w.weight("pool_bias", 9))
        w.graph_output(w.op("Tanh", pooled), 2)
    elif kind == "mean":
        total = w.reduce("ReduceSum", x, 1, keep=0)
        length = w.op("Cast", w.size(x, 1), to=TensorProto.FLOAT)
        classes = w.weight("classes", width, 5, free=[0, 1])
        w.graph_output(w.op("MatMul", w.op("Div", total, length), classes), 2)
