"""Fixtures that every folder shares: small models from text."""

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from graphclone.model import Model

HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'


def proto_of(text: str, opset: int = 20, seed: int = 0) -> ModelProto:
    """Return a model from onnx's text form; declared tensors that nothing makes become random weights.

    As in `(float[B, 12] x) => (float[B, 14] y) <float[12, 14] w> { y = MatMul(x, w) }`.
    """
    proto = onnx.parser.parse_model(f"{HEADER.format(opset=opset)}\nsmall {text}")
    made = {name for node in proto.graph.node for name in node.output}
    made |= {item.name for item in (*proto.graph.input, *proto.graph.initializer)}
    random = np.random.default_rng(seed)
    for item in list(proto.graph.value_info):
        if item.name in made:
            continue
        shape = [size.dim_value for size in item.type.tensor_type.shape.dim]
        values = random.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), item.name))
        proto.graph.value_info.remove(item)
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return proto


@pytest.fixture
def graph():
    """Return a function from a graph's text to a Model; see `proto_of`."""

    def build(text: str, opset: int = 20, seed: int = 0) -> Model:
        return Model.from_proto(proto_of(text, opset, seed))

    return build
