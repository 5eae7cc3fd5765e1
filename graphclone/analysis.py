"""Everything the tool knows of a model before it changes anything: axes, stacks, dimensions."""

from dataclasses import dataclass

from graphclone.axes.solver import type_axes
from graphclone.axes.typed import AxisTyping
from graphclone.blocks import Stack, find_stacks
from graphclone.dimensions import Dimension, name_dimensions
from graphclone.model import Model


@dataclass(frozen=True, slots=True)
class Analysis:
    """typing: every tensor's axes. stacks: residual streams. dimensions: named widths. outputs: the graph's."""

    typing: AxisTyping
    stacks: tuple[Stack, ...]
    dimensions: tuple[Dimension, ...]
    outputs: frozenset[str] = frozenset()

    def dimension(self, name: str) -> Dimension | None:
        """Return the dimension of a name or alias."""
        return self._names().get(name)

    def _names(self) -> dict[str, Dimension]:
        return {name: dimension for dimension in self.dimensions for name in dimension.names}


def analyse(model: Model) -> Analysis:
    """Type the axes of a model, find its blocks, name its dimensions.

    Example:
        >>> analyse(model).dimension("blocks.0.ffn").size
        512
    """
    typing = type_axes(model)
    stacks = find_stacks(model.graph, typing)
    outputs = frozenset(tensor.name for tensor in model.graph.outputs)
    return Analysis(typing, stacks, name_dimensions(typing, stacks, model.graph), outputs)
