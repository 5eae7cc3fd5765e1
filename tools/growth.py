"""Grow small transformer-like graphs from a recipe: attention, gates, norms and shapes as exporters write them.

A recipe says what the graph is made of, so that a failing one can be written down as a test; `grow` writes it with the
operators themselves. Each width that is free to cut is noted, so that a rule which locks too much shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

POSITIONS = 64  # rows of every table of positions: more than any probe is long
VOCABULARY = 19


@dataclass(frozen=True)
class Writing:
    """How the graph is written. reshape: where a target's sizes come from. cut: how a tensor is taken apart.
    linear: how a projection is written."""

    reshape: str = "constant"
    cut: str = "split"
    linear: str = "matmul"


@dataclass(frozen=True)
class Attention:
    """projection: how queries, keys and values are made. position: how they learn of their place. mixing: what computes
    the scores. repeat: how grouped keys meet their queries. mask: what is added. scale: what scales the scores."""

    projection: str = "separate"
    position: str = "none"
    mixing: str = "composed"
    groups: int = 1
    repeat: str = "expand"
    mask: str = "none"
    scale: str = "divide"
    softmax: str = "fused"


@dataclass(frozen=True)
class FeedForward:
    kind: str = "plain"
    activation: str = "Relu"


@dataclass(frozen=True)
class Block:
    """placement: where the norms are. shared: the previous block once more, with its weights. branch: whether the FFN
    is in an If. detour: what the stream goes through behind the block, and comes out of whole."""

    attention: Attention | None = Attention()
    ffn: FeedForward = FeedForward()
    placement: str = "pre"
    shared: bool = False
    branch: str = "none"
    detour: str = "none"


@dataclass(frozen=True)
class Recipe:
    blocks: tuple[Block, ...] = (Block(),)
    entry: str = "ids"
    norm: str = "fused"
    exit: str = "stream"
    writing: Writing = Writing()
    opset: int = 18
    hidden: int = 12
    heads: int = 3
    head: int = 4
    ffn: int = 10


CHOICES: dict[type, dict[str, tuple]] = {
    Writing: {
        "reshape": ("constant", "zero", "gathered", "sliced", "one_gather", "ranged"),
        "cut": ("split", "slice", "gather"),
        "linear": ("matmul", "transposed", "gemm", "einsum", "dequantized"),
    },
    Attention: {
        "projection": ("separate", "thirds", "by_head", "by_kind", "einsum"),
        "position": (
            "none",
            "halves",
            "halves",
            "interleaved",
            "operator",
            "partial",
            "frequencies",
            "slopes",
            "relative",
            "norm",
        ),
        "mixing": (
            "composed",
            "composed",
            "composed",
            "einsum",
            "Attention",
            "Attention4",
            "MultiHeadAttention",
            "flat",
        ),
        "groups": (1, 1, 2, 3),
        "repeat": ("expand", "tile", "broadcast", "gather", "concat"),
        "mask": ("none", "padding", "causal", "fill", "where", "expanded"),
        "scale": ("divide", "queries", "keys", "shape", "softcap"),
        "softmax": ("fused", "written"),
    },
    FeedForward: {
        "kind": (
            "plain",
            "gated",
            "gated_joint",
            "gated_pairs",
            "gated_strided",
            "pointwise",
            "depthwise",
            "experts",
            "picked_experts",
            "two_paths",
            "flat",
            "low_rank",
        ),
        "activation": ("Relu", "Tanh", "erf", "silu", "cubic"),
    },
    Block: {
        "placement": ("pre", "post", "parallel", "sandwich"),
        "shared": (False, False, True),
        "branch": ("none", "none", "none", "skip", "either"),
        "detour": ("none", "none", "halves", "flat", "transposed", "weighted_half", "padded", "scaled"),
    },
    Recipe: {
        "entry": ("ids", "positions", "ranged_positions", "segments", "floats", "image", "tokens"),
        "norm": (
            "fused",
            "rms",
            "written",
            "rms_written",
            "float_width",
            "float_reciprocal",
            "computed_width",
            "uniform",
            "group",
            "instance",
            "none",
        ),
        "exit": ("stream", "tied", "untied", "first", "mean", "argmax", "both"),
        "opset": (18, 17, 13, 21, 23),
        "hidden": (12, 8, 16, 18, 24),
        "heads": (3, 2, 4),
        "head": (4, 6, 8),
        "ffn": (10, 7, 12, 14, 24),
    },
}
"""What each field of a recipe may be; the first is the simplest."""


@dataclass
class Grown:
    """proto: the model. widths: (initializer, axis) pairs of which something must be free to cut."""

    proto: ModelProto
    widths: list[tuple[str, int]] = field(default_factory=list)


def grow(recipe: Recipe) -> Grown:
    """Return the graph of a recipe, its weights seeded.

    >>> [node.op_type for node in grow(Recipe(blocks=())).proto.graph.node]
    ['Gather', 'LayerNormalization']
    """
    writer = _Writer(recipe)
    x = writer.entry()
    previous = Block()
    for number, block in enumerate(recipe.blocks):
        if block.shared and number:
            block = previous
        else:
            writer.scope = f"block{number}"
        previous = block
        x = writer.block(x, block)
    writer.scope = "model"
    writer.exit(x if any(b.placement == "post" for b in recipe.blocks[-1:]) else writer.norm(x, "last"))
    return writer.finish()


class _Writer:
    """Writes nodes; each method returns the name of what it made."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.how = recipe.writing
        self.random = np.random.default_rng(7)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.widths: list[tuple[str, int]] = []
        self.scope = "model"
        self.count = 0
        self.inside = False  # a branch
        self.opset = max([recipe.opset, *(_needs(block) for block in recipe.blocks), _NORMS.get(recipe.norm, 0)])

    def finish(self) -> Grown:
        graph = helper.make_graph(self.nodes, "grown", self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return Grown(helper.make_model(graph, ir_version=10, opset_imports=opsets), self.widths)

    # words ------------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, count: int = 1, domain: str = "", **attributes) -> str | list[str]:
        self.count += 1
        names = [f"{kind.lower()}_{self.count}" + (f"_{i}" if i else "") for i in range(count)]
        node = helper.make_node(kind, inputs, names, f"{kind}_{self.count}", domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if count == 1 else names

    def number(self, *values: int, flat: bool = True) -> str:
        """Return a constant of whole numbers; one alone is a vector unless `flat` is False."""
        array = np.array(values if flat else values[0], np.int64)
        name = f"i{'_'.join(map(str, values)).replace('-', 'm')}{'' if flat else 's'}"
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name

    def real(self, value, name: str = "") -> str:
        array = np.asarray(value, np.float32)
        self.count += 1
        name = name or f"c_{self.count}"
        self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, *shape: int, free: Sequence[int] = (), spread: float = 1.0, middle: float = 0.0) -> str:
        """Return an initializer of this scope, new or that of a block sharing it; `free` are axes that can be cut."""
        name = f"{self.scope}.{name}"
        if name not in self.initializers:
            fan = shape[-2] if len(shape) > 1 else 4
            values = middle + spread * self.random.standard_normal(shape) / np.sqrt(fan)
            self.initializers[name] = onnx.numpy_helper.from_array(values.astype(np.float32), name)
            self.widths += [(name, axis) for axis in free]
        return name

    def graph_input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        if name not in [known.name for known in self.inputs]:
            self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def graph_output(self, name: str, rank: int = 3, kind: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, [None] * rank))

    @contextmanager
    def body(self) -> Iterator[list[onnx.NodeProto]]:
        outer, self.nodes, self.inside = self.nodes, [], True
        try:
            yield self.nodes
        finally:
            self.nodes, self.inside = outer, False

    # shapes -----------------------------------------------------------------------------------------------------

    def size(self, x: str, axis: int) -> str:
        """Return one size of a tensor as a vector of one number, computed."""
        if self.how.reshape == "sliced" and self.opset >= 15:
            return self.op("Shape", x, start=axis, end=axis + 1)
        if self.how.reshape in ("sliced", "ranged"):
            return self.op("Slice", self.op("Shape", x), self.number(axis), self.number(axis + 1), self.number(0))
        picked = self.op("Gather", self.op("Shape", x), self.number(axis, flat=False), axis=0)
        return self.op("Unsqueeze", picked, self.number(0))

    def reshape(self, x: str, like: str, target: Sequence[int | str]) -> str:
        """Reshape `x`; a target entry is a size, "B" or "S" (the first sizes of `like`), or -1."""
        dynamic = {"B": 0, "S": 1}
        if self.how.reshape == "zero" and list(target[:2]) == ["B", "S"] and like == x:
            sizes = self.number(0, 0, *(-1 if i == len(target) - 1 else n for i, n in enumerate(target[2:], 2)))
        elif self.how.reshape == "constant" and "S" not in target and -1 not in target and "B" in target:
            sizes = self.number(*(-1 if n == "B" else n for n in target))
        elif self.how.reshape == "constant" and list(target[:2]) == ["B", "S"] and like == x:
            sizes = self.number(0, 0, *target[2:])
        elif not set(target) & dynamic.keys():
            sizes = self.number(*target)
        else:
            if self.how.reshape == "one_gather" and list(target[:2]) == ["B", "S"]:
                parts = [self.op("Gather", self.op("Shape", like), self.number(0, 1), axis=0), self.number(*target[2:])]
            elif self.how.reshape == "ranged" and list(target[:2]) == ["B", "S"]:
                lead = self.op("Slice", self.op("Shape", like), self.number(0), self.number(2))
                parts = [lead, self.number(*target[2:])]
            else:
                parts = [self.size(like, dynamic[n]) if n in dynamic else self.number(n) for n in target]
            sizes = self.op("Concat", *parts, axis=0)
        return self.op("Reshape", x, sizes)

    def transpose(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=list(order))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.number(*axes))

    def reduce(self, kind: str, x: str, axis: int = -1, keep: int = 1) -> str:
        if self.opset >= 18 or kind == "ReduceSum":
            return self.op(kind, x, self.number(axis), keepdims=keep)
        return self.op(kind, x, axes=[axis], keepdims=keep)

    def parts(self, x: str, sizes: Sequence[int], axis: int = -1, how: str = "") -> list[str]:
        """Take a tensor apart along one axis, as Split, as slices, or as Gathers of constant runs."""
        how = how or self.how.cut
        if len(sizes) == 1:
            return [x]
        if how == "split":
            return self.op("Split", x, self.number(*sizes), count=len(sizes), axis=axis)
        ends = np.cumsum(sizes)
        taken = []
        for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            if how == "gather" and len(sizes) < 4:
                taken.append(self.op("Gather", x, self.number(*range(end - size, end)), axis=axis))
                continue
            stop = np.iinfo(np.int64).max if i == len(sizes) - 1 else int(end)
            taken.append(self.op("Slice", x, self.number(int(end - size)), self.number(stop), self.number(axis)))
        return taken

    # pieces -----------------------------------------------------------------------------------------------------

    def linear(self, x: str, name: str, ins: int, outs: int, *, free: Sequence[int] = (0, 1), bias: bool = True) -> str:
        """Project the last axis of a 3-D tensor."""
        how = self.how.linear
        if how == "gemm":
            flat = self.reshape(x, x, [-1, ins])
            w = self.weight(name, outs, ins, free=[1 - axis for axis in free], spread=(outs / ins) ** 0.5)
            y = self.op("Gemm", flat, w, self.weight(f"{name}_bias", outs), transB=1)
            return self.reshape(y, x, ["B", "S", outs])
        if how == "transposed":
            w = self.weight(name, outs, ins, free=[1 - axis for axis in free], spread=(outs / ins) ** 0.5)
            y = self.op("MatMul", x, self.transpose(w, 1, 0))
        elif how == "dequantized" and not self.inside:  # in a branch onnxruntime's own optimizer loses the weight
            y = self.op("MatMul", x, self._dequantized(name, ins, outs, free))
        elif how == "einsum":
            y = self.op("Einsum", x, self.weight(name, ins, outs, free=free), equation="bsi,io->bso")
        else:
            y = self.op("MatMul", x, self.weight(name, ins, outs, free=free))
        return self.op("Add", self.weight(f"{name}_bias", outs), y) if bias else y

    def _dequantized(self, name: str, ins: int, outs: int, free: Sequence[int]) -> str:
        """Return a matrix of whole numbers times a scale for each column."""
        whole = f"{self.scope}.{name}"
        if whole not in self.initializers:
            values = self.random.integers(-100, 100, (ins, outs), dtype=np.int8)
            self.initializers[whole] = onnx.numpy_helper.from_array(values, whole)
            self.widths += [(whole, axis) for axis in free]
        step = 1 / (58 * ins**0.5)  # the whole numbers deviate by 58
        scale = self.weight(f"{name}_scale", outs, middle=step, spread=step / 5)
        zero = f"{self.scope}.{name}_zero"
        self.initializers[zero] = onnx.numpy_helper.from_array(np.arange(outs).astype(np.int8) % 5, zero)
        return self.op("DequantizeLinear", whole, scale, zero, axis=1)

    def activate(self, x: str, kind: str) -> str:
        if kind == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if kind == "erf":
            inner = self.op("Erf", self.op("Div", x, self.real(1.4142)))
            return self.op("Mul", self.op("Mul", x, self.op("Add", inner, self.real(1.0))), self.real(0.5))
        if kind == "cubic":
            cube = self.op("Mul", self.op("Pow", x, self.real(3.0)), self.real(0.044715))
            inner = self.op("Tanh", self.op("Mul", self.op("Add", x, cube), self.real(0.7978)))
            return self.op("Mul", x, self.op("Add", inner, self.real(1.0)))
        return self.op(kind, x)

    def norm(self, x: str, name: str, width: int = 0) -> str:
        """Normalise the last axis, as the recipe writes it."""
        kind, width = self.recipe.norm, width or self.recipe.hidden
        if kind == "none":
            return x
        if kind in ("group", "instance"):
            return self._channel_norm(x, name, kind, width)
        gain = self.weight(f"{name}_gain", width, spread=0.5, middle=1.0, free=[0])
        if kind == "rms":
            if self.opset >= 23:
                return self.op("RMSNormalization", x, gain, axis=-1)
            return self.op("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=1e-5)
        if kind == "fused" and self.opset >= 17:
            return self.op("LayerNormalization", x, gain, self.weight(f"{name}_shift", width), axis=-1)
        if kind == "rms_written":
            square = self.op("Mul", x, x)
            mean = self.op("Add", self._mean(square, width, kind), self.real(1e-5))
            return self.op("Mul", gain, self.op("Mul", x, self.op("Reciprocal", self.op("Sqrt", mean))))
        centred = self.op("Sub", x, self._mean(x, width, kind))
        mean = self._mean(self.op("Pow", centred, self.real(2.0)), width, kind)
        deviation = self.op("Sqrt", self.op("Add", mean, self.real(1e-5)))
        scaled = self.op("Mul", self.op("Div", centred, deviation), gain)
        return self.op("Add", scaled, self.weight(f"{name}_shift", width))

    def _mean(self, x: str, width: int, kind: str) -> str:
        if kind == "float_width":
            return self.op("Div", self.reduce("ReduceSum", x), self.real(float(width)))
        if kind == "float_reciprocal":
            return self.op("Mul", self.real(1 / width), self.reduce("ReduceSum", x))
        if kind == "computed_width":
            size = self.op("Cast", self.size(x, 2), to=TensorProto.FLOAT)
            return self.op("Div", self.reduce("ReduceSum", x), size)
        if kind == "uniform":
            return self.op("MatMul", x, self.real(np.full((width, 1), 1 / width)))
        return self.reduce("ReduceMean", x)

    def _channel_norm(self, x: str, name: str, kind: str, width: int) -> str:
        turned = self.transpose(x, 0, 2, 1)
        gain, shift = self.weight(f"{name}_gain", width, middle=1.0), self.weight(f"{name}_shift", width)
        if kind == "group":
            y = self.op("GroupNormalization", turned, gain, shift, num_groups=2)
        else:
            y = self.op("InstanceNormalization", turned, gain, shift)
        return self.transpose(y, 0, 2, 1)

    # the entry --------------------------------------------------------------------------------------------------

    def entry(self) -> str:
        kind, width = self.recipe.entry, self.recipe.hidden
        self.scope = "entry"
        if kind == "floats":
            x = self.graph_input("x", TensorProto.FLOAT, ["B", "S", 9])
            return self.linear(x, "project", 9, width, free=[1])
        if kind == "tokens":
            x = self.graph_input("inputs_embeds", TensorProto.FLOAT, ["B", "S", width])
            return self.op("Add", x, self.weight("kind", width, free=[0]))
        if kind == "image":
            return self._patches(width)
        ids = self.graph_input("input_ids", TensorProto.INT64, ["B", "S"])
        table = self.weight("table", VOCABULARY, width, spread=VOCABULARY**0.5, free=[0, 1])
        x = self.op("Gather", table, ids, axis=0)
        if kind == "segments":
            segments = self.graph_input("token_type_ids", TensorProto.INT64, ["B", "S"])
            x = self.op("Add", x, self.op("Gather", self.weight("segments", 3, width, free=[1]), segments, axis=0))
        if kind in ("positions", "segments"):
            places = self.weight("places", POSITIONS, width, spread=4.0, free=[1])
            length = self.size(ids, 1)
            x = self.op("Add", x, self.op("Slice", places, self.number(0), length, self.number(0)))
        if kind == "ranged_positions":
            places = self.weight("places", POSITIONS, width, spread=4.0, free=[1])
            x = self.op("Add", x, self.op("Gather", places, self.range_of(ids), axis=0))
        return x

    def range_of(self, ids: str) -> str:
        """Return the positions 0, 1, ... of a sequence [B, S, ...] as a vector."""
        length = self.op("Squeeze", self.size(ids, 1), self.number(0))
        return self.op("Range", self.number(0, flat=False), length, self.number(1, flat=False))

    def _patches(self, width: int) -> str:
        pixels = self.graph_input("pixel_values", TensorProto.FLOAT, ["B", 3, 8, 12])
        kernel = self.weight("patch", width, 3, 4, 4, free=[0])
        x = self.op("Conv", pixels, kernel, self.weight("patch_bias", width), kernel_shape=[4, 4], strides=[4, 4])
        batch = self.size(pixels, 0)
        if self.how.reshape in ("zero", "constant"):
            flat = self.op("Reshape", x, self.number(0, 0, -1))
        else:
            flat = self.op("Reshape", x, self.op("Concat", batch, self.size(x, 1), self.number(-1), axis=0))
        x = self.transpose(flat, 0, 2, 1)
        token = self.weight("class", 1, 1, width)
        if self.how.reshape == "sliced":  # as the TorchScript exporter writes expand(-1, -1, -1)
            wanted = self.op("Concat", batch, self.number(-1, -1), axis=0)
            ones = self.op("ConstantOfShape", self.number(3), value=_one(np.int64))
            wanted = self.op("Where", self.op("Equal", wanted, self.op("Mul", ones, self.number(-1))), ones, wanted)
        else:
            wanted = self.op("Concat", batch, self.number(1, width), axis=0)
        x = self.op("Concat", self.op("Expand", token, wanted), x, axis=1)
        return self.op("Add", x, self.weight("places", 1, 7, width, free=[2]))

    # blocks -----------------------------------------------------------------------------------------------------

    def block(self, x: str, block: Block) -> str:
        attend = (lambda y: self.attention(y, block.attention)) if block.attention else (lambda y: y)
        feed = lambda y: self.branch(y, block)  # noqa: E731
        if block.placement == "parallel" and block.attention:
            y = self.norm(x, "norm")
            x = self.op("Add", self.op("Add", attend(y), feed(y)), x)
        elif block.placement == "post":
            x = self.norm(self.op("Add", x, attend(x)), "norm_0") if block.attention else x
            x = self.norm(self.op("Add", feed(x), x), "norm_1")
        elif block.placement == "sandwich":
            x = self.op("Add", x, self.norm(attend(self.norm(x, "norm_0")), "norm_1")) if block.attention else x
            x = self.op("Add", x, self.norm(feed(self.norm(x, "norm_2")), "norm_3"))
        else:
            x = self.op("Add", x, attend(self.norm(x, "norm_0"))) if block.attention else x
            x = self.op("Add", x, feed(self.norm(x, "norm_1")))
        return self.detour(x, block.detour)

    def branch(self, x: str, block: Block) -> str:
        """Run the FFN, perhaps in a branch that the length of the sequence decides."""
        if block.branch == "none":
            return self.feed_forward(x, block.ffn, "")
        long = self.op("Greater", self.op("Squeeze", self.size(x, 1), self.number(0)), self.number(6, flat=False))
        bodies = []
        for name in ("then_branch", "else_branch"):
            with self.body() as nodes:
                if name == "then_branch":
                    y = self.feed_forward(x, block.ffn, "")
                else:
                    y = (
                        self.op("Identity", x)
                        if block.branch == "skip"
                        else self.feed_forward(x, FeedForward(), "else_")
                    )
            bodies.append(
                helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(y, TensorProto.FLOAT, [None] * 3)])
            )
        return self.op("If", long, then_branch=bodies[0], else_branch=bodies[1])

    def detour(self, x: str, kind: str) -> str:
        width = self.recipe.hidden
        if kind == "halves":
            first, second = self.parts(x, [width // 2, width - width // 2])
            return self.op("Concat", first, second, axis=-1)
        if kind == "weighted_half":
            first, second = self.parts(x, [width // 2, width - width // 2])
            first = self.op("Mul", first, self.weight("half", width // 2, free=[0]))
            return self.op("Concat", first, second, axis=2)
        if kind == "flat":
            return self.reshape(self.op("Tanh", self.op("Reshape", x, self.number(-1, width))), x, ["B", "S", width])
        if kind == "transposed":
            return self.transpose(self.transpose(x, 2, 0, 1), 1, 2, 0)
        if kind == "padded":
            wide = self.op("Pad", x, self.number(0, 1, 0, 0, 0, 0))
            return self.op("Slice", wide, self.number(1), self.number(np.iinfo(np.int64).max), self.number(1))
        if kind == "scaled":
            return self.op("Mul", x, self.weight("layer_scale", width, middle=1.0, free=[0]))
        return x

    # feed-forward -----------------------------------------------------------------------------------------------

    def feed_forward(self, x: str, given: FeedForward, before: str) -> str:
        kind, width, inner = given.kind, self.recipe.hidden, self.recipe.ffn
        act = lambda y: self.activate(y, given.activation)  # noqa: E731
        up, down = f"{before}up", f"{before}down"
        if kind == "gated":
            gate = act(self.linear(x, f"{before}gate", width, inner, bias=False))
            return self.linear(self.op("Mul", gate, self.linear(x, up, width, inner)), down, inner, width)
        if kind == "gated_joint":
            gate, rest = self.parts(self.linear(x, up, width, 2 * inner), [inner, inner])
            return self.linear(self.op("Mul", rest, act(gate)), down, inner, width)
        if kind == "gated_pairs":
            pairs = self.reshape(self.linear(x, up, width, 2 * inner), x, ["B", "S", inner, 2])
            gate = self.op("Gather", pairs, self.number(0, flat=False), axis=3)
            rest = self.op("Gather", pairs, self.number(1, flat=False), axis=-1)
            return self.linear(self.op("Mul", act(gate), rest), down, inner, width)
        if kind == "gated_strided":
            y = self.linear(x, up, width, 2 * inner)
            gate, rest = (self._stride(y, start, 2 * inner) for start in (0, 1))
            return self.linear(self.op("Mul", act(gate), rest), down, inner, width)
        if kind in ("pointwise", "depthwise"):
            return self._convolved(x, before, kind, act)
        if kind in ("experts", "picked_experts"):
            return self._experts(x, before, kind, act)
        if kind == "two_paths":
            one = act(self.linear(x, up, width, inner))
            two = self.op("Tanh", self.linear(x, f"{before}side", width, 5))
            return self.linear(self.op("Concat", one, two, axis=-1), down, inner + 5, width)
        if kind == "flat":
            flat = self.op("Reshape", x, self.number(-1, width))
            y = act(self.op("Gemm", flat, self.weight(up, width, inner, free=[0, 1]), self.weight(f"{up}_bias", inner)))
            y = self.op("Gemm", y, self.weight(down, width, inner, free=[0, 1]), transB=1)
            return self.reshape(y, x, ["B", "S", width])
        if kind == "low_rank":
            y = self.op("Add", self.linear(x, up, width, inner), self._low_rank(x, before, width, inner))
            return self.linear(act(y), down, inner, width)
        return self.linear(act(self.linear(x, up, width, inner)), down, inner, width)

    def _low_rank(self, x: str, before: str, width: int, inner: int) -> str:
        narrow = self.op("MatMul", x, self.weight(f"{before}narrow", width, 3, free=[0, 1]))
        return self.op("MatMul", narrow, self.weight(f"{before}wide", 3, inner, free=[0, 1]))

    def _stride(self, x: str, start: int, size: int) -> str:
        if self.how.cut == "gather":
            return self.op("Gather", x, self.number(*range(start, size, 2)), axis=-1)
        limit = np.iinfo(np.int64).max
        return self.op("Slice", x, self.number(start), self.number(limit), self.number(-1), self.number(2))

    def _convolved(self, x: str, before: str, kind: str, act) -> str:
        width, inner = self.recipe.hidden, self.recipe.ffn
        turned = self.transpose(x, 0, 2, 1)
        y = self.op("Conv", turned, self.weight(f"{before}up", inner, width, 1, free=[0, 1]), kernel_shape=[1])
        if kind == "depthwise":
            kernel = self.weight(f"{before}deep", inner, 1, 3, free=[0])
            y = self.op("Conv", y, kernel, group=inner, kernel_shape=[3], pads=[1, 1])
        y = self.op("Conv", act(y), self.weight(f"{before}down", width, inner, 1, free=[0, 1]), kernel_shape=[1])
        return self.transpose(y, 0, 2, 1)

    def _experts(self, x: str, before: str, kind: str, act) -> str:
        width, inner, count = self.recipe.hidden, self.recipe.ffn, 5
        scores = self.op("Softmax", self.linear(x, f"{before}router", width, count, bias=False), axis=-1)
        up = self.weight(f"{before}up", count, width, inner, free=[0, 1, 2])
        down = self.weight(f"{before}down", count, inner, width, free=[0, 1, 2])
        if kind == "experts":
            y = act(self.op("Einsum", x, up, equation="bsh,ehf->bsef"))
            y = self.op("Einsum", y, down, equation="bsef,efh->bseh")
            return self.reduce("ReduceSum", self.op("Mul", y, self.unsqueeze(scores, -1)), 2, keep=0)
        best, places = self.op("TopK", scores, self.number(2), count=2, axis=-1)
        y = self.op("MatMul", self.unsqueeze(x, 2, 3), self.op("Gather", up, places, axis=0))
        y = self.op("MatMul", act(y), self.op("Gather", down, places, axis=0))
        y = self.op("Mul", self.op("Squeeze", y, self.number(3)), self.unsqueeze(best, -1))
        return self.reduce("ReduceSum", y, 2, keep=0)

    # attention --------------------------------------------------------------------------------------------------

    def attention(self, x: str, given: Attention) -> str:
        """Return what attention adds to the stream; queries, keys and values are [B, H, S, D] on the way."""
        heads, size, width = self.recipe.heads, self.recipe.head, self.recipe.hidden
        groups = given.groups if given.projection in ("separate", "thirds") and given.mixing in _GROUPED else 1
        total = heads * groups
        q, k, v = self._project(x, given, heads, groups)
        if given.position == "norm":
            q, k = (self._head_norm(t, name, size) for t, name in ((q, "q_norm"), (k, "k_norm")))
        if given.position in ("halves", "interleaved", "partial", "frequencies"):
            cos, sin, rotated = self._angles(x, given.position, size)
            q, k = (self._rotate(t, cos, sin, rotated, size, given.position) for t in (q, k))
        if given.position == "operator":
            q, k = (self._rotated_by_operator(t, size) for t in (q, k))
        if given.mixing in ("Attention", "Attention4", "MultiHeadAttention"):
            return self.linear(self._fused(x, given, q, k, v, heads, groups), "out", total * size, width)
        if groups > 1 and given.repeat != "broadcast":
            k, v = (self._repeat(t, x, given.repeat, heads, groups) for t in (k, v))
        elif groups > 1:
            q = self._regroup(q, x, [heads, groups], size)
            k, v = self.unsqueeze(k, 2), self.unsqueeze(v, 2)
        y = self._mix(x, given, q, k, v, total)
        if groups > 1 and given.repeat == "broadcast":
            y = self._regroup(y, x, [total], size)
        if self.how.linear == "einsum" and given.projection == "einsum":
            out = self.weight("out", total, size, width, free=[0, 1, 2])
            return self.op("Einsum", y, out, equation="bhsd,hdo->bso")
        merged = self.reshape(self.transpose(y, 0, 2, 1, 3), x, ["B", "S", total * size])
        return self.linear(merged, "out", total * size, width)

    def _regroup(self, t: str, x: str, heads: list[int], size: int) -> str:
        """Change how [B, H, S, D] counts its heads; the length stays where it is."""
        if self.how.reshape in ("constant", "zero"):
            return self.op(
                "Reshape", t, self.op("Concat", self.number(-1, *heads), self.size(x, 1), self.number(size), axis=0)
            )
        parts = [self.size(x, 0), self.number(*heads), self.size(x, 1), self.number(size)]
        return self.op("Reshape", t, self.op("Concat", *parts, axis=0))

    def _project(self, x: str, given: Attention, heads: int, groups: int) -> list[str]:
        size, width, total = self.recipe.head, self.recipe.hidden, heads * groups
        if given.projection == "einsum":
            weights = [self.weight(name, width, heads, size, free=[0, 1, 2]) for name in "qkv"]
            return [self.op("Einsum", x, w, equation="bsi,ihd->bhsd") for w in weights]
        if given.projection == "by_head":  # GPT-NeoX: heads, then q, k and v
            joint = self.reshape(self.linear(x, "qkv", width, heads * 3 * size), x, ["B", "S", heads, 3 * size])
            taken = self.parts(joint, [size] * 3)
        elif given.projection == "by_kind":  # one axis of q, k and v, each picked
            joint = self.reshape(self.linear(x, "qkv", width, 3 * heads * size), x, ["B", "S", 3, heads, size])
            turned = self.transpose(joint, 2, 0, 3, 1, 4)
            return [self.op("Gather", turned, self.number(i, flat=False), axis=0) for i in range(3)]
        elif given.projection == "thirds":
            sizes = [total * size, heads * size, heads * size]
            parts = self.parts(self.linear(x, "qkv", width, sum(sizes)), sizes)
            taken = [self.reshape(p, p, ["B", "S", n // size, size]) for p, n in zip(parts, sizes, strict=True)]
        else:
            names = (("q", total), ("k", heads), ("v", heads))
            parts = [(self.linear(x, name, width, n * size), n) for name, n in names]
            taken = [self.reshape(p, x, ["B", "S", n, size]) for p, n in parts]
        return [self.transpose(t, 0, 2, 1, 3) for t in taken]

    def _head_norm(self, x: str, name: str, size: int) -> str:
        square = self.reduce("ReduceMean", self.op("Pow", x, self.real(2.0)))
        scaled = self.op("Div", x, self.op("Sqrt", self.op("Add", square, self.real(1e-5))))
        return self.op("Mul", scaled, self.weight(name, size, middle=1.0, spread=0.5, free=[0]))

    def _angles(self, x: str, kind: str, size: int) -> tuple[str, str, int]:
        """Return cosines and sines [S, R/2] or [S, R], and how many entries R of a head they rotate."""
        rotated = 2 * (size // 4) if kind == "partial" else size
        pairs = rotated // 2
        if kind == "frequencies":
            speeds = self.real(10.0 ** -np.arange(pairs), f"{self.scope}.speeds")
            places = self.unsqueeze(self.op("Cast", self.range_of(x), to=TensorProto.FLOAT), 1)
            angles = self.op("MatMul", places, self.unsqueeze(speeds, 0))
        else:
            table = (
                np.arange(POSITIONS)[:, None] * 10.0 ** -np.arange(pairs)[None] if pairs else np.zeros((POSITIONS, 1))
            )
            table = self.real(table, f"{self.scope}.angles")
            angles = self.op("Gather", table, self.range_of(x), axis=0)
        if kind != "interleaved":
            angles = self.op("Concat", angles, angles, axis=-1)
        return self.op("Cos", angles), self.op("Sin", angles), rotated

    def _rotate(self, x: str, cos: str, sin: str, rotated: int, size: int, kind: str) -> str:
        rest = ""
        if rotated < size:
            x, rest = self.parts(x, [rotated, size - rotated])
        if kind == "interleaved":
            one, two = (self._stride(x, start, size) for start in (0, 1))
            first = self.op("Sub", self.op("Mul", one, cos), self.op("Mul", two, sin))
            second = self.op("Add", self.op("Mul", one, sin), self.op("Mul", two, cos))
            both = self.op("Concat", self.unsqueeze(first, -1), self.unsqueeze(second, -1), axis=-1)
            target = self.op(
                "Concat", self.op("Slice", self.op("Shape", x), self.number(0), self.number(3)), self.number(-1), axis=0
            )
            return self.op("Reshape", both, target)
        one, two = self.parts(x, [rotated // 2, rotated - rotated // 2])
        turned = self.op("Concat", self.op("Neg", two), one, axis=-1)
        y = self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))
        return self.op("Concat", y, rest, axis=-1) if rest else y

    def _rotated_by_operator(self, x: str, size: int) -> str:
        angles = np.arange(POSITIONS)[:, None] * 10.0 ** -np.arange(size // 2)[None]
        cos, sin = self.real(np.cos(angles), "cos"), self.real(np.sin(angles), "sin")
        return self.op("RotaryEmbedding", x, self.number(0), cos, sin, domain="com.microsoft")

    def _repeat(self, t: str, x: str, how: str, heads: int, groups: int) -> str:
        """Repeat each key's or value's head for the queries that share it."""
        size = self.recipe.head
        if how == "gather":
            return self.op("Gather", t, self.number(*(h for h in range(heads) for _ in range(groups))), axis=1)
        wide = self.unsqueeze(t, 2)
        if how == "tile":
            wide = self.op("Tile", wide, self.number(1, 1, groups, 1, 1))
        elif how == "concat":
            wide = self.op("Concat", *[wide] * groups, axis=2)
        else:
            sizes = [self.size(x, 0), self.number(heads, groups), self.size(x, 1), self.number(size)]
            target = (
                self.number(1, 1, groups, 1, 1) if self.how.reshape == "zero" else self.op("Concat", *sizes, axis=0)
            )
            wide = self.op("Expand", wide, target)
        return self._regroup(wide, x, [heads * groups], size)

    def _scale(self, given: Attention, q: str, k: str) -> tuple[str, str, str]:
        """Return scaled queries and keys, and what is left to divide the scores by."""
        root = self.recipe.head**0.5
        if given.scale == "queries":
            return self.op("Mul", q, self.real(1 / root)), k, ""
        if given.scale == "keys":
            half = self.real(root**-0.5)
            return self.op("Mul", q, half), self.op("Mul", k, half), ""
        if given.scale == "shape":
            size = self.op("Gather", self.op("Shape", q), self.number(-1, flat=False), axis=0)
            return q, k, self.op("Sqrt", self.op("Cast", size, to=TensorProto.FLOAT))
        return q, k, self.real(root)

    def _mix(self, x: str, given: Attention, q: str, k: str, v: str, total: int) -> str:
        q, k, divisor = self._scale(given, q, k)
        rank5 = (
            given.repeat == "broadcast"
            and given.groups > 1
            and given.mixing in _GROUPED
            and given.projection in ("separate", "thirds")
        )
        if given.mixing == "flat" and not rank5:
            return self._mix_flat(x, given, q, k, v, divisor, total)
        if given.mixing == "einsum" and not rank5:
            scores = self.op("Einsum", q, k, equation="bhqd,bhkd->bhqk")
        else:
            order = (0, 1, 2, 4, 3) if rank5 else (0, 1, 3, 2)
            scores = self.op("MatMul", q, self.transpose(k, *order))
        scores = self.op("Div", scores, divisor) if divisor else scores
        if given.scale == "softcap":
            scores = self.op("Mul", self.op("Tanh", self.op("Div", scores, self.real(5.0))), self.real(5.0))
        scores = self._biased(x, given, scores, total, rank5)
        weights = self._softmax(scores, given.softmax)
        if given.mixing == "einsum" and not rank5:
            return self.op("Einsum", weights, v, equation="bhqk,bhkd->bhqd")
        return self.op("MatMul", weights, v)

    def _mix_flat(self, x: str, given: Attention, q: str, k: str, v: str, divisor: str, total: int) -> str:
        """Merge batch and heads around the two products, as BLOOM and OPT do."""
        length, size = self.size(x, 1), self.recipe.head
        merged = self.op("Concat", self.number(-1), length, self.number(size), axis=0)
        q, k, v = (self.op("Reshape", t, merged) for t in (q, k, v))
        scores = self.op("MatMul", q, self.transpose(k, 0, 2, 1))
        scores = self.op("Div", scores, divisor) if divisor else scores
        apart = self.op("Concat", self.size(x, 0), self.number(total), length, length, axis=0)
        scores = self._biased(x, given, self.op("Reshape", scores, apart), total, False)
        weights = self._softmax(scores, given.softmax)
        weights = self.op("Reshape", weights, self.op("Concat", self.number(-1), length, length, axis=0))
        y = self.op("MatMul", weights, v)
        return self.op(
            "Reshape", y, self.op("Concat", self.size(x, 0), self.number(total), length, self.number(size), axis=0)
        )

    def _softmax(self, scores: str, how: str) -> str:
        if how == "fused":
            return self.op("Softmax", scores, axis=-1)
        powers = self.op("Exp", self.op("Sub", scores, self.reduce("ReduceMax", scores)))
        return self.op("Div", powers, self.reduce("ReduceSum", powers))

    def _biased(self, x: str, given: Attention, scores: str, total: int, rank5: bool) -> str:
        if given.position == "slopes" and not rank5:
            scores = self.op("Add", scores, self._slopes(x, total))
        if given.position == "relative" and not rank5:
            scores = self.op("Add", scores, self._relative(x, total))
        mask = self._mask(x, given.mask, 1 if rank5 else total)
        if not mask:
            return scores
        mask = self.unsqueeze(mask, 1) if rank5 and given.mask != "causal" else mask
        if given.mask == "where":
            return self.op("Where", mask, scores, self.real(-1e4))
        return self.op("Add", scores, mask)

    def _slopes(self, x: str, total: int) -> str:
        slopes = self.real(2.0 ** -np.arange(1, total + 1).reshape(total, 1, 1), f"{self.scope}.slopes")
        self.widths.append((slopes, 0))
        places = self.op("Cast", self.range_of(x), to=TensorProto.FLOAT)
        apart = self.op("Sub", self.unsqueeze(places, 0), self.unsqueeze(places, 1))
        return self.op("Mul", slopes, self.unsqueeze(apart, 0))

    def _relative(self, x: str, total: int) -> str:
        """Return T5's bias: a table of distances, clipped and picked, heads first."""
        places = self.range_of(x)
        apart = self.op("Sub", self.unsqueeze(places, 0), self.unsqueeze(places, 1))
        bounded = self.op("Clip", apart, self.number(-3, flat=False), self.number(3, flat=False))
        rows = self.op("Add", bounded, self.number(3, flat=False))
        table = self.weight("distances", 7, total, free=[1])
        return self.unsqueeze(self.transpose(self.op("Gather", table, rows, axis=0), 2, 0, 1), 0)

    def _mask(self, x: str, kind: str, total: int) -> str:
        if kind == "none" or (kind == "padding" and self.recipe.entry == "image"):
            return ""
        if kind == "padding":
            given = self.graph_input("attention_mask", TensorProto.INT64, ["B", "S"])
            wide = self.op("Cast", self.unsqueeze(given, 1, 2), to=TensorProto.FLOAT)
            return self.op("Mul", self.op("Sub", self.real(1.0), wide), self.real(-1e4))
        places = self.range_of(x)
        allowed = self.op("LessOrEqual", self.unsqueeze(places, 0), self.unsqueeze(places, 1))
        if kind == "where":
            return self.unsqueeze(allowed, 0, 1)
        length = self.size(x, 1)
        if kind == "causal":
            square = self.op("Expand", self.real(-1e4), self.op("Concat", length, length, axis=0))
            return self.op("Where", allowed, self.real(0.0), square)
        batch = self.size(x, 0)
        if kind == "expanded":
            plain = self.op("Where", allowed, self.real(0.0), self.real(-1e4))
            sizes = self.op("Concat", batch, self.number(total), length, length, axis=0)
            return self.op("Expand", self.unsqueeze(plain, 0, 1), sizes)
        sizes = self.op("Concat", self.number(1, total), length, length, axis=0)
        zeros = self.op("ConstantOfShape", sizes, value=_one(np.float32, 0.0))
        return self.op("Add", zeros, self.unsqueeze(self.op("Where", allowed, self.real(0.0), self.real(-1e4)), 0, 1))

    def _fused(self, x: str, given: Attention, q: str, k: str, v: str, heads: int, groups: int) -> str:
        """Return attention [B, S, H D] computed by one operator."""
        size, total = self.recipe.head, heads * groups
        if given.mixing == "Attention4":
            y = self.op("Attention", q, k, v)
            return self.reshape(self.transpose(y, 0, 2, 1, 3), x, ["B", "S", total * size])
        flat = [
            self.reshape(self.transpose(t, 0, 2, 1, 3), x, ["B", "S", n * size])
            for t, n in ((q, total), (k, heads), (v, heads))
        ]
        if given.mixing == "Attention":
            y = self.op("Attention", *flat, q_num_heads=total, kv_num_heads=heads)
            return self.reshape(y, x, ["B", "S", total * size])  # onnxruntime's shape inference fails without it
        return self.op("MultiHeadAttention", *flat, domain="com.microsoft", num_heads=total)

    # the exit ---------------------------------------------------------------------------------------------------

    def exit(self, x: str) -> None:
        kind, width = self.recipe.exit, self.recipe.hidden
        if kind in ("stream", "both"):
            self.graph_output(x)
        if kind in ("tied", "both", "argmax") and "entry.table" in self.initializers:
            logits = self.op("MatMul", x, self.transpose("entry.table", 1, 0))
            if kind == "argmax":
                self.graph_output(self.op("ArgMax", logits, axis=-1, keepdims=0), 2, TensorProto.INT64)
            self.graph_output(logits)
        elif kind in ("untied", "tied", "argmax"):
            self.graph_output(self.linear(x, "head", width, 11))
        elif kind == "first":
            first = self.op("Gather", x, self.number(0, flat=False), axis=1)
            pooled = self.op("Gemm", first, self.weight("pool", width, 9, free=[0, 1]), self.weight("pool_bias", 9))
            self.graph_output(self.op("Tanh", pooled), 2)
        elif kind == "mean":
            total = self.reduce("ReduceSum", x, 1, keep=0)
            length = self.op("Cast", self.size(x, 1), to=TensorProto.FLOAT)
            classes = self.weight("classes", width, 5, free=[0, 1])
            self.graph_output(self.op("MatMul", self.op("Div", total, length), classes), 2)


_GROUPED = ("composed", "Attention", "Attention4")
_NORMS = {"group": 21}


def _needs(block: Block) -> int:
    """Return the opset that a block's operators need."""
    return 23 if block.attention and block.attention.mixing in ("Attention", "Attention4") else 0


def _one(kind: type, value: float = 1) -> TensorProto:
    return onnx.numpy_helper.from_array(np.array([value], kind))
