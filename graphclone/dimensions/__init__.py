"""Name the widths of a model: hidden, vocab, blocks.3.ffn, blocks.3.heads, and say what locks the others."""

from graphclone.dimensions.dimension import Dimension
from graphclone.dimensions.naming import name_dimensions
from graphclone.dimensions.widths import axis_key

__all__ = ["Dimension", "axis_key", "name_dimensions"]
