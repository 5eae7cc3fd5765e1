"""Scores, what is added to them, and the values that they mix."""

from onnx import TensorProto

from growth.masks import write_mask
from growth.positions import relative, slopes
from growth.recipe import GROUPED, Attention
from growth.writer import Writer


def _scale(w: Writer, given: Attention, q: str, k: str) -> tuple[str, str, str]:
    """Return scaled queries and keys, and what is left to divide the scores by."""
    root = w.recipe.head**0.5
    if given.scale == "queries":
        return w.op("Mul", q, w.real(1 / root)), k, ""
    if given.scale == "keys":
        half = w.real(root**-0.5)
        return w.op("Mul", q, half), w.op("Mul", k, half), ""
    if given.scale == "shape":
        size = w.op("Gather", w.op("Shape", q), w.number(-1, flat=False), axis=0)
        return q, k, w.op("Sqrt", w.op("Cast", size, to=TensorProto.FLOAT))
    return q, k, w.real(root)


def mix(w: Writer, x: str, given: Attention, q: str, k: str, v: str, total: int) -> str:
    q, k, divisor = _scale(w, given, q, k)
    rank5 = (
        given.repeat == "broadcast"
        and given.groups > 1
        and given.mixing in GROUPED
        and given.projection in ("separate", "thirds")
    )
    if given.mixing == "flat" and not rank5:
        return _mix_flat(w, x, given, q, k, v, divisor, total)
    if given.mixing == "einsum" and not rank5:
        scores = w.op("Einsum", q, k, equation="bhqd,bhkd->bhqk")
    else:
        order = (0, 1, 2, 4, 3) if rank5 else (0, 1, 3, 2)
        scores = w.op("MatMul", q, w.transpose(k, *order))
    scores = w.op("Div", scores, divisor) if divisor else scores
    if given.scale == "softcap":
        scores = w.op("Mul", w.op("Tanh", w.op("Div", scores, w.real(5.0))), w.real(5.0))
    scores = _biased(w, x, given, scores, total, rank5)
    weights = _softmax(w, scores, given.softmax)
    if given.mixing == "einsum" and not rank5:
        return w.op("Einsum", weights, v, equation="bhqk,bhkd->bhqd")
    return w.op("MatMul", weights, v)


def _mix_flat(w: Writer, x: str, given: Attention, q: str, k: str, v: str, divisor: str, total: int) -> str:
    """Merge batch and heads around the two products, as BLOOM and OPT do."""
    length, size = w.size(x, 1), w.recipe.head
    merged = w.op("Concat", w.number(-1), length, w.number(size), axis=0)
    q, k, v = (w.op("Reshape", t, merged) for t in (q, k, v))
    scores = w.op("MatMul", q, w.transpose(k, 0, 2, 1))
    scores = w.op("Div", scores, divisor) if divisor else scores
    apart = w.op("Concat", w.size(x, 0), w.number(total), length, length, axis=0)
    scores = _biased(w, x, given, w.op("Reshape", scores, apart), total, False)
    weights = _softmax(w, scores, given.softmax)
    weights = w.op("Reshape", weights, w.op("Concat", w.number(-1), length, length, axis=0))
    y = w.op("MatMul", weights, v)
    return w.op("Reshape", y, w.op("Concat", w.size(x, 0), w.number(total), length, w.number(size), axis=0))


def _softmax(w: Writer, scores: str, how: str) -> str:
    if how == "fused":
        return w.op("Softmax", scores, axis=-1)
    powers = w.op("Exp", w.op("Sub", scores, w.reduce("ReduceMax", scores)))
    return w.op("Div", powers, w.reduce("ReduceSum", powers))


def _biased(w: Writer, x: str, given: Attention, scores: str, total: int, rank5: bool) -> str:
    if given.position == "slopes" and not rank5:
        scores = w.op("Add", scores, slopes(w, x, total))
    if given.position == "relative" and not rank5:
        scores = w.op("Add", scores, relative(w, x, total))
    mask = write_mask(w, x, given.mask, 1 if rank5 else total)
    if not mask:
        return scores
    mask = w.unsqueeze(mask, 1) if rank5 and given.mask != "causal" else mask
    if given.mask == "where":
        return w.op("Where", mask, scores, w.real(-1e4))
    return w.op("Add", scores, mask)
