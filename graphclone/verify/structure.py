"""Check a model's form: what the standard demands of a file, and what its own shapes say."""

import onnx
from onnx import ModelProto, TensorProto, helper

from graphclone.model import Model


def problem_of(model: Model) -> str:
    """Return what onnx's checker and its strict shape inference object to, or "".

    Large weights are declared as inputs for it, so none is read.
    """
    proto = model.to_proto(external=True)
    _declare_weights(proto)
    try:
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        problem = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return "" if "deprecated" in problem else problem  # as GroupNormalization 18, which exporters write and all run
    return ""


def _declare_weights(proto: ModelProto) -> None:
    outside = [item for item in proto.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    inside = [item for item in proto.graph.initializer if item.data_location != TensorProto.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inside)
    known = {item.name for item in proto.graph.input}
    proto.graph.input.extend(
        helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
        for item in outside
        if item.name not in known
    )
