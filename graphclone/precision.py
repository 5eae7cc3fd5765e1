"""Precision: models in 16 bits, and copies of them in fp32 for where onnxruntime has no kernels."""

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphclone.graphs import constants, walk
from graphclone.model import Model
from graphclone.sources import Source
from graphclone.weights import Weight, weight_of

LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def raised(model: Model) -> Model:
    """Return a copy in which fp16 and bf16 are fp32: weights, inputs, casts and fills."""
    copy = model.copy()
    for graph in walk(copy.graph):
        for constant in constants(graph):
            weight = weight_of(constant)
            if weight.onnx_dtype in LOW:
                constant._values = Weight(_Raised(weight))
        for node in graph.nodes:
            for name in ("to", "dtype"):
                if name in node.attrs and _is_low(node.attrs[name]):
                    node.attrs[name] = TensorProto.FLOAT
            value = node.attrs.get("value")
            if isinstance(value, gs.Constant) and weight_of(value).onnx_dtype in LOW:
                node.attrs["value"] = gs.Constant(value.name, Weight(_Raised(weight_of(value))))
        for tensor in (*graph.inputs, *graph.outputs, *(t for node in graph.nodes for t in node.outputs)):
            if not isinstance(tensor, gs.Constant) and tensor.dtype is not None and _is_low(tensor.dtype):
                tensor.dtype = np.float32
    return copy


def is_low(model: Model) -> bool:
    """Tell whether a model computes in fp16 or bf16."""
    return any(weight.onnx_dtype in LOW for weight in model.weights.values())


class _Raised(Source):
    def __init__(self, weight: Weight):
        super().__init__(weight.shape, TensorProto.FLOAT)
        self.weight = weight

    def array(self) -> np.ndarray:
        return self.weight.load().astype(np.float32)

    def packed(self) -> bytes:
        return self.array().tobytes()


def _is_low(dtype: object) -> bool:
    if isinstance(dtype, int):
        return dtype in LOW
    try:
        return np.dtype(dtype) in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
    except TypeError:
        return False
