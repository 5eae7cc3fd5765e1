"""Grow small transformer-like graphs from a recipe: attention, gates, norms and shapes as exporters write them.

A recipe says what the graph is made of, so that a failing one can be written down as a test; `grow` writes it with the
operators themselves. Each width that is free to cut is noted, so that a rule which locks too much shows.
"""

from growth.blocks import write_block
from growth.entry import write_entry
from growth.exits import write_exit
from growth.norms import norm
from growth.recipe import CHOICES, Attention, Block, FeedForward, Recipe, Writing
from growth.writer import Grown, Writer

__all__ = ["CHOICES", "Attention", "Block", "FeedForward", "Grown", "Recipe", "Writing", "grow"]


def grow(recipe: Recipe) -> Grown:
    """Return the graph of a recipe, its weights seeded.

    >>> [node.op_type for node in grow(Recipe(blocks=())).proto.graph.node]
    ['Gather', 'LayerNormalization']
    """
    writer = Writer(recipe)
    x = write_entry(writer)
    previous = Block()
    for number, block in enumerate(recipe.blocks):
        if block.shared and number:
            block = previous
        else:
            writer.scope = f"block{number}"
        previous = block
        x = write_block(writer, x, block)
    writer.scope = "model"
    normed = any(block.placement == "post" for block in recipe.blocks[-1:])
    write_exit(writer, x if normed else norm(writer, x, "last"))
    return writer.finish()
