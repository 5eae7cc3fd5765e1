"""Ask onnxruntime how many channels it keeps side by side in memory on this machine."""

import functools

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from graphclone.calibration.session import FATAL_ONLY, RUNTIME_ERRORS, first_line
from graphclone.errors import InputError

DOMAIN = "com.microsoft.nchwc"


@functools.cache
def block_size() -> int:
    """Return 8 or 16, by the processor: what an image of 4 channels is filled up to.

    Raises: InputError where onnxruntime keeps none on this processor.
    """
    shape = [1, 4, 1, 1]
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=DOMAIN)],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.zeros(shape, np.float32)})[0].shape[1]
    except RUNTIME_ERRORS as error:
        raise InputError(
            f"the file is in a layout that onnxruntime has not on this processor ({first_line(error)}); "
            f"optimise the original at the level extended"
        ) from error
