"""A graph as a trainable torch.nn.Module, and as readable source that imports torch alone."""

from graphclone.pytorch import (  # noqa: F401
    attention,
    branches,
    contraction,
    elementwise,
    indexing,
    quantization,
    reduction,
    structure,
)
from graphclone.pytorch.code import Code
from graphclone.pytorch.module import to_torch
from graphclone.pytorch.program import Unsupported
from graphclone.pytorch.registry import rule
from graphclone.pytorch.writing import write_torch

__all__ = ["Code", "Unsupported", "rule", "to_torch", "write_torch"]
