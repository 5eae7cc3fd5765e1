"""Write nodes: operators, constants, weights, and shapes in the ways that exporters write them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from growth.recipe import Recipe, opset_of

POSITIONS = 64  # rows of every table of positions: more than any probe is long
VOCABULARY = 19


@dataclass
class Grown:
    """proto: the model. widths: (initializer, axis) pairs of which something must be free to cut."""

    proto: ModelProto
    widths: list[tuple[str, int]] = field(default_factory=list)


class Writer:
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
        self.opset = opset_of(recipe)

    def finish(self) -> Grown:
        graph = helper.make_graph(self.nodes, "grown", self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return Grown(helper.make_model(graph, ir_version=10, opset_imports=opsets), self.widths)

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

    def range_of(self, ids: str) -> str:
        """Return the positions 0, 1, ... of a sequence [B, S, ...] as a vector."""
        length = self.op("Squeeze", self.size(ids, 1), self.number(0))
        return self.op("Range", self.number(0, flat=False), length, self.number(1, flat=False))

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

    def strided(self, x: str, start: int, size: int) -> str:
        if self.how.cut == "gather":
            return self.op("Gather", x, self.number(*range(start, size, 2)), axis=-1)
        limit = np.iinfo(np.int64).max
        return self.op("Slice", x, self.number(start), self.number(limit), self.number(-1), self.number(2))


def filled(kind: type, value: float = 1) -> TensorProto:
    """Return a tensor of one number, as ConstantOfShape takes it."""
    return onnx.numpy_helper.from_array(np.array([value], kind))
