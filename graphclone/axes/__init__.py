"""What every operator does to axes: notation, registry, one file per operator family, the solver."""

import importlib

from graphclone.axes.registry import Store, Typing, rule

FAMILIES = ("elementwise", "reductions", "contraction", "structure", "indexing", "generators", "attention")


def load_rules() -> None:
    """Import every operator family, which fills the table of rules."""
    for family in FAMILIES:
        importlib.import_module(f"graphclone.axes.{family}")


__all__ = ["FAMILIES", "Store", "Typing", "load_rules", "rule"]
