"""Name the widths of a model: hidden, vocab, blocks.3.ffn, blocks.3.heads, and say what locks the others."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graphclone.axes.axis import Axis, find, first_lock, is_fill, is_static, is_unit, leaves
from graphclone.axes.contractions import BLOCKWISE, Contraction, contraction_of, is_weight
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.blocks import Block, Stack, stream_axes
from graphclone.flow import ATTENTION_OPS, attention_nodes

ORDER = ("hidden", "heads", "kv_heads", "queries_per_kv", "head_dim", "v_head_dim", "experts", "ffn", "vocab", "free")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A width that a plan may name.

    name: as `blocks.3.ffn`. size: how many indices it has. role: hidden, heads, kv_heads, queries_per_kv, head_dim,
    v_head_dim, ffn, experts, vocab or free. axes: what it is in the graph (more than one where the name speaks of
    several, as `vocab` does of the embedding and of an untied head). aliases: other accepted names. locked: why it
    cannot be cut, or None. stack: the prefix of its stack. blocks: the parent's blocks it spans.
    weights: how many initializers carry it. minimum: the least size the graph admits.
    """

    name: str
    size: int
    role: str
    axes: tuple[Axis, ...]
    aliases: tuple[str, ...] = ()
    locked: str | None = None
    stack: str = ""
    blocks: tuple[int, ...] = ()
    weights: int = 0
    minimum: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(slots=True)
