"""Check a model's form: what the standard demands of a file, and what its own shapes say."""

from collections.abc import Iterator

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from graphclone.model import Model
from graphclone.op import is_standard

ELSEWHERE = "not.onnx"


def problem_of(model: Model) -> str:
    """Return what onnx's checker and its strict shape inference object to, or "".

    Large weights are declared as inputs for it, so none is read. Operators that onnx does not know, or no longer, are
    not judged; the run does that: onnxruntime has some of its own in the standard domain.
    """
    proto = model.to_proto(external=True)
    _declare_weights(proto)
    _set_aside_unknown(proto)
    try:
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
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


def _set_aside_unknown(proto: ModelProto) -> None:
    """Move operators of the standard domain that onnx has no valid schema for to a domain it does not look at."""
    version = next((item.version for item in proto.opset_import if item.domain == ""), 1)
    unknown = [node for node in _nodes(proto.graph) if not node.domain and not is_standard(node.op_type, version)]
    for node in unknown:
        node.domain = ELSEWHERE
    if unknown:
        proto.opset_import.append(helper.make_opsetid(ELSEWHERE, 1))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
