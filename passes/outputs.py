"""Tell which output of a model a child is compared by, and whether it is of logits."""

import numpy as np

from graphclone.analysis import Analysis
from graphclone.axes.axis import find
from graphclone.dtypes import is_float, onnx_dtype_of
from graphclone.model import Model


def compared_output(parent: Model, analysis: Analysis) -> tuple[str, bool]:
    """Return the first float output, "" where there is none, and whether its last axis is of logits.

    Logits are what the vocabulary ranges over, and what the exporter calls so (as of classes).
    """
    words = {id(find(axis)) for d in analysis.dimensions if d.role == "vocab" for axis in d.axes}
    for tensor in parent.outputs:
        axes = analysis.typing.types.get(tensor.name)
        if axes and tensor.dtype is not None and is_float(onnx_dtype_of(np.dtype(tensor.dtype))):
            return tensor.name, id(find(axes[-1])) in words or "logits" in tensor.name.lower()
    return "", False