class _Found:
    """A dimension while names for it are collected."""

    role: str
    axis: Axis
    names: list[str] = field(default_factory=list)
    stack: str = ""
    blocks: list[int] = field(default_factory=list)


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
        self.nodes: list[TypedNode] = typing.nodes
        self.contractions: list[Contraction | None] = [contraction_of(node) for node in self.nodes]
        self.found: dict[tuple, _Found] = {}
        self.taken: set[int] = set()  # leaves that a named dimension speaks of
        self.ffn_leaves: set[int] = set()  # of these, the ones that are the ffn of some block
        self.heads: dict[int, Axis] = {}
        self.carriers = self._carriers()
        self.fed = self._fed()
        self.places = _Places(self.nodes, self.contractions, stacks, graph)

    def run(self) -> tuple[Dimension, ...]:
        for stack in self.stacks:
            widths = stream_axes(stack, self.typing)
            for stage, axis in enumerate(widths):
                name = f"{stack.prefix}hidden" if len(widths) == 1 else f"{stack.prefix}hidden_{stage}"
                self._add("hidden", axis, name, stack.prefix)
        for stack in self.stacks:
            for block in stack.blocks:
                for twin in (block, *block.twins):
                    self._block(stack, twin, block.index)
        self._vocabulary()
        self._encoder_states()
        self._left()
        return tuple(self._finish(group) for group in self._coupled())

    def _coupled(self) -> list[list[_Found]]:
        """Group what shares an atom in the same role: axes the graph couples are one dimension."""
        groups: list[list[_Found]] = []
        by_leaf: dict[tuple[int, str, int], list[_Found]] = {}
        for entry in self.found.values():
            keys = [(id(leaf), entry.role, entry.axis.size[0]) for leaf in leaves(entry.axis)]
            group = next((by_leaf[key] for key in keys if key in by_leaf), None)
            if group is None:
                group = []
                groups.append(group)
            group.append(entry)
            by_leaf.update(dict.fromkeys(keys, group))
        return groups

    # what carries a leaf ----------------------------------------------------------------------------------------

    def _carriers(self) -> dict[int, set[str]]:
        """Return, per leaf, the names of the float initializers (or float inputs) that carry it."""
        carriers: dict[int, set[str]] = defaultdict(set)
        for name, uses in self.typing.uses.items():
            for use in uses:
                if use.node is not None and not is_weight(use):
                    continue
                for axis in use.axes:
                    for leaf in leaves(axis):
                        if not is_fill(leaf):
                            carriers[id(leaf)].add(name)
        return carriers

    def _fed(self) -> set[int]:
        """Return the locked atoms of graph inputs: their batch and length, where the export fixed them."""
        axes = (axis for tensor in self.graph.inputs for axis in self.typing.types.get(tensor.name) or ())
        return {id(leaf) for axis in axes for leaf in leaves(axis) if leaf.lock is not None}

    def _weights_of(self, axes: Iterable[Axis]) -> int:
        return len(set().union(*(self.carriers.get(id(leaf), set()) for axis in axes for leaf in leaves(axis)), set()))

    # collecting -------------------------------------------------------------------------------------------------

    def _add(self, role: str, axis: Axis, name: str, stack: str = "", block: int | None = None) -> None:
        axis = find(axis)
        if is_unit(axis) or not is_static(axis):
            return
        entry = self.found.setdefault((axis_key(axis), role), _Found(role, axis, stack=stack))
        if name not in entry.names:
            entry.names.append(name)
        if block is not None and block not in entry.blocks:
            entry.blocks.append(block)
        self.taken |= {id(leaf) for leaf in leaves(axis)}

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
                for role, axis in self._attention_axes(i, half.nodes):
                    self._add(role, axis, f"{base}{before}{role}", stack.prefix, index)
        for half in block.halves:
            self._experts(half.nodes, base, stack.prefix, index)
        self._feed_forward([i for half in block.halves for i in half.nodes], base, stack.prefix, index)

    def _attention_axes(self, index: int, within: Sequence[int]) -> list[tuple[str, Axis]]:
        """Return the roles of the axes around one attention: heads (grouped or not), head_dim, v_head_dim."""
        node = self.nodes[index]
        if node.op.type in ATTENTION_OPS:
            return self._fused_axes(node)
        mix = self.contractions[index]
        scores = self._scores_before(index, within)
        heads = self._carried(_static_parts(mix.shared))
        if scores is not None:
            heads = self._carried(_static_parts(scores.shared)) or heads
        roles = self._head_roles(heads)
        inner = [axis for axis in (scores.contracted if scores else ()) if is_static(axis)]
        roles += [("head_dim", axis) for axis in inner[:1]]
        contracted = {id(find(axis)) for axis in mix.contracted}
        value = [
            axis
            for axis in node.outputs[0] or ()
            if is_static(axis) and not is_unit(axis) and id(find(axis)) not in contracted
        ]
        known = {id(leaf) for axis in heads for leaf in leaves(axis)} | {id(find(axis)) for axis in inner}
        known |= {id(leaf) for axis in inner for leaf in leaves(axis)}
        values = [axis for axis in value if id(find(axis)) not in known and not {id(x) for x in leaves(axis)} <= known]
        role = "v_head_dim" if inner else "head_dim"
        return roles + [(role, axis) for axis in values[-1:]]

    def _carried(self, axes: list[Axis]) -> list[Axis]:
        """Leave out axes that are an input's, or that no initializer carries: a static batch is no head."""
        mixed = [any(id(leaf) in self.fed for leaf in leaves(axis)) for axis in axes]
        parts = [p for axis, split in zip(axes, mixed) for p in (_outer_parts(axis) if split else (axis,))]
        parts = [axis for axis in parts if not {id(leaf) for leaf in leaves(axis)} <= self.fed]
        return [axis for axis in parts if any(self.carriers.get(id(leaf)) for leaf in leaves(axis))] or parts or axes

    def _head_roles(self, heads: list[Axis]) -> list[tuple[str, Axis]]:
        if not heads:
            return []
        if len(heads) == 1 and find(heads[0]).kind == "atom":
            return [("heads", heads[0])]
        flat = [part for axis in heads for part in _outer_parts(axis)]
        flat = [part for part in flat if is_static(part) and not is_unit(part)]
        if len(flat) == 1:
            return [("heads", flat[0])]
        return list(zip(("kv_heads", "queries_per_kv"), flat[:2]))

    def _fused_axes(self, node: TypedNode) -> list[tuple[str, Axis]]:
        bound = node.bound
        size = lambda name: name in bound and not is_unit(bound[name])  # noqa: E731
        roles: list[tuple[str, Axis]] = []
        if "h" in bound:
            roles.append(("heads", bound["h"]))
        elif size("r") and size("g"):
            roles += [("kv_heads", bound["g"]), ("queries_per_kv", bound["r"])]
        elif size("r"):
            roles.append(("heads", bound["r"]))
        elif "g" in bound:
            roles += self._head_roles([bound["g"]])
        if "d" in bound:
            roles.append(("head_dim", bound["d"]))
        elif "p" in bound:
            roles.append(("head_dim", node.outputs[0][-1]) if node.op.rank(0) == 4 else ("head_dim", bound["p"]))
        if "v" in bound and find(bound["v"]) is not find(bound["d"]):
            roles.append(("v_head_dim", bound["v"]))
        return roles

    def _scores_before(self, index: int, within: Sequence[int]) -> Contraction | None:
        """Return the contraction of queries with keys whose scores the attention at `index` mixes by."""
        for i in reversed([i for i in within if i < index]):
            contraction = self.contractions[i]
            if contraction is not None and contraction.weight is None and i != index:
                outputs = {id(find(axis)) for axis in self.nodes[i].outputs[0] or ()}
                if any(id(find(axis)) in outputs for axis in self.contractions[index].contracted):
                    return contraction
        return None

    def _experts(self, nodes: Sequence[int], base: str, prefix: str, block: int) -> None:
        inside = {self.nodes[i].op.where for i in nodes}
        for axis, _, where in self.typing.minimum:
            if where in inside and find(axis).kind == "atom":
                self._add("experts", axis, f"{base}experts", prefix, block)

    def _feed_forward(self, nodes: Sequence[int], base: str, prefix: str, block: int) -> None:
        """Name what weights contract inside a block and nothing else has named: the widest is the ffn."""
        widths: dict[int, Axis] = {}
        keys: dict[int, tuple] = {}
        taken = self.taken - self.ffn_leaves
        for i in nodes:
            contraction = self.contractions[i]
            if contraction is None or contraction.weight is None:
                continue
            for axis in contraction.contracted:
                for width in [find(axis)] if _is_in_groups(axis) else leaves(axis):
                    free = not {id(leaf) for leaf in leaves(width)} & taken
                    if free and is_static(width) and not is_unit(width) and self._weights_of([width]):
                        widths.setdefault(id(width), width)
                        key = self.places.key(i, width)
                        keys[id(width)] = min(key, keys.get(id(width), key))
        if not widths:
            return
        main = max(widths.values(), key=lambda width: (lock_of(width) is None, width.size[0] * self._weights_of([width])))
        others = sorted((width for width in widths.values() if width is not main), key=lambda width: keys[id(width)])
        for number, width in enumerate(others):
            self._add("ffn", width, f"{base}ffn_{number}", prefix, block)
        self._add("ffn", main, f"{base}ffn", prefix, block)
        self.ffn_leaves |= {id(leaf) for width in widths.values() for leaf in leaves(width)}

    def _vocabulary(self) -> None:
        """Name what ids range over, what logits have first, then the largest; an untied head's output goes with it."""
        logits = {id(find(a[-1])) for t in self.graph.outputs if (a := self.typing.types.get(t.name))}
        ids = [(name, axis) for name, axis in self.typing.index_axes.items() if is_static(axis)]
        distinct = {axis_key(axis): axis for _, axis in ids}
        order = {name: number for number, name in enumerate(tensor.name for tensor in self.graph.inputs)}
        first = {key: min(order[n] for n, a in ids if axis_key(a) == key) for key in distinct}
        axes = sorted(distinct.values(), key=lambda axis: (id(find(axis)) not in logits, -axis.size[0], first[axis_key(axis)]))
        for number, axis in enumerate(axes):
            name = "vocab" if number == 0 else f"vocab_{number}"
            self._add("vocab", axis, name)
            if number == 0:
                self._untied_head(axis)

    def _untied_head(self, vocab: Axis) -> None:
        """Let the width of logits, a vector for each id, go with the vocabulary; a pooled output may have its size too."""
        ids = [name for name, axis in self.typing.index_axes.items() if find(axis) is find(vocab)]
        ranks = {len(self.typing.types[name]) for name in ids if self.typing.types.get(name)}
        for tensor in self.graph.outputs:
            axes = self.typing.types.get(tensor.name)
            last = find(axes[-1]) if axes and len(axes) - 1 in ranks else None
            if last is not None and last.kind == "atom" and last.size == vocab.size and id(last) not in self.taken:
                self.found[axis_key(vocab), "vocab"].names.append(f"={id(last)}")
                self.heads[id(last)] = last
                self.taken.add(id(last))

    def _encoder_states(self) -> None:
        """Name the width of states that a decoder's cross-attention reads from a graph input."""
        crosses = any(h.kind == "cross_attention" for stack in self.stacks for b in stack.blocks for h in b.halves)
        for tensor in self.graph.inputs if crosses else ():
            axes = self.typing.types.get(tensor.name) or ()
            if len(axes) == 3 and is_static(axes[2]) and id(find(axes[2])) not in self.taken and axes[2].lock is None:
                self._add("hidden", axes[2], "encoder.hidden")

    def _left(self) -> None:
        """Name what is left: `stem_n` on the way into a stack, `head_n` elsewhere, `inner` (`inner_n`) inside a block.

        Numbers follow what the graph computes, not how its nodes happen to be ordered: exporters differ in that.
        """
        places = self.places
        uses: dict[int, list[tuple[tuple, int, int, Axis]]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for slot, tensor in enumerate(node.op.node.inputs):
                if not isinstance(tensor, gs.Constant) or slot >= len(node.op.axes) or node.op.axes[slot] is None:
                    continue
                for axis in node.op.axes[slot]:
                    for leaf in leaves(axis):
                        if id(leaf) not in self.taken and not is_unit(leaf) and self.carriers.get(id(leaf)):
                            uses[id(leaf)].append((places.key(i, leaf), i, slot, leaf))
        found = sorted((min(use, key=lambda use: use[:3]) for use in uses.values()), key=lambda use: use[:3])
        numbers: Counter = Counter()
        inner: dict[str, list[tuple[Axis, str, int]]] = defaultdict(list)
        for _, i, slot, leaf in found:
            blocks = dict.fromkeys(places.blocks[other] for _, other, *_ in uses[id(leaf)])
            if leaf.lock is not None:
                self._add("free", leaf, self._fixed_name(leaf, self.nodes[i], slot))
            elif None in blocks:
                kind = places.kind(other for _, other, *_ in uses[id(leaf)])
                self._add("free", leaf, f"{kind}_{numbers[kind]}")
                numbers[kind] += 1
            else:
                for prefix, index in blocks:
                    inner[f"{prefix}blocks.{index}.inner"].append((leaf, prefix, index))
        for name, members in inner.items():
            for number, (leaf, prefix, index) in enumerate(members):
                self._add("free", leaf, name if len(members) == 1 else f"{name}_{number}", prefix, index)

    def _fixed_name(self, leaf: Axis, node: TypedNode, slot: int) -> str:
        """Name a locked width that nothing else names: channels, kernel, packing, unknown or positions, numbered."""
        if "of graph input" in leaf.lock:
            kind = "channels"
        elif leaf.lock.startswith("no axis rule"):
            kind = "unknown"
        elif node.op.type.startswith("Conv") and slot == 1:
            kind = "kernel"
        elif node.op.type in BLOCKWISE:
            kind = "packing"
        else:
            kind = "positions"
        taken = {name for entry in self.found.values() for name in entry.names}
        return next(name for name in (kind, *(f"{kind}_{n}" for n in range(1, 10_000))) if name not in taken)

    # finishing --------------------------------------------------------------------------------------------------

    def _finish(self, group: list[_Found]) -> Dimension:
        axes, names = [], []
        for entry in group:
            axes.append(entry.axis)
            for name in entry.names:
                if name.startswith("="):
                    axes.append(self.heads[int(name[1:])])
                elif name not in names:
                    names.append(name)
        first = group[0]
        if first.role == "hidden" and len(names) > 1 and "hidden" not in names:
            names.insert(0, "hidden")
        roots = {id(entry.axis) for entry in group}
        least = [n for axis, n, _ in self.typing.minimum if id(find(axis)) in roots]
        return Dimension(
            names[0],
            first.axis.size[0],
            first.role,
            tuple(axes),
            tuple(names[1:]),
            next((reason for axis in axes if (reason := lock_of(axis))), None),
            first.stack,
            tuple(sorted({block for entry in group for block in entry.blocks})),
            self._weights_of(axes),
            max(least, default=1),
        )


class _Places:
    """Where nodes stand in what the graph computes, whatever their order in the file.

    blocks: per node, the (stack prefix, block) that it is inside of, or None.
    """

    def __init__(self, nodes: Sequence[TypedNode], contractions: Sequence[Contraction | None], stacks, graph: gs.Graph):
        self.contractions = contractions
        self.blocks: list[tuple[str, int] | None] = [None] * len(nodes)
        for stack in stacks:
            for block in stack.blocks:
                for i in (i for twin in (block, *block.twins) for half in twin.halves for i in half.nodes):
                    self.blocks[i] = self.blocks[i] or (stack.prefix, block.index)
        reads = [[t.name for t in node.op.node.inputs if not isinstance(t, gs.Constant)] for node in nodes]
        gives = [[t.name for t in node.op.node.outputs if t.name] for node in nodes]
        self.depth = _depths(reads, gives, [c is not None and c.weight is not None for c in contractions])
        self.first_input = _firsts(reads, gives, [tensor.name for tensor in graph.inputs])
        self._adopt(reads, gives, len(graph.inputs))
        self.first_output = _firsts(gives[::-1], reads[::-1], [tensor.name for tensor in graph.outputs])[::-1]
        ends = {stack.points[-1] for stack in stacks}
        self.feeds = [first < len(ends) for first in _firsts(gives[::-1], reads[::-1], sorted(ends))[::-1]]
        self.follows = [first < len(ends) for first in _firsts(reads, gives, sorted(ends))]

    def _adopt(self, reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], inputs: int) -> None:
        """Count what is computed of weights alone to the block that reads it."""
        readers: dict[str, set] = defaultdict(set)
        for i in reversed(range(len(reads))):
            if self.first_input[i] == inputs and self.blocks[i] is None:
                found = set().union(*(readers[name] for name in gives[i]))
                self.blocks[i] = next(iter(found)) if len(found) == 1 else None
            for name in reads[i]:
                readers[name].add(self.blocks[i])

    def key(self, node: int, leaf: Axis) -> tuple:
        """Return what sorts a width used by a node: by how many linear operators are before it, inputs and outputs."""
        contraction = self.contractions[node]
        read = contraction is not None and any(leaf is other for axis in contraction.contracted for other in leaves(axis))
        return (self.depth[node] - read, self.first_input[node], self.first_output[node])

    def kind(self, nodes: Iterable[int]) -> str:
        """Return `stem` for what some of the nodes contribute to a stack, else `head`."""
        return "stem" if any(self.feeds[i] and not self.follows[i] for i in nodes) else "head"


