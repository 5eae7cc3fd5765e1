"""The registry of PyTorch rules: which text an ONNX operator becomes."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from graphclone.pytorch.code import Code

GROUP = "graphclone.torch_rules"

Rule = Callable[..., "Code | None"]

RULES: dict[tuple[str, str], Rule] = {}


@cache
def load_rules() -> None:
    """Load the modules that other packages name in the group of entry points."""
    for entry in entry_points(group=GROUP):
        entry.load()


def rule(*types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators; a later registration wins.

    types: operator names as the standard spells them. domain: "" is ONNX itself.

    The function takes an `Op` and returns `Code`, the Python expression that computes its output, or a tuple of its
    outputs where it has several.

    Example:
        >>> @rule("Shrink", domain="my.ops")
        ... def shrink(op):
        ...     return Code("F.hardshrink({}, {})", op[0], op.attribute("lambd", 0.5))
    """

    def register(function: Rule) -> Rule:
        for each in types:
            RULES[domain, each] = function
        return function

    return register


def rows(table: dict[str, str], domain: str = "") -> None:
    """Register operators whose text is a template over their inputs in order: `{"Sqrt": "torch.sqrt({})"}`."""
    for types, template in table.items():
        for each in types.split():
            RULES[domain, each] = _templated(template)


def _templated(template: str) -> Rule:
    return lambda op: Code(template, *op.inputs)
