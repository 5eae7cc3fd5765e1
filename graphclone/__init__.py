"""Cut any transformer exported to ONNX to an exact smaller size, and train what is left in PyTorch.

Example:
    import graphclone

    parent = graphclone.load("gpt2.onnx")
    stats = graphclone.calibrate(parent, "batches.npz")
    child = graphclone.subclone(parent, stats, hidden=384, layers=6, heads=6, ffn=1536)
    child.save("small.onnx")
    module = graphclone.to_torch(child)
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphclone.analysis import analyse
    from graphclone.calibration.statistics import Statistics
    from graphclone.errors import GraphcloneError
    from graphclone.model import Model, load
    from graphclone.pipeline import Pipeline
    from graphclone.plan import Plan
    from graphclone.pytorch import to_torch
    from graphclone.subclone import calibrate, plan_subclone, subclone
    from graphclone.surgery import apply
    from graphclone.verify import verify

PUBLIC = {
    "GraphcloneError": "errors",
    "Model": "model",
    "Pipeline": "pipeline",
    "Plan": "plan",
    "Statistics": "calibration.statistics",
    "analyse": "analysis",
    "apply": "surgery",
    "calibrate": "subclone",
    "load": "model",
    "plan_subclone": "subclone",
    "subclone": "subclone",
    "to_torch": "pytorch",
    "verify": "verify",
}

__all__ = [  # noqa: RUF022
    "load", "Model", "analyse", "calibrate", "Statistics", "subclone", "plan_subclone", "Plan", "apply", "verify",
    "to_torch", "Pipeline", "GraphcloneError",
]  # fmt: skip


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that `import graphclone` is instant."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'graphclone' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"graphclone.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keep `graphclone.verify` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
