"""Code: one Python expression with holes for tensors and sizes."""

from collections.abc import Callable
from typing import Any

import torch


class Marker:
    """A hole that the place where the expression lands fills: the device, say."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


DEVICE = Marker("device")
"""The device of the module's inputs."""
DTYPE = Marker("dtype")
"""The type of the module's parameters."""


class Code:
    """A Python expression over `torch` and `F`, as text with a `{}` for each operand.

    Operands: values of the program, sizes, numbers, None, dtypes, strings (as literals), tuples and lists of those,
    and nested `Code`.

    Example:
        >>> render(Code("F.softmax({}, dim={})", Code("x"), -1), str)
        'F.softmax(x, dim=-1)'
    """

    __slots__ = ("operands", "template")

    def __init__(self, template: str, *operands: Any):
        self.template = template
        self.operands = operands

    def leaves(self):
        """Yield every operand that is no container."""
        stack = list(self.operands)
        while stack:
            operand = stack.pop(0)
            if isinstance(operand, tuple | list):
                stack[:0] = operand
            elif isinstance(operand, Code):
                stack[:0] = operand.operands
            else:
                yield operand


def render(code: Any, leaf: Callable[[Any], str], integer: Callable[[int], str | None] = repr) -> str:
    """Return the text of an expression; `leaf` gives that of values, sizes and markers, `integer` of numbers."""
    if isinstance(code, Code):
        return code.template.format(*(render(operand, leaf, integer) for operand in code.operands))
    if isinstance(code, tuple):
        inside = ", ".join(render(operand, leaf, integer) for operand in code)
        return f"({inside},)" if len(code) == 1 else f"({inside})"
    if isinstance(code, list):
        return "[" + ", ".join(render(operand, leaf, integer) for operand in code) + "]"
    if code is None or isinstance(code, bool | str):
        return repr(code)
    if isinstance(code, int):
        return integer(code) or "#"
    if isinstance(code, float):
        return literal(code)
    if isinstance(code, torch.dtype):
        return str(code)
    return leaf(code)


def literal(number: float) -> str:
    """Return Python text for a float: the shortest one that float32 reads back as the same number."""
    if number != number or number in (float("inf"), float("-inf")):
        return f'float("{number}")'
    return repr(number)
