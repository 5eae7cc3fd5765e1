"""Probing: run every operator's code on tensors without storage, for several sizes, to learn shapes and types."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_graphsurgeon as gs
import torch

from graphclone.axes.solver import type_axes
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import helpers, known
from graphclone.pytorch.code import Code, Marker, render
from graphclone.pytorch.program import Op, Program, Unsupported, Value
from graphclone.pytorch.quick_shapes import either, quick, quick_several
from graphclone.pytorch.registry import RULES
from graphclone.pytorch.sizes import PROBES, Size, SizeTable, Symbol

PRIMES = (7, 11, 17, 13, 19, 23, 5, 3, 9, 29, 31, 37)
"""Sizes of dynamic axes; probe p gives axis number n the prime PRIMES[n + p]."""


HELPERS = {name: value for name, value in vars(helpers).items() if not name.startswith("_")}
"""What rules may call."""


SMALL = (3, 5, 2, 7, 4, 9, 6, 11, 8, 13, 10, 12)
"""Sizes below the number of positions of tiny models, where the graph slices a table of them."""
TINY = (3, 5, 2, 6, 4)
"""Sizes below that number in the tiniest models, with which somebody tries things."""
SIZES = (PRIMES, SMALL, TINY, tuple(331 * prime for prime in PRIMES))
"""What is tried in turn; audio needs long inputs."""


class ShapeMismatch(Exception):
    """A guess about which input axes are equal that the graph contradicts."""


def probe(program: Program, model: Model) -> None:
    """Fill `code`, `dims`, `dtype` and `known` of the whole program.

    Axes are tried with as few equalities as the graph admits: by name first, then the first axes of all inputs
    equal, then those that the analysis of axes found equal, then the second axes of integer inputs too.

    Raises: InputError listing every operator that has no rule, or one whose rule does not hold.
    """
    missing = sorted({op.key for op in program.ops if op.key not in RULES and op.type not in known.FUNCTIONS})
    if missing:
        raise InputError(unknown_operators(program, missing))
    inputs = list(model.inputs)
    problem: Exception | None = None
    for sizes in SIZES:
        for shared in (_by_name, _by_first_axis, functools.partial(_by_analysis, model), _by_role):
            try:
                return _Probe(program, shared(inputs), sizes).run(inputs)
            except ShapeMismatch as error:
                problem = problem or error
    raise InputError(f"cannot turn the graph into PyTorch: {problem}") from problem


def unknown_operators(program: Program, missing: list[tuple[str, str]]) -> str:
    """Return the one message about all operators without a rule."""
    lines = []
    for domain, kind in missing:
        nodes = [op.name for op in program.ops if op.key == (domain, kind)]
        lines.append(f"{domain + '.' if domain else ''}{kind} ({len(nodes)} nodes, first {nodes[0]!r:.80})")
    return (
        f"no PyTorch rule for {len(missing)} operator{'s' * (len(missing) > 1)}: {', '.join(lines)}; "
        "register one with graphclone.pytorch.rule, in a module that the entry points graphclone.torch_rules name"
    )


# -- which axes are equal ------------------------------------------------------------------------------------------

Axes = dict[tuple[str, int], str]


def _by_name(inputs: list[gs.Variable]) -> Axes:
    """Name each dynamic axis as the file does."""
    result = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.shape or ()):
            if not isinstance(size, int) or size < 1:
                result[tensor.name, axis] = str(size) if size not in (None, "", -1, 0) else f"{tensor.name}.{axis}"
    return result


def _by_first_axis(inputs: list[gs.Variable]) -> Axes:
    result = _by_name(inputs)
    firsts = [name for (_, axis), name in result.items() if axis == 0]
    return {key: firsts[0] if name in firsts else name for key, name in result.items()}


def _by_analysis(model: Model, inputs: list[gs.Variable]) -> Axes:
    """Let axes be equal that operators make equal: the lengths of ids and of their mask, which the file names apart.

    An axis for which the graph admits one size alone is named by that number.
    """
    types = type_axes(model).types
    first: dict[tuple[int, ...], str] = {}
    result = {}
    for (tensor, axis), name in _by_name(inputs).items():
        size = types[tensor][axis].size if types.get(tensor) else ()
        if size and size[0] == size[-1]:
            result[tensor, axis] = str(size[0])
        else:
            result[tensor, axis] = name if SUM.match(name) or not size else first.setdefault(size, name)
    return result


def _by_role(inputs: list[gs.Variable]) -> Axes:
    result = _by_first_axis(inputs)
    ranks = {tensor.name: len(tensor.shape or ()) for tensor in inputs}
    seconds = [name for (tensor, axis), name in result.items() if axis == 1 and ranks[tensor] == 2]
    return {key: seconds[0] if name in seconds else name for key, name in result.items()}


SUM = re.compile(r"^\s*([\w.]+)\s*\+\s*([\w.]+)\s*$")


def _number(axes: Axes, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Give each name its sizes in the probes; `past + sequence` is their sum."""
    result = {name: (int(name),) * PROBES for name in axes.values() if name.isdigit()}
    plain = [name for name in dict.fromkeys(axes.values()) if not SUM.match(name) and name not in result]
    for position, name in enumerate(plain):
        result[name] = tuple(
            sizes[(position + 3 * index) % len(sizes)] + 40 * (position // 4) for index in range(PROBES)
        )
    for name in dict.fromkeys(axes.values()):
        if name in result:
            continue
        parts = [part if part.isdigit() else result.get(part) for part in SUM.match(name).groups()]
        if None in parts:
            result[name] = tuple(35 + sizes[0] + 6 * len(result) + 2 * index for index in range(PROBES))
        else:
            columns = [(int(part),) * PROBES if isinstance(part, str) else part for part in parts]
            result[name] = tuple(map(sum, zip(*columns, strict=True)))
    return result


# -- the walk ------------------------------------------------------------------------------------------------------


class _Probe:
    def __init__(self, program: Program, axes: Axes, sizes: tuple[int, ...]):
        self.program = program
        self.axes = axes
        self.numbers = _number(axes, sizes)
        self.sizes = SizeTable()
        self.tensors: dict[Value, list] = {}
        self.taken: dict[str, int] = {}

    def run(self, inputs: list[gs.Variable]) -> None:
        for value, tensor in zip(self.program.inputs, inputs, strict=True):
            self._input(value, tensor)
        for op in self.program.ops:
            for output in op.outputs:
                if output is not None:
                    output.op, output.known = op, None
        for op in self.program.ops:
            self._step(op)
        self.program.sizes = self.sizes
        self.program.ops = [op for op in self.program.ops if op.code is not None]

    def _input(self, value: Value, tensor: gs.Variable) -> None:
        if tensor.shape is None:
            raise InputError(f"graph input '{tensor.name}' has no shape; PyTorch needs its number of axes")
        columns = []
        for axis, size in enumerate(tensor.shape):
            name = self.axes.get((tensor.name, axis))
            columns.append((size,) * PROBES if name is None else self.numbers[name])
        shapes = list(zip(*columns, strict=True)) if columns else [()] * PROBES
        value.dtype = _dtype(tensor)
        value.is_table = not value.dtype.is_floating_point
        self._settle(value, [torch.empty(shape, dtype=value.dtype, device="meta") for shape in shapes])

    def _settle(self, value: Value, tensors: list[torch.Tensor]) -> None:
        self.tensors[value] = tensors
        value.dims = self.sizes.shape(value, [tuple(tensor.shape) for tensor in tensors])
        value.dtype = tensors[0].dtype

    def _step(self, op: Op) -> None:
        if any(self.taken.get(name, number) != number for name, number in op.inside):
            op.code = None
            return
        for each in op.inputs:
            if each is not None and each.op is None and each.known is None and each not in self.tensors:
                self._stored(each)
        results = attempt(op, known.compute)
        if results is not None:
            for output, (array, dtype) in zip(op.outputs, results, strict=False):
                output.known, output.dtype, output.dims, output.is_table = array, dtype, array.shape, True
                output.op = None
                for each in array.reshape(-1):
                    self.sizes.learn(each)
            return
        if op.key not in RULES:
            raise InputError(unknown_operators(self.program, [op.key]))
        op.code = attempt(op, RULES[op.key])
        if op.key == ("", "If"):
            return self._choose(op)
        shapes = [self._shapes(each) for each in op.inputs if each is not None]
        found = quick(op, shapes)
        outputs = quick_several(op) or ([found] if found is not None else evaluate(op.code, self.tensors, op))
        for output, tensors in zip(op.outputs, outputs, strict=False):
            if output is not None:
                self._settle(output, tensors)
                output.is_table = all(each is None or each.is_table for each in op.inputs)

    def _choose(self, op: Op) -> None:
        """Keep one branch of an If where sizes decide, else give its results the sizes that both branches agree on."""
        count = len(op.outputs)
        if op[0].known is not None:
            number = 0 if op[0].scalar else 1
            self.taken[op.name] = number
            op.code = None
            for place, output in enumerate(op.outputs):
                if output is not None:
                    self.program.replace(output, op[1 + number * count + place])
            return
        for place, output in enumerate(op.outputs):
            if output is None:
                continue
            first, second = op[1 + place], op[1 + count + place]
            shapes = either(self._shapes(first), self._shapes(second))
            if shapes is None:
                raise InputError(
                    f"cannot turn If node '{op.name:.80}' into PyTorch: its branches give '{output.name:.80}' with "
                    "different numbers of axes"
                )
            self._settle(output, [torch.empty(shape, dtype=first.dtype, device="meta") for shape in shapes])
            output.is_table = all(each.is_table for each in op.inputs)

    def _shapes(self, value: Value) -> list[tuple[int, ...]]:
        if value.known is not None:
            return [value.known.shape] * PROBES
        return [tuple(tensor.shape) for tensor in self.tensors[value]]

    def _stored(self, value: Value) -> None:
        if value.weight is None:
            raise InputError(f"tensor '{value.name:.80}' is read before anything computes it")
        value.dtype = known.torch_type(value.weight.onnx_dtype, value.name)
        tensor = torch.empty(value.weight.shape, dtype=value.dtype, device="meta")
        value.dims = tuple(value.weight.shape)
        self.tensors[value] = [tensor] * PROBES


def attempt(op: Op, function: Callable[[Op], Any]) -> Any:
    """Return what a function gives for an operator, or say of which node it does not hold."""
    try:
        return function(op)
    except Unsupported as error:
        raise InputError(f"cannot turn {op.type} node '{op.name:.80}' into PyTorch: {error}") from None


def evaluate(code, tensors: Mapping[Value, list], op: Op) -> list[list[torch.Tensor]]:
    """Return what the code gives for each output in each probe, on tensors without storage."""
    names: dict[int, str] = {}
    held: list = []

    def leaf(operand) -> str:
        if isinstance(operand, Marker):
            return "'meta'"
        if id(operand) not in names:
            names[id(operand)] = f"x{len(held)}"
            held.append(operand)
        return names[id(operand)]

    parts = code if isinstance(code, tuple) else (code,)
    texts = [None if part is None else compile(render(part, leaf), "<rule>", "eval") for part in parts]
    outputs: list[list[torch.Tensor]] = []
    for index in range(PROBES):
        scope = dict(HELPERS)
        for operand, name in zip(held, names.values(), strict=True):
            scope[name] = _held(operand, tensors, index)
        try:
            results = [None if text is None else eval(text, scope) for text in texts]
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ShapeMismatch(f"{op.type} node '{op.name:.80}': {reason}") from error
        if not isinstance(code, tuple) and isinstance(results[0], tuple | list):
            results = list(results[0])
        outputs.append(results)
    return [list(column) for column in zip(*outputs, strict=True)]


def _held(operand, tensors: Mapping[Value, list], index: int):
    if isinstance(operand, Size):
        return operand.probe[index]
    if isinstance(operand, Symbol):
        return operand.probe[index]
    if isinstance(operand, Value):
        if operand.known is None:
            return tensors[operand][index]
        if operand.known.ndim == 0:
            return _held(operand.known.item(), tensors, index)
        return torch.empty(operand.known.shape, dtype=operand.dtype, device="meta")
    if isinstance(operand, Code):
        raise TypeError("nested code is rendered, not held")
    return operand


def _dtype(tensor: gs.Variable) -> torch.dtype:
    import numpy as np
    import onnx

    if tensor.dtype is None:
        raise InputError(f"graph input '{tensor.name}' has no element type")
    kind = (
        tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return known.torch_type(kind, tensor.name)
