"""Source: the text of a module file, a class per kind of block and one for the model."""

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from graphclone.pytorch import helpers
from graphclone.pytorch.blocks import Block, Stack, find_stacks
from graphclone.pytorch.branches import Choice, Region, regions
from graphclone.pytorch.code import DTYPE, render
from graphclone.pytorch.constructors import build, sizes_of, tensor
from graphclone.pytorch.conversion import Converted
from graphclone.pytorch.function_writer import HINTS, FunctionWriter, Item, leaves, symbols_of, wrap
from graphclone.pytorch.loops import Loop, SizeReader
from graphclone.pytorch.program import Op, Value
from graphclone.pytorch.safe_names import local
from graphclone.pytorch.sizes import Size, Symbol
from graphclone.pytorch.templates import CHECKPOINT, CONV1D, GROUP, HEADER, LOAD
from graphclone.pytorch.tree import Node, Slot, Tree, reach


@dataclass
class Source:
    """The text of a module file and the names under which it expects its tensors."""

    text: str
    tensors: dict[str, Slot]
    tree: Tree


def write_source(converted: Converted, title: str, checkpoint_blocks: bool = False) -> Source:
    """Return the source of a converted model.

    title: one line for the file's docstring. checkpoint_blocks: whether blocks compute their activations again in the
    backward pass instead of keeping them.
    """
    return SourceWriter(converted, title, checkpoint_blocks).run()


