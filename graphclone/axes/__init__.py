"""What every operator does to axes: notation, registry, one file per operator family, the solver."""

import importlib
from functools import cache
from importlib.metadata import entry_points

from graphclone.axes.registry import Store, Typing, rule

GROUP = "graphclone.rules"
FAMILIES = ("elementwise", "reductions", "contraction", "quantized", "structure", "indexing", "generators", "attention")


@cache
def load_rules() -> None:
    """Fill the table of rules: every operator family, then the modules that other packages name in the group."""
    for family in FAMILIES:
        importlib.import_module(f"graphclone.axes.{family}")
    for entry in entry_points(group=GROUP):
        entry.load()


__all__ = ["FAMILIES", "Store", "Typing", "load_rules", "rule"]
