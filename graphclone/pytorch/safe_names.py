"""Safe names: identifiers for whatever a graph calls its tensors, since a graph is untrusted input."""

import keyword
import re
from collections.abc import Container

import torch

from graphclone.pytorch import helpers

LONGEST = 60
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = frozenset(dir(torch.nn.Module)) | frozenset(torch.nn.Module().__dict__) | {"super"}
OF_THE_MODEL = frozenset({"tie_weights", "input_names", "output_names", "source", "report"})
"""What the whole module has beside its parts."""


def is_safe(component: str) -> bool:
    """Tell whether one part of a dotted name can be an attribute of a module as it stands, or a list's index."""
    if component.isascii() and component.isdigit():
        return len(component) < 6 and str(int(component)) == component
    fits = WORD.fullmatch(component) is not None and component.isascii() and len(component) <= LONGEST
    return fits and not keyword.iskeyword(component) and component not in RESERVED and not component.startswith("__")


def safe(component: str, taken: Container[str] = ()) -> str:
    """Return an identifier like `component` that is not in `taken`; an index stays an index.

    Example:
        >>> safe('weight"; import os #'), safe("class"), safe("größe", {"gr_e"})
        ('weight_import_os', 'class_', 'gr_e_1')
    """
    if is_safe(component) and component not in taken:
        return component
    word = re.sub(r"[^A-Za-z0-9_]+", "_", component[: 4 * LONGEST]).strip("_")[:LONGEST] or "tensor"
    if word[0].isdigit():
        word = f"n{word}"
    if keyword.iskeyword(word) or word in RESERVED or word.startswith("__"):
        word = f"{word.strip('_')}_"
    result, count = word, 0
    while result in taken:
        count += 1
        result = f"{word}_{count}"
    return result


def local(hint: str, taken: Container[str]) -> str:
    """Return a name for a local variable."""
    word = safe(hint if not hint.isdigit() else f"n{hint}")
    if word in LOCAL_RESERVED:
        word = f"{word}_"
    result, count = word, 0
    while result in taken:
        count += 1
        result = f"{word}_{count}"
    return result


LOCAL_RESERVED = frozenset(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__) | {
    "torch", "nn", "F", "self", "own", "checkpoint", "Group", "load", "load_file", "Path", *vars(helpers),
}  # fmt: skip