class SourceWriter:
    def __init__(self, converted: Converted, title: str, checkpoint_blocks: bool):
        self.checkpoint_blocks = checkpoint_blocks
        self.converted = converted
        self.program = converted.program
        self.title = re.sub(r"[^\w .,:;()\[\]/+-]", "_", title)[:100]
        self.tree = Tree(self.program, converted.stored)
        self.regions = regions(self.program)
        self.stacks = find_stacks(self.program, self.tree)
        self.at = {stack.node: stack for stack in self.stacks}
        self.blocks = {block.node: (stack, block) for stack in self.stacks for block in stack.blocks}
        self.classes: dict[tuple, str] = {}
        self.variables: dict[tuple, list[int]] = {}
        self.names: set[str] = {"Model", "Group", "Conv1D"}

    def run(self) -> Source:
        bodies = [self.block_class(kind) for stack in self.stacks for kind in self.kinds(stack)]
        bodies.append(self.model_class())
        body = "".join(bodies)
        text = HEADER.format(title=self.title)
        text += CHECKPOINT if "checkpoint(" in body else ""
        text += "".join(f"\n\n{function}\n" for function in _called(body))
        text += (GROUP if "Group(" in body else "") + (CONV1D if "Conv1D(" in body else "") + body + LOAD
        tensors = {".".join(slot.path): slot for slots in self.tree.slots.values() for slot in slots if slot.first}
        return Source(text, tensors, self.tree)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def kinds(self, stack: Stack) -> Iterator[Block]:
        """Yield the first block of each class."""
        for block in stack.blocks:
            key = (stack.node, block.key)
            if key in self.classes:
                continue
            alike = [each for each in stack.blocks if each.key == block.key]
            columns = list(zip(*(each.integers for each in alike), strict=True))
            self.variables[key] = [index for index, column in enumerate(columns) if len(set(column)) > 1]
            self.classes[key] = self.class_name(stack)
            yield block

    def class_name(self, stack: Stack) -> str:
        words = [word for word in stack.node.path if not word.isdigit()]
        stem = {"h": "Block", "layers": "Layer", "layer": "Layer", "blocks": "Block", "block": "Block"}
        last = words[-1] if words else "Block"
        base = stem.get(last, "".join(part.capitalize() for part in re.split(r"_+", last) if part) or "Block")
        base = base if base[0].isalpha() else f"Block{base}"
        prefix = next((word for word in words if word in ("encoder", "decoder")), "").capitalize()
        name, count = prefix + base, 1
        while name in self.names:
            count += 1
            name = f"{prefix}{base}{count}"
        self.names.add(name)
        return name

    def arguments(self, stack: Stack, block: Block) -> dict[int, str]:
        """Return the constructor's arguments for the integers that differ: index -> name, equal columns sharing one."""
        alike = [each for each in stack.blocks if each.key == block.key]
        names: dict[tuple, str] = {}
        result = {}
        for index in self.variables[stack.node, block.key]:
            column = tuple(each.integers[index] for each in alike)
            result[index] = names.setdefault(column, f"size_{len(names)}")
        return result

    def block_class(self, block: Block) -> str:
        stack = self.at[block.node.parent]
        names = self.arguments(stack, block)
        distinct = list(dict.fromkeys(names.values()))
        code_count = len(block.integers) - len(list(sizes_of(block.node)))
        numbers = [names.get(index) or str(number) for index, number in enumerate(block.integers)]
        texts = iter(numbers[code_count:])
        lines = [f"class {self.classes[stack.node, block.key]}(nn.Module):"]
        lines.append(f"    def __init__({', '.join(['self', *distinct])}):")
        lines.append("        super().__init__()")
        used = {name for index, name in names.items() if index < code_count}
        lines += [f"        self.{name} = {name}" for name in distinct if name in used]
        lines += self.constructor(block.node, texts)
        texts = iter([f"self.{text}" if index in names else text for index, text in enumerate(numbers)])
        methods = [stack.method, *(twin.method for twin in stack.twins)]
        for method, body in zip(methods, [block, *block.twins], strict=True):
            lines += self.block_method(method, body, texts)
        return "\n\n" + "\n".join(lines) + "\n"

    def block_method(self, method: str, block: Block, texts: Iterator[str]) -> list[str]:
        """Return the lines of one function of a block; `texts` gives the numbers of its code."""
        writer = FunctionWriter(
            self.tree,
            lambda op, value: "self." + reach(self.tree.slot(op, value).path[len(block.node.path) :]),
            lambda op: self.layer_text(op, block.node),
            "dtype",
        )
        for op in block.ops:
            for code in op.code if isinstance(op.code, tuple) else (op.code,):
                writer.numbers[id(code)] = list(itertools.islice(texts, _integers(code)))
        words = [writer.argument(value, hint) for value, hint in zip(block.inputs, self.hints(block), strict=True)]
        head = self.prologue(writer, block.ops, block.inputs, block.node, words)
        writer.write(block.ops, block.outputs)
        lines = ["", f"    def {method}({', '.join(['self', *words])}):"]
        lines += [f"        {line}" for line in [*head, *writer.lines]]
        return [*lines, "        return " + ", ".join(writer.text(value, None) for value in block.outputs)]

    def hints(self, block: Block) -> list[str]:
        stacks = [each for stack in self.stacks for each in (stack, *stack.twins)]
        made = {output for stack in stacks for each in stack.blocks for output in each.outputs}
        result = []
        for value in block.inputs:
            streams = value in made or (not value.is_table and value.dims and value.rank >= 3)
            result.append("x" if streams else self.word(value))
        return result

    def word(self, value: Value) -> str:
        op = value.op
        while op is not None and op.type in (
            "LikeParameters",
            "Unsqueeze",
            "Reshape",
            "Cast",
            "Slice",
            "Expand",
            "Mul",
            "Concat",
        ):
            first = next((each for each in op.inputs if each is not None and each.op is not None), None)
            op = first.op if first is not None else None
        return HINTS.get(op.type, "table") if op is not None else "table"

    def constructor(self, node: Node, numbers: Iterator[str]) -> list[str]:
        lines = []
        own = [(slot, tensor(slot, numbers)) for slot in node.tensors.values()]
        for name, child in node.children.items():
            if name.isdigit():
                lines.append(f'        self.add_module("{name}", {build(child, numbers, self.stack_text)})')
            else:
                lines.append(f"        self.{name} = {build(child, numbers, self.stack_text)}")
        for slot, text in own:
            if text is None:
                continue
            if slot.stored.persistent:
                lines.append(f"        self.{slot.name} = {text}")
            else:
                lines.append(f'        self.register_buffer("{slot.name}", {text}, persistent=False)')
        return [piece for line in lines for piece in _wrapped(line)]

    def stack_text(self, node: Node) -> str | None:
        """Return the expression that makes a block, or all blocks of a stack that are numbered without gaps."""
        if node in self.blocks:
            return self.make_block(*self.blocks[node])
        stack = self.at.get(node)
        if stack is None or node.tensors or list(node.children) != [str(i) for i in range(len(stack.blocks))]:
            return None
        calls = [self.make_block(stack, block) for block in stack.blocks]
        if len(set(calls)) == 1:
            return f"nn.ModuleList({calls[0]} for _ in range({len(calls)}))"
        return "nn.ModuleList([" + ", ".join(calls) + "])"

    def make_block(self, stack: Stack, block: Block) -> str:
        first = next(each for each in stack.blocks if each.key == block.key)
        names = self.arguments(stack, first)
        values = {name: block.integers[index] for index, name in names.items()}
        return f"{self.classes[stack.node, block.key]}({', '.join(str(value) for value in values.values())})"

    def layer_text(self, op: Op, inside: Node) -> str | None:
        node = self.tree.module(op)
        if node is None or node.path[: len(inside.path)] != inside.path:
            return None
        path = node.path[len(inside.path) :]
        return "self." + reach(path)

    # -- functions ------------------------------------------------------------------------------------------------

    def prologue(
        self, writer: FunctionWriter, ops: list[Op], inputs: list[Value], node: Node, words: list[str]
    ) -> list[str]:
        """Return the lines that name sizes, device and dtype, and teach the writer those names."""
        lines = []
        if inputs:
            writer.device = f"{writer.names[inputs[0]]}.device"
        local_values = {output for op in ops for output in op.outputs}
        wanted = dict.fromkeys(symbol for op in ops for symbol in symbols_of(op.code))
        found: dict[Value, dict[int, Symbol]] = {}
        for symbol in wanted:
            if symbol.value in local_values:
                continue
            size = Size.of(symbol)
            for value in inputs:
                if value.dims and size in value.dims:
                    found.setdefault(value, {})[value.dims.index(size)] = symbol
                    break
            else:
                name = local(f"size_{len(words)}", writer.taken)
                writer.taken.add(name)
                words.append(name)
                writer.sizes[symbol] = name
        for value, axes in found.items():
            names = {axis: self.size_name(writer, axis, value.rank) for axis in axes}
            for axis, symbol in axes.items():
                writer.sizes[symbol] = names[axis]
            text = writer.names[value]
            if len(axes) == value.rank > 1:
                lines.append(f"{', '.join(names[axis] for axis in range(value.rank))} = {text}.shape")
            else:
                lines += [f"{names[axis]} = {text}.shape[{axis}]" for axis in sorted(axes)]
        if any(leaf is DTYPE for op in ops for leaf in leaves(op.code)):
            slots = [slot for below in node.walk() for slot in below.tensors.values() if slot.stored.trainable]
            path = reach(slots[0].path[len(node.path) :]) if slots else ""
            lines.append(f"dtype = self.{path}.dtype" if slots else "dtype = torch.get_default_dtype()")
        return lines

    def size_name(self, writer: FunctionWriter, axis: int, rank: int) -> str:
        hint = ("batch", "sequence")[axis] if axis < 2 and rank in (2, 3) else "batch" if axis == 0 else f"size_{axis}"
        name = local(hint, writer.taken)
        writer.taken.add(name)
        return name

    def model_class(self) -> str:
        tree = self.tree
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += self.constructor(tree.root, self.numbers(tree.root))
        ties = self.ties()
        if ties:
            lines.append("        self.tie_weights()")
        lines += ["", "    def tie_weights(self):", '        """Let tensors with several names be one Parameter."""']
        lines += [f"        {line}" for line in ties]
        writer = FunctionWriter(
            tree,
            lambda op, value: "self." + reach(tree.slot(op, value).path),
            lambda op: self.layer_text(op, tree.root),
            "dtype",
        )
        inputs = self.program.inputs
        words = [writer.argument(value, value.name) for value in inputs]
        writer.roles = dict(zip(self.program.outputs, self.converted.outputs, strict=True))
        items = self.items(())
        flat = [each for item in items for each in (item.inner() if isinstance(item, Choice) else [item])]
        ops = [item for item in flat if isinstance(item, Op)]
        extra = [SizeReader(item) for item in flat if isinstance(item, Loop)]
        head = self.prologue(writer, [*ops, *extra], inputs, tree.root, words)
        writer.write(items, self.program.outputs)
        lines += ["", f"    def forward({', '.join(['self', *words])}):"]
        lines += [f"        {line}" for line in [*head, *writer.lines]]
        lines.append("        return " + ", ".join(writer.result(value, None) for value in self.program.outputs))
        return "\n\n" + "\n".join(lines) + "\n"

    def numbers(self, node: Node) -> Iterator[str]:
        """Yield sizes for the constructor, leaving out what block classes build."""
        return map(str, sizes_of(node, lambda each: self.stack_text(each) is not None))

    def ties(self) -> list[str]:
        lines = []
        for slots in self.tree.slots.values():
            for slot in slots[1:]:
                lines.append(f"self.{reach(slot.path)} = self.{reach(slots[0].path)}")
        return lines

    def items(self, region: Region) -> list[Op | Item]:
        """Return the statements of a region in order: operators outside blocks, loops over blocks, and choices."""
        stacks = [each for stack in self.stacks for each in (stack, *stack.twins)]
        owner = {op: stack for stack in stacks for block in stack.blocks for op in block.ops}
        loops: dict[Stack, Item] = {}
        waiting: list[Op | Item] = []
        for op in self.program.ops:
            if self.regions[op] != region:
                continue
            if op in owner:
                item = loops.get(owner[op]) or loops.setdefault(owner[op], Loop(self, owner[op]))
            elif op.key == ("", "If"):
                item = Choice(op, [self.items((*region, (op, number))) for number in (0, 1)])
            else:
                item = op
            if item not in waiting:
                waiting.append(item)
        made = {output: item for item in waiting for output in _made(item) if output is not None}
        done: dict[Op | Item, None] = {}

        def visit(item: Op | Item) -> None:
            stack = [item]
            while stack:
                top = stack[-1]
                reads = top.reads() if isinstance(top, Item) else [v for v in top.inputs if v is not None]
                before = [
                    made[value]
                    for value in reads
                    if value in made and made[value] is not top and made[value] not in done
                ]
                if before:
                    stack.extend(before)
                else:
                    done.setdefault(stack.pop())

        for item in waiting:
            visit(item)
        return list(done)


def _called(body: str) -> list[str]:
    """Return the text of the helpers that a text calls, and of those that they call."""
    texts = {name: inspect.getsource(each).rstrip() for name, each in vars(helpers).items() if inspect.isfunction(each)}
    called: dict[str, str] = {}
    while True:
        more = {name: text for name, text in texts.items() if name not in called and f"{name}(" in body}
        if not more:
            return [text for name, text in texts.items() if name in called]
        called |= more
        body = "".join(more.values())


def _made(item: Op | Item) -> list[Value | None]:
    return item.makes() if isinstance(item, Item) else item.outputs


def _integers(code) -> int:
    found: list[int] = []
    if code is not None:
        render(code, lambda leaf: "_", found.append)
    return len(found)


def _wrapped(line: str) -> list[str]:
    indent = len(line) - len(line.lstrip())
    return [" " * indent + piece for piece in wrap(line.strip(), 116 - indent)]
