"""The writer of functions: operators become statements, short ones inside others, all names local and safe."""

import ast
from collections.abc import Callable, Iterable

from graphclone.pytorch.code import DEVICE, DTYPE, Code, Marker, render
from graphclone.pytorch.program import Op, Value
from graphclone.pytorch.rewriting import IDIOMS
from graphclone.pytorch.safe_names import local
from graphclone.pytorch.sizes import Size, Symbol, symbols
from graphclone.pytorch.sizes import render as render_size
from graphclone.pytorch.tree import Tree

WIDTH = 116

HINTS = {
    "Attention": "context", "Softmax": "weights", "Embedding": "embedding", "Range": "positions", "Where": "mask",
    "And": "mask", "LessOrEqual": "mask", "GreaterOrEqual": "mask", "Less": "mask", "Greater": "mask", "Cos": "cos",
    "Sin": "sin", "Add": "hidden", "Gelu": "activated", "Silu": "activated", "LayerNorm": "normed", "RMSNorm": "normed",
    "RotateHalf": "rotated", "Concat": "joined", "Conv": "features", "Linear": "projected", "MatMul": "product",
}  # fmt: skip


class Item:
    """Something in a function that is no operator: a loop over blocks."""

    def reads(self) -> list[Value]:
        """Return the values it reads, twice where they must have a name."""
        raise NotImplementedError

    def makes(self) -> list[Value]:
        """Return the values that have a name after it."""
        raise NotImplementedError

    def write(self, writer: "FunctionWriter") -> None:
        raise NotImplementedError


def reads_of(op: Op) -> list[Value]:
    """Return the values an operator's code reads; one whose size is read needs a name, so it counts twice."""
    result = []
    for leaf in leaves(op.code):
        if isinstance(leaf, Value) and leaf.known is None:
            result.append(leaf)
    for symbol in symbols_of(op.code):
        result += [symbol.value, symbol.value]
    return result


