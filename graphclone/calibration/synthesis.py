"""Synthesis: feeds made up from what the graph inputs say, where a check needs inputs and nobody gave any."""

import ast
import operator
from collections.abc import Collection, Mapping

import numpy as np

from graphclone.calibration.feeds import Feeds, InputSpec, input_specs, kind
from graphclone.calibration.limits import index_limits
from graphclone.calibration.masks import mask_inputs, sense
from graphclone.errors import InputError
from graphclone.model import Model

DEFAULT_SIZES = (3, 7, 5, 11, 13, 17, 19, 23)
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def synthesise(
    model: Model,
    sizes: Mapping[str, int] | None = None,
    *,
    upper: Mapping[str, int] | None = None,
    masks: Collection[str] | None = None,
    padded: bool = False,
    seed: int = 0,
) -> Feeds:
    """Return feeds for every input: ids below the size of their table, masks that hide nothing, floats normal.

    sizes: of dynamic sizes by name, a nameless one is called `input:axis`; left out ones become 3, 7, 5, 11, ... in
        order, names like `past + sequence` are computed.
    upper: the first id too large, by input; left out, read from the tables in the graph, else 2.
    masks: the inputs that are masks; left out, found in the graph.
    padded: whether the last third of the last sample is padding.
    Raises: InputError for an input that is no tensor or does not say its type or rank.

    Example:
        >>> synthesise(model, {"batch": 2, "time": 5})["ids"].shape
        (2, 5)
    """
    specs = input_specs(model)
    known = dynamic_sizes(specs, sizes or {})
    limits = {name: limit.size for name, limit in index_limits(model).items()} | dict(upper or {})
    masks = mask_inputs(model) if masks is None else masks
    random = np.random.default_rng(seed)
    real = {name: sense(model, name) for name in masks}
    return {
        name: _values(spec, _shape(spec, known), random, limits.get(name), real.get(name), padded)
        for name, spec in specs.items()
    }


def dynamic_sizes(specs: Mapping[str, InputSpec], given: Mapping[str, int]) -> dict[str, int]:
    """Return a number for each dynamic size of the inputs.

    Example:
        >>> ids = InputSpec("ids", np.dtype(np.int64), ("batch", "length"))
        >>> dynamic_sizes({"ids": ids}, {"length": 4})
        {'batch': 3, 'length': 4}
    """
    names = []
    for spec in specs.values():
        if spec.dtype is None or spec.shape is None:
            raise InputError(f"input '{spec.name}' does not say its type and rank; give --data")
        names += [_symbol(spec, axis) for axis, size in enumerate(spec.shape) if not isinstance(size, int)]
    plain = [name for name in dict.fromkeys(names) if _terms(name) is None]
    free = iter(size for size in DEFAULT_SIZES if size not in given.values())
    return {name: given[name] if name in given else next(free, DEFAULT_SIZES[-1]) for name in plain} | dict(given)


def _symbol(spec: InputSpec, axis: int) -> str:
    return str(spec.shape[axis] or f"{spec.name}:{axis}")


def _shape(spec: InputSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    result = []
    for axis, size in enumerate(spec.shape):
        symbol = _symbol(spec, axis)
        if isinstance(size, int):
            result.append(size)
        elif symbol in sizes:
            result.append(sizes[symbol])
        else:
            result.append(max(1, _evaluate(_terms(symbol), sizes)))
    return tuple(result)


def _terms(name: str) -> ast.expr | None:
    """Return the arithmetic that a size's name spells (`past + 1`), or None where it is a plain name."""
    try:
        expression = ast.parse(name, mode="eval").body
    except SyntaxError:
        return None
    return expression if isinstance(expression, ast.BinOp) and _is_arithmetic(expression) else None


def _is_arithmetic(term: ast.expr) -> bool:
    if isinstance(term, ast.BinOp):
        return type(term.op) in OPERATIONS and _is_arithmetic(term.left) and _is_arithmetic(term.right)
    return isinstance(term, ast.Name) or (isinstance(term, ast.Constant) and isinstance(term.value, int))


def _evaluate(term: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(term, ast.BinOp):
        return OPERATIONS[type(term.op)](_evaluate(term.left, sizes), _evaluate(term.right, sizes))
    return term.value if isinstance(term, ast.Constant) else sizes.get(term.id, DEFAULT_SIZES[0])


def _values(
    spec: InputSpec,
    shape: tuple[int, ...],
    random: np.random.Generator,
    limit: int | None,
    real: bool | None,
    padded: bool,
) -> np.ndarray:
    """Return values of one input; `real` is what a mask holds at real tokens, None for what is no mask."""
    if real is not None:
        values = np.full(shape, float(real))
        if padded and shape and shape[-1] > 1:
            values.reshape(-1, shape[-1])[-1, -max(1, shape[-1] // 3) :] = not real
    elif kind(spec.dtype) == "f" and limit is None:
        values = random.standard_normal(shape)
    elif spec.dtype == bool:
        values = np.ones(shape)
    elif "position" in spec.name.lower() and shape:
        values = np.broadcast_to(np.arange(shape[-1]) % (limit or shape[-1]), shape)
    else:
        values = random.integers(0, limit or 2, shape)
    return values.astype(spec.dtype)
