"""Go through a model's stacks, blocks, ids and what is left, and name each width that is met."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, is_static, is_unit, leaves
from graphclone.axes.contractions import contraction_of
from graphclone.axes.typed import AxisTyping
from graphclone.blocks import Block, Stack, stream_axes
from graphclone.dimensions.carriers import Carriers
from graphclone.dimensions.collection import Collection
from graphclone.dimensions.dimension import Dimension
from graphclone.dimensions.heads import attention_axes
from graphclone.dimensions.places import Contractions, Places
from graphclone.dimensions.rest import name_rest
from graphclone.dimensions.widths import axis_key, is_in_groups, lock_of
from graphclone.flow import attention_nodes


def name_dimensions(typing: AxisTyping, stacks: Sequence[Stack], graph: gs.Graph) -> tuple[Dimension, ...]:
    """Return every width of a model that initializers carry, named; blocks in order, then what is outside.

    Example:
        [d.name for d in name_dimensions(typing, stacks, graph) if d.locked is None]
    """
    return _Namer(typing, stacks, graph).run()


class _Namer:
    def __init__(self, typing: AxisTyping, stacks: Sequence[Stack], graph: gs.Graph):
        self.typing = typing
        self.stacks = stacks
        self.graph = graph
        self.nodes = typing.nodes
        self.contractions: Contractions = [contraction_of(node) for node in self.nodes]
        self.carriers = Carriers(typing, graph)
        self.places = Places(self.nodes, self.contractions, stacks, graph)
        self.found = Collection()
        self.ffn_leaves: set[int] = set()  # ids of the atoms that are the ffn of some block

    def run(self) -> tuple[Dimension, ...]:
        for stack in self.stacks:
            widths = stream_axes(stack, self.typing)
            for stage, axis in enumerate(widths):
                name = f"{stack.prefix}hidden" if len(widths) == 1 else f"{stack.prefix}hidden_{stage}"
                self.found.add("hidden", axis, name, stack.prefix)
        for stack in self.stacks:
            for block in stack.blocks:
                for twin in (block, *block.twins):
                    self._block(stack, twin, block.index)
        self._vocabulary()
        self._encoder_states()
        name_rest(self.found, self.nodes, self.carriers, self.places)
        return self.found.dimensions(self.typing, self.carriers)

    # blocks -----------------------------------------------------------------------------------------------------

    def _block(self, stack: Stack, block: Block, index: int) -> None:
        base = f"{stack.prefix}blocks.{index}."
        seen_attention = 0
        for half in block.halves:
            mixes = attention_nodes(self.nodes, self.contractions, half.nodes)
            for i in mixes:
                cross = half.kind == "cross_attention"
                before = "cross_" if cross else ""
                if not cross:
                    before = f"attention_{seen_attention}_" if seen_attention else ""
                    seen_attention += 1
                for role, axis, name in attention_axes(i, half.nodes, self.nodes, self.contractions, self.carriers):
                    self.found.add(role, axis, f"{base}{before}{name}", stack.prefix, index)
        for half in block.halves:
            self._experts(half.nodes, base, stack.prefix, index)
        self._feed_forward([i for half in block.halves for i in half.nodes], base, stack.prefix, index)

    def _experts(self, nodes: Sequence[int], base: str, prefix: str, block: int) -> None:
        inside = {self.nodes[i].op.where for i in nodes}
        for axis, _, where in self.typing.minimum:
            if where in inside and find(axis).kind == "atom":
                self.found.add("experts", axis, f"{base}experts", prefix, block)

    def _feed_forward(self, nodes: Sequence[int], base: str, prefix: str, block: int) -> None:
        """Name what weights contract inside a block and nothing else has named: the widest is the ffn."""
        widths: dict[int, Axis] = {}
        keys: dict[int, tuple] = {}
        taken = self.found.taken - self.ffn_leaves
        for i in nodes:
            contraction = self.contractions[i]
            if contraction is None or contraction.weight is None:
                continue
            for axis in contraction.contracted:
                for width in [find(axis)] if is_in_groups(axis) else leaves(axis):
                    free = not {id(leaf) for leaf in leaves(width)} & taken
                    if free and is_static(width) and not is_unit(width) and self.carriers.count([width]):
                        widths.setdefault(id(width), width)
                        key = self.places.key(i, width)
                        keys[id(width)] = min(key, keys.get(id(width), key))
        if not widths:
            return
        count = self.carriers.count
        main = max(widths.values(), key=lambda width: (lock_of(width) is None, width.size[0] * count([width])))
        others = sorted((width for width in widths.values() if width is not main), key=lambda width: keys[id(width)])
        for number, width in enumerate(others):
            self.found.add("ffn", width, f"{base}ffn_{number}", prefix, block)
        self.found.add("ffn", main, f"{base}ffn", prefix, block)
        self.ffn_leaves |= {id(leaf) for width in widths.values() for leaf in leaves(width)}

    # outside of blocks ------------------------------------------------------------------------------------------

    def _vocabulary(self) -> None:
        """Name what ids range over, what logits have first, then the largest; an untied head's output goes with it."""
        logits = {id(find(a[-1])) for t in self.graph.outputs if (a := self.typing.types.get(t.name))}
        ids = [(name, axis) for name, axis in self.typing.index_axes.items() if is_static(axis)]
        distinct = {axis_key(axis): axis for _, axis in ids}
        inputs = [tensor.name for tensor in self.graph.inputs]
        first = {key: min(inputs.index(name) for name, axis in ids if axis_key(axis) == key) for key in distinct}
        order = {key: (id(find(axis)) not in logits, -axis.size[0], first[key]) for key, axis in distinct.items()}
        for number, axis in enumerate(distinct[key] for key in sorted(distinct, key=order.__getitem__)):
            name = "vocab" if number == 0 else f"vocab_{number}"
            self.found.add("vocab", axis, name)
            if number == 0:
                self._untied_head(axis)

    def _untied_head(self, vocab: Axis) -> None:
        """Let the width of logits, a vector for each id, go with the vocabulary; a pooled output may have its size."""
        ids = [name for name, axis in self.typing.index_axes.items() if find(axis) is find(vocab)]
        ranks = {len(self.typing.types[name]) for name in ids if self.typing.types.get(name)}
        for tensor in self.graph.outputs:
            axes = self.typing.types.get(tensor.name)
            last = find(axes[-1]) if axes and len(axes) - 1 in ranks else None
            if last is None or last.kind != "atom" or last.size != vocab.size:
                continue
            if id(last) not in self.found.taken:
                self.found.join("vocab", vocab, last)

    def _encoder_states(self) -> None:
        """Name the width of states that a decoder's cross-attention reads from a graph input."""
        crosses = any(h.kind == "cross_attention" for stack in self.stacks for b in stack.blocks for h in b.halves)
        for tensor in self.graph.inputs if crosses else ():
            axes = self.typing.types.get(tensor.name) or ()
            width = axes[2] if len(axes) == 3 and is_static(axes[2]) and axes[2].lock is None else None
            if width is not None and id(find(width)) not in self.found.taken:
                self.found.add("hidden", width, "encoder.hidden")
