"""Tell which output of a model a child is compared by, whether it is of logits, and which of its rows are tokens."""

from collections.abc import Iterable, Sequence

import numpy as np

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find
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


def mask_of(axes: Sequence[Axis], masks: Iterable[str], analysis: Analysis) -> str | None:
    """Return which of some inputs [batch, sequence] masks the rows that axes make, None where none does.

    The axes are the input's own, or no other input has as many rows.
    """
    typed = {name: analysis.typing.types[name] for name in masks}
    same = [name for name, each in typed.items() if [id(find(a)) for a in each] == [id(find(a)) for a in axes]]
    alike = [name for name, each in typed.items() if _counts(each) == _counts(axes)]
    return same[0] if same else alike[0] if len(alike) == 1 else None


def _counts(axes: Sequence[Axis]) -> list[int]:
    """Return how many rows axes make, per probe."""
    return [int(np.prod([find(axis).size[probe] for axis in axes])) for probe in range(2)]