class FunctionWriter:
    """Write one function's statements.

    place: gives the text of a tensor that the module holds, `self.wte.weight`, for the operator that reads it.
    layer: gives the text of the layer that computes an operator, or None.

    `numbers` holds the texts of the constant integers of a code, by its id, where they are not literal.
    """

    def __init__(
        self,
        tree: Tree,
        place: Callable[[Op, Value], str],
        layer: Callable[[Op], str | None],
        dtype: str,
        indent: int = 2,
    ):
        self.tree = tree
        self.place = place
        self.layer = layer
        self.dtype = dtype
        self.width = WIDTH - 4 * indent
        self.names: dict[Value, str] = {}
        self.taken: set[str] = {"dtype", "device"}
        self.sizes: dict[Symbol, str] = {}
        self.lines: list[str] = []
        self.pending: dict[Value, Op] = {}
        self.device: str = "None"
        self.numbers: dict[int, list[str]] = {}
        self.roles: dict[Value, str] = {}

    def argument(self, value: Value, hint: str) -> str:
        """Name an argument."""
        name = local(hint, self.taken)
        self.taken.add(name)
        self.names[value] = name
        return name

    def write(self, items: Iterable["Op | Item"], outputs: Iterable[Value]) -> None:
        """Write the statements of operators and other items; `outputs` are read after them."""
        items, outputs = list(items), list(outputs)
        self.roles = roles([item for item in items if isinstance(item, Op)]) | self.roles
        reads: dict[Value, int] = {}
        for item in items:
            for value in item.reads() if isinstance(item, Item) else reads_of(item):
                reads[value] = reads.get(value, 0) + 1
        for value in outputs:
            reads[value] = reads.get(value, 0) + 1
        for item in items:
            if isinstance(item, Item):
                item.write(self)
            elif len(item.outputs) == 1 and reads.get(item.output, 0) == 1 and item.output not in outputs:
                self.pending[item.output] = item
            else:
                self.statement(item)

    def statement(self, op: Op) -> None:
        """Write one assignment."""
        targets = self.targets(op)
        self.taken.update(targets)
        if isinstance(op.code, tuple):
            for target, code, output in zip(targets, op.code, op.outputs, strict=False):
                if output is not None and code is not None:
                    self.assign(target, lambda code=code: self.code(op, code), [code])
            self.remember(op, targets)
            return
        self.assign(", ".join(targets), lambda: self.expression(op), [op.code])
        self.remember(op, targets)

    def targets(self, op: Op) -> list[str]:
        result = []
        for output in op.outputs:
            name = "_" if output is None else local(self.hint(op, output), {*self.taken, *result})
            result.append(name)
        return result

    def remember(self, op: Op, targets: list[str]) -> None:
        for output, name in zip(op.outputs, targets, strict=True):
            if output is not None:
                self.names[output] = name
                self.taken.add(name)

    def assign(self, target: str, text: Callable[[], str], codes: list) -> None:
        """Write `target = text`, naming inner expressions first until the line fits."""
        while True:
            pending = dict(self.pending)
            line = f"{target} = {tidy(text())}"
            if len(line) <= self.width:
                break
            inner = [leaf for code in codes for leaf in leaves(code) if isinstance(leaf, Value) and leaf in pending]
            if not inner:
                break
            self.pending = pending
            longest = max(inner, key=lambda leaf: len(self.peek(leaf)))
            op = self.pending.pop(longest)
            self.statement(op)
        self.lines.extend(wrap(line, self.width))

    def peek(self, value: Value) -> str:
        pending = dict(self.pending)
        text = self.text(value, None)
        self.pending = pending
        return text

    def expression(self, op: Op) -> str:
        """Return the text of an operator: a call of its layer, or its code."""
        module = self.layer(op)
        if module is not None:
            return f"{module}({self.text(op[0], op)})"
        return self.code(op, op.code)

    def code(self, op: Op, code) -> str:
        numbers = iter(self.numbers.get(id(code), ()))
        return render(code, lambda leaf: self.leaf(leaf, op), lambda number: next(numbers, None) or repr(number))

    def leaf(self, leaf, op: Op) -> str:
        if isinstance(leaf, Marker):
            return {DEVICE: self.device, DTYPE: self.dtype}[leaf]
        if isinstance(leaf, Size):
            return self.size(leaf)
        return self.text(leaf, op)

    def size(self, size: Size) -> str:
        return render_size(size, self.symbol)

    def symbol(self, symbol: Symbol) -> str:
        if symbol in self.sizes:
            return self.sizes[symbol]
        if symbol.value in self.names:
            return f"{self.names[symbol.value]}.shape[{symbol.axis}]"
        raise KeyError(f"no tensor here has the size {symbol}")

    def text(self, value: Value, op: Op | None) -> str:
        """Return how a value is written where `op` reads it."""
        if value in self.names:
            return self.names[value]
        if value.known is not None:
            return self.known(value, op)
        if value.parameter is not None:
            return self.place(op, value)
        if value in self.pending:
            maker = self.pending.pop(value)
            return f"({self.expression(maker)})"
        raise KeyError(f"nothing has computed {value}")

    def result(self, value: Value, op: Op | None) -> str:
        """Return how a value is written where it must be a tensor, though its one number is known."""
        text = self.text(value, op)
        if value.known is None or value.known.ndim:
            return text
        return f"torch.tensor({text}, dtype={value.dtype}, device={self.device})"

    def known(self, value: Value, op: Op | None) -> str:
        if value.known.ndim == 0 or (value.known.size == 1 and op is not None and broadcasts(op, value)):
            return render(value.known.item(), lambda leaf: self.leaf(leaf, None))
        if (short := _short(value, self.device)) is not None:
            return short
        entries = render(value.known.tolist(), lambda leaf: self.leaf(leaf, None))
        return f"torch.tensor({entries}, dtype={value.dtype}, device={self.device})"

    def hint(self, op: Op, output: Value) -> str:
        """Return a word for a result: what reads it, its layer's name, or what kind of thing it is."""
        if output in self.roles:
            return self.roles[output]
        for value in op.inputs:
            if value is not None and value.parameter is not None and value.known is None and op.domain == IDIOMS:
                node = self.tree.slot(op, value).node
                names = [name for name in node.path if not name.isdigit()]
                if names and (node.layer is not None or not node.name.isdigit()):
                    return names[-1]
        hint = HINTS.get(op.type)
        if hint == "mask" and not (output.is_table or str(output.dtype) == "torch.bool"):
            hint = "chosen"
        return hint or "x"