def _depths(reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], counts: Sequence[bool]) -> list[int]:
    """Return how many of the counted nodes the longest way to each node crosses, itself included."""
    depth: dict[str, int] = {}
    found = []
    for names, outputs, counted in zip(reads, gives, counts, strict=True):
        found.append(max((depth.get(name, 0) for name in names), default=0) + counted)
        depth.update(dict.fromkeys(outputs, found[-1]))
    return found


def _firsts(reads: Sequence[Sequence[str]], gives: Sequence[Sequence[str]], starts: Sequence[str]) -> list[int]:
    """Return the number of the first start that each node descends from, or how many there are."""
    first = {name: number for number, name in enumerate(starts)}
    found = []
    for names, outputs in zip(reads, gives, strict=True):
        found.append(min((first.get(name, len(starts)) for name in names), default=len(starts)))
        for name in outputs:
            first[name] = min(found[-1], first.get(name, len(starts)))
    return found


def lock_of(axis: Axis) -> str | None:
    """Return why an axis cannot be cut, or None; of a product one factor suffices: it is then cut in whole groups."""
    axis = find(axis)
    if axis.kind != "product":
        return first_lock(axis)
    parts = [part for part in axis.parts if not is_unit(part)]
    return None if any(lock_of(part) is None for part in parts) else first_lock(axis)


def _is_in_groups(axis: Axis) -> bool:
    """Tell whether an axis is cut in whole groups: a product with a factor that is locked and one that is not."""
    return find(axis).kind == "product" and lock_of(axis) is None and first_lock(axis) is not None


def _static_parts(axes: Iterable[Axis]) -> list[Axis]:
    """Return the static axes larger than one; where there is none, those inside products (batch x heads)."""
    axes = list(axes)
    static = [axis for axis in axes if is_static(axis) and not is_unit(axis)]
    return static or [part for axis in axes for part in _outer_parts(axis) if is_static(part) and not is_unit(part)]


def _outer_parts(axis: Axis) -> tuple[Axis, ...]:
    axis = find(axis)
    return tuple(find(part) for part in axis.parts) if axis.kind == "product" else (axis,)


def axis_key(axis: Axis) -> tuple:
    """Return what two axes share when they are made of the same atoms in the same way."""
    axis = find(axis)
    return (id(axis),) if axis.kind == "atom" else (axis.kind, *(axis_key(part) for part in axis.parts))


def natural(name: str) -> list:
    """Return a key that sorts `blocks.10` behind `blocks.9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
