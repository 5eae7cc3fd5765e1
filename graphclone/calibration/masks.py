"""Masks: which inputs tell padding from real tokens."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.calibration.limits import index_limits
from graphclone.errors import InputError
from graphclone.model import Model

ATTENTION = {
    "Attention", "DecoderMaskedMultiHeadAttention", "GroupQueryAttention", "LongformerAttention", "MultiHeadAttention",
    "PackedAttention", "QAttention",
}  # fmt: skip
SOFTMAX = {"Exp", "LogSoftmax", "Softmax"}
CONTRACTIONS = {"Conv", "Einsum", "Gemm", "MatMul"}
ENDS = CONTRACTIONS | {"LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Shape", "Size"}
NO_MASK = {"Cos", "OneHot", "Sin"}


def mask_inputs(model: Model) -> tuple[str, ...]:
    """Return the integer or boolean [batch, sequence] inputs that mask attention scores and index no table.

    An encoder-decoder may have two. Whether the values of such an input are 0 and 1 only the data shows.

    Example:
        >>> mask_inputs(graphclone.load("bert.onnx"))  # doctest: +SKIP
        ('attention_mask',)
    """
    indices = index_limits(model)
    return tuple(
        tensor.name
        for tensor in model.inputs
        if tensor.dtype is not None
        and np.dtype(tensor.dtype).kind in "iub"
        and (tensor.shape is None or len(tensor.shape) == 2)
        and tensor.name not in indices
        and _masks_attention(tensor)
    )


def chosen_masks(model: Model, mask: str | Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the inputs that `mask` names, or those found in the graph that hold only 0 and 1 in the first batch.

    Raises: InputError where a named one is no input of shape [batch, sequence].
    """
    if mask is None:
        return tuple(name for name in mask_inputs(model) if _is_mask(feeds[name]))
    names = (mask,) if isinstance(mask, str) else tuple(mask)
    known = [tensor.name for tensor in model.inputs]
    for name in names:
        if name not in feeds:
            raise InputError(f"--mask names '{name}', which is no input; the model has {listed(known)}")
        if feeds[name].ndim != 2:
            raise InputError(
                f"--mask names '{name}', which has shape {list(feeds[name].shape)}; a mask has shape [batch, sequence]"
            )
    return names


def listed(names: Iterable[str]) -> str:
    """Return names as a message lists them.

    Example:
        >>> listed(["a", "b"])
        "'a', 'b'"
    """
    return ", ".join(f"'{name}'" for name in names)


def _is_mask(values: np.ndarray) -> bool:
    return values.ndim == 2 and bool(((values == 0) | (values == 1)).all())


def _masks_attention(tensor: gs.Tensor) -> bool:
    reached, waiting, seen = False, [tensor], {tensor.name}
    while waiting:
        current = waiting.pop()
        for node in current.outputs:
            if node.op in NO_MASK:
                return False
            reached = reached or node.op in SOFTMAX or node.op in ATTENTION
            is_index = node.op == "Gather" and node.inputs[0] is not current
            if node.op in SOFTMAX or node.op in ATTENTION or node.op in ENDS or is_index:
                continue
            fresh = [item for item in node.outputs if item.name not in seen]
            seen.update(item.name for item in fresh)
            waiting.extend(fresh)
    return reached