def leaves(code):
    """Return the operands of a code, or of each code of a tuple."""
    if isinstance(code, tuple):
        return [leaf for each in code if each is not None for leaf in each.leaves()]
    return list(code.leaves()) if isinstance(code, Code) else []


def _short(value: Value, device: str) -> str | None:
    """Return the text of an array of one repeated number, or of consecutive ones; None for others and small ones."""
    numbers, shape = value.known.reshape(-1).tolist(), value.known.shape
    if len(numbers) < 4 or any(isinstance(each, Size) for each in numbers):
        return None
    if all(each == numbers[0] for each in numbers):
        return f"torch.full({shape}, {render(numbers[0], str)}, dtype={value.dtype}, device={device})"
    if str(value.dtype) == "torch.int64" and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        text = f"torch.arange({numbers[0]}, {numbers[-1] + 1}, device={device})"
        return text if len(shape) == 1 else f"{text}.reshape({shape})"
    return None


SCALAR_FRIENDS = (
    "Add", "Sub", "Mul", "Div", "Mod", "Pow", "Where", "Max", "Min", "Equal", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual", "And", "Or", "Xor",
)  # fmt: skip


def broadcasts(op: Op, value: Value) -> bool:
    """Tell whether an array of one number may be written as a number, since another operand gives the shape."""
    others = [each for each in op.inputs if each is not None and each.known is None]
    return op.type in SCALAR_FRIENDS and not op.domain and any(each.rank >= value.known.ndim for each in others)


def roles(ops: list[Op]) -> dict[Value, str]:
    """Return words for what attention reads: q, k, v, and what they were before they were reshaped."""
    result: dict[Value, str] = {}
    for op in ops:
        if op.type != "Attention":
            continue
        for value, word in zip(op.inputs, ("query", "key", "value"), strict=False):
            while value is not None and value.op is not None:
                result.setdefault(value, word[0] if value in op.inputs else word)
                if value.op.type not in ("Reshape", "Transpose", "Unsqueeze", "Expand", "Squeeze"):
                    break
                value = value.op[0]
    return result


def symbols_of(code) -> list[Symbol]:
    """Return the symbols of all sizes in a code."""
    found: dict[Symbol, None] = {}
    for leaf in leaves(code):
        sizes = [leaf] if isinstance(leaf, Size) else []
        if isinstance(leaf, Value) and leaf.known is not None:
            sizes = [each for each in leaf.known.reshape(-1) if isinstance(each, Size)]
        for size in sizes:
            found.update(dict.fromkeys(symbols(size)))
    return list(found)


def tidy(text: str) -> str:
    """Return an expression without needless parentheses."""
    return ast.unparse(ast.parse(text, mode="eval"))


def wrap(line: str, width: int) -> list[str]:
    """Break a statement that is too long after commas of its outermost brackets."""
    if len(line) <= width:
        return [line]
    head = line.find("(")
    if head < 0 or not line.endswith(")"):
        return [line]
    parts, depth, start, quoted = [], 0, head + 1, False
    for position in range(head, len(line)):
        quoted ^= line[position] == "'"
        if quoted:
            continue
        depth += (line[position] in "([{") - (line[position] in ")]}")
        if (line[position] == "," and depth == 1) or (depth == 0 and position == len(line) - 1):
            parts.append(line[start:position].strip())
            start = position + 1
        elif depth == 0:
            return [line]
    result, current = [line[: head + 1]], ""
    for part in [part for part in parts if part]:
        if current and len(current) + len(part) + 7 > width:
            result.append(f"    {current}")
            current = ""
        if len(part) + 5 > width:
            *pieces, last = wrap(part, width - 5)
            result += [f"    {piece}" for piece in [*pieces, f"{last},"]]
            continue
        current += (" " if current else "") + part + ","
    return [*result, *([f"    {current}"] if current else []), ")"]
