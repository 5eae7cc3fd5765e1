"""Masks: which inputs tell padding from real tokens."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.calibration.limits import index_limits
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.weights import weight_of
from graphclone.whole_numbers import plain_of, step_of

ATTENTION = {
    "Attention", "DecoderMaskedMultiHeadAttention", "GroupQueryAttention", "LongformerAttention", "MultiHeadAttention",
    "PackedAttention", "QAttention",
}  # fmt: skip
SOFTMAX = {"Exp", "LogSoftmax", "Softmax"}
CONTRACTIONS = {"Conv", "Einsum", "Gemm", "MatMul"}
ENDS = CONTRACTIONS | {"LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Shape", "Size"}
NO_MASK = {"Cos", "OneHot", "Sin"}
FILLS = {"Cast", "CastLike", "Expand", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Unsqueeze"}


def mask_inputs(model: Model) -> tuple[str, ...]:
    """Return the integer or boolean [batch, sequence] inputs that mask attention scores and index no table.

    An encoder-decoder may have two. Whether the values of such an input are 0 and 1 only the data shows.

    Example:
        >>> mask_inputs(encoder)
        ('attention_mask', 'ignored')
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


def sense(model: Model, name: str) -> bool:
    """Return what a mask holds where a token is real: True (attend here), or False where it marks what to ignore.

    torch.nn.Transformer's padding masks are of the second kind. An input that reaches no attention counts as the first.

    Example:
        >>> sense(encoder, "attention_mask"), sense(encoder, "ignored")
        (True, False)
    """
    tensor = next(tensor for tensor in model.inputs if tensor.name == name)
    return _effect(tensor) != -1


def _masks_attention(tensor: gs.Tensor) -> bool:
    return _effect(tensor) is not None


def _effect(tensor: gs.Tensor) -> int | None:
    """Return 1 where larger values of an input raise attention scores, -1 where they lower them, None for no mask."""
    effect, waiting, seen = None, [(tensor, 1)], {tensor.name}
    while waiting:
        current, sign = waiting.pop(0)
        for node in current.outputs:
            kind, operands = _operation(node)
            if kind in NO_MASK:
                return None
            if effect is None and (kind in SOFTMAX or kind in ATTENTION):
                effect = sign
            is_index = kind == "Gather" and node.inputs[0] is not current
            if kind in SOFTMAX or kind in ATTENTION or kind in ENDS or is_index:
                continue
            slot = next(i for i, item in enumerate(operands) if item is current)
            fresh = [item for item in node.outputs if item.name not in seen]
            seen.update(item.name for item in fresh)
            waiting.extend((item, sign * _turn(kind, operands, slot)) for item in fresh)
    return effect


def _operation(node: gs.Node) -> tuple[str, Sequence[gs.Tensor]]:
    """Return a node's type and inputs, or of one on whole numbers the float operator's and its operands."""
    plain = plain_of(node.op, node.domain, node.attrs)
    if plain is None:
        return node.op, node.inputs
    return plain.type, [node.inputs[slot] for slot in plain.operands(len(node.inputs))]


def _turn(kind: str, operands: Sequence[gs.Tensor], slot: int) -> int:
    """Return -1 where an operator's output falls as its operand in that slot rises, else 1."""
    other = _filled_with(operands[1 - slot]) if len(operands) == 2 else None
    if kind in ("Not", "Neg"):
        return -1
    if kind == "Equal":
        return -1 if other == 0 else 1
    if kind in ("Less", "LessOrEqual"):
        return -1 if slot == 0 else 1
    if kind in ("Greater", "GreaterOrEqual", "Sub"):
        return -1 if slot == 1 else 1
    if kind in ("Mul", "Div"):
        return -1 if other is not None and other < 0 else 1
    if kind == "Where" and slot == 0:
        chosen, rest = (_filled_with(tensor) for tensor in operands[1:])
        return -1 if (0 if chosen is None else chosen) < (0 if rest is None else rest) else 1
    return 1


def _filled_with(tensor: gs.Tensor) -> float | None:
    """Return the one number that a tensor is filled with, as far as the graph says; in steps of its scale, if any."""
    for _ in range(8):
        if isinstance(tensor, gs.Constant):
            break
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.op not in (*FILLS, "ConstantOfShape"):
            return None
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return float(np.ravel(0.0 if value is None else getattr(value, "values", value))[0])
        tensor = node.inputs[0]
    if not isinstance(tensor, gs.Constant) or weight_of(tensor).size != 1:
        return None
    step = step_of(tensor)
    zero = step.zero if step and isinstance(step.zero, gs.Constant) else None
    parts = [tensor] if zero is None else [tensor, zero]
    value, *offset = (float(np.ravel(weight_of(part).load())[0]) for part in parts)
    return value - sum(offset)
