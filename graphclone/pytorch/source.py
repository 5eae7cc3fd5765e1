"""Source: the text of a module file, a class per kind of block and one for the model."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from graphclone.pytorch import helpers
from graphclone.pytorch.blocks import Block, Stack, find_stacks
from graphclone.pytorch.code import DTYPE
from graphclone.pytorch.constructors import build, sizes_of, tensor
from graphclone.pytorch.conversion import Converted
from graphclone.pytorch.function_writer import FunctionWriter, Item, leaves, symbols_of, wrap
from graphclone.pytorch.program import Op, Value
from graphclone.pytorch.safe_names import local
from graphclone.pytorch.sizes import Size, Symbol
from graphclone.pytorch.tree import Node, Slot, Tree

HEADER = '''"""{title}"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
'''

CHECKPOINT = "from torch.utils.checkpoint import checkpoint\n"

GROUP = '''

class Group(nn.Module):
    """Modules and tensors under their names."""

    def __init__(self, /, **members):
        super().__init__()
        for name, member in members.items():
            if isinstance(member, (nn.Module, nn.Parameter)):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member, persistent=False)

    def __getitem__(self, index):
        return getattr(self, str(index))
'''

CONV1D = '''

class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)
'''

LOAD = '''

def load(path=None):
    """Return the model with the weights of `path`, by default the model.safetensors beside this file."""
    with torch.device("meta"):
        model = Model()
    fill(model, load_file(path or Path(__file__).with_name("model.safetensors")))
    return model


def fill(model, tensors):
    """Give the model its tensors, those of its state dict and its tables."""
    for name, _ in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensors.pop(name)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"the weights hold no tensor {name!r}")
'''


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
    return _Writer(converted, title, checkpoint_blocks).run()


class _Writer:
    def __init__(self, converted: Converted, title: str, checkpoint_blocks: bool):
        self.checkpoint_blocks = checkpoint_blocks
        self.converted = converted
        self.program = converted.program
        self.title = re.sub(r"[^\w .,:;()\[\]/+-]", "_", title)[:100]
        self.tree = Tree(self.program, converted.stored)
        self.stacks = find_stacks(self.program, self.tree)
        self.at = {stack.node: stack for stack in self.stacks}
        self.classes: dict[tuple, str] = {}
        self.variables: dict[tuple, list[int]] = {}
        self.names: set[str] = {"Model", "Group", "Conv1D"}

    def run(self) -> Source:
        bodies = [self.block_class(kind) for stack in self.stacks for kind in self.kinds(stack)]
        bodies.append(self.model_class())
        body = "".join(bodies)
        used = [
            function for name, function in vars(helpers).items() if inspect.isfunction(function) and f"{name}(" in body
        ]
        text = HEADER.format(title=self.title)
        text += CHECKPOINT if "checkpoint(" in body else ""
        text += "".join("\n\n" + inspect.getsource(function).rstrip() + "\n" for function in used)
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
        texts = iter([names.get(index) or str(number) for index, number in enumerate(block.integers)][code_count:])
        lines = [f"class {self.classes[stack.node, block.key]}(nn.Module):"]
        lines.append(f"    def __init__({', '.join(['self', *distinct])}):")
        lines.append("        super().__init__()")
        used = {name for index, name in names.items() if index < code_count}
        lines += [f"        self.{name} = {name}" for name in distinct if name in used]
        lines += self.constructor(block.node, texts)
        writer = FunctionWriter(
            self.tree,
            lambda op, value: "self." + reach(self.tree.slot(op, value).path[len(block.node.path) :]),
            lambda op: self.layer_text(op, block.node),
            "dtype",
        )
        position = 0
        for op in block.ops:
            for code in op.code if isinstance(op.code, tuple) else (op.code,):
                count = _integers(code)
                writer.numbers[id(code)] = [
                    f"self.{names[index]}" if index in names else str(block.integers[index])
                    for index in range(position, position + count)
                ]
                position += count
        words = [writer.argument(value, hint) for value, hint in zip(block.inputs, self.hints(block), strict=True)]
        head = self.prologue(writer, block.ops, block.inputs, block.node, words, block)
        writer.write(block.ops, block.outputs)
        lines += ["", f"    def forward({', '.join(['self', *words])}):"]
        lines += [f"        {line}" for line in [*head, *writer.lines]]
        lines.append("        return " + ", ".join(writer.text(value, None) for value in block.outputs))
        return "\n\n" + "\n".join(_fold(lines)) + "\n"

    def hints(self, block: Block) -> list[str]:
        made = {output for stack in self.stacks for each in stack.blocks for output in each.outputs}
        result = []
        for value in block.inputs:
            streams = value in made or (not value.is_table and value.dims and value.rank >= 3)
            result.append("x" if streams else self.word(value))
        return result

    def word(self, value: Value) -> str:
        from graphclone.pytorch.function_writer import HINTS

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
            if slot.stored.trainable:
                lines.append(f"        self.{slot.name} = {text}")
            else:
                lines.append(f'        self.register_buffer("{slot.name}", {text}, persistent=False)')
        return [piece for line in lines for piece in _wrapped(line)]

    def stack_text(self, node: Node) -> str | None:
        stack = self.at.get(node)
        if stack is None or node.tensors or [int(name) for name in node.children] != list(range(len(stack.blocks))):
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
        if node is None:
            return None
        path = node.path[len(inside.path) :]
        return "self." + reach(path)

    # -- functions ------------------------------------------------------------------------------------------------

    def prologue(
        self,
        writer: FunctionWriter,
        ops: list[Op],
        inputs: list[Value],
        node: Node,
        words: list[str],
        block: Block | None = None,
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
            if len(axes) == value.rank:
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
        items = self.items()
        ops = [item for item in items if isinstance(item, Op)]
        extra = [_SizeReader(item) for item in items if isinstance(item, Item)]
        head = self.prologue(writer, [*ops, *extra], inputs, tree.root, words)
        writer.write(items, self.program.outputs)
        lines += ["", f"    def forward({', '.join(['self', *words])}):"]
        lines += [f"        {line}" for line in [*head, *writer.lines]]
        lines.append("        return " + ", ".join(writer.text(value, None) for value in self.program.outputs))
        return "\n\n" + "\n".join(_fold(lines)) + "\n"

    def numbers(self, node: Node) -> Iterator[str]:
        """Yield sizes for the constructor, leaving out what block classes build."""
        return map(str, sizes_of(node, lambda each: self.stack_text(each) is not None))

    def ties(self) -> list[str]:
        lines = []
        for slots in self.tree.slots.values():
            for slot in slots[1:]:
                lines.append(f"self.{reach(slot.path)} = self.{reach(slots[0].path)}")
        return lines

    def items(self) -> list[Op | Item]:
        """Return the statements of the model in order: operators outside blocks, and loops over blocks."""
        owner = {op: stack for stack in self.stacks for block in stack.blocks for op in block.ops}
        loops = {stack: _Loop(self, stack) for stack in self.stacks}
        waiting: list[Op | Item] = []
        for op in self.program.ops:
            item = loops[owner[op]] if op in owner else op
            if item not in waiting:
                waiting.append(item)
        made = {
            output: item
            for item in waiting
            for output in (item.makes() if isinstance(item, _Loop) else item.outputs)
            if output is not None
        }
        done: dict[Op | Item, None] = {}

        def visit(item: Op | Item) -> None:
            stack = [item]
            while stack:
                top = stack[-1]
                reads = top.reads() if isinstance(top, _Loop) else [v for v in top.inputs if v is not None]
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


class _SizeReader:
    """Stands for a loop where the sizes that a function needs are collected."""

    def __init__(self, loop: "_Loop"):
        from graphclone.pytorch.code import Code

        self.outputs: list = []
        self.code = Code("", *[Size.of(symbol) for block in loop.stack.blocks for symbol in loop.passed(block)])


class _Loop(Item):
    """Run the blocks of a stack."""

    def __init__(self, writer: _Writer, stack: Stack):
        self.source = writer
        self.stack = stack
        self.inner = {output for block in stack.blocks for output in block.outputs}

    def makes(self) -> list[Value]:
        return [
            output for block in self.stack.blocks for op in block.ops for output in op.outputs if output is not None
        ]

    def reads(self) -> list[Value]:
        values = [value for block in self.stack.blocks for value in block.inputs if value not in self.inner]
        return [value for value in values for _ in range(2)]

    def passed(self, block: Block) -> list[Symbol]:
        """Return the symbols that the block cannot read off its inputs."""
        inside = {output for op in block.ops for output in op.outputs}
        wanted = dict.fromkeys(symbol for op in block.ops for symbol in symbols_of(op.code))
        return [
            symbol
            for symbol in wanted
            if symbol.value not in inside and not any(v.dims and Size.of(symbol) in v.dims for v in block.inputs)
        ]

    def write(self, writer: FunctionWriter) -> None:
        for value in dict.fromkeys(self.reads()):
            if value in writer.pending:
                writer.statement(writer.pending.pop(value))
        if not self.write_loop(writer):
            self.write_calls(writer)

    def write_calls(self, writer: FunctionWriter) -> None:
        path = reach(self.stack.node.path)
        for number, block in enumerate(self.stack.blocks):
            targets = []
            for _ in block.outputs:
                name = local("x", {*writer.taken, *targets})
                targets.append(name)
            words = [self.word(writer, value, block) for value in block.inputs]
            words += [writer.size(Size.of(symbol)) for symbol in self.passed(block)]
            target = ", ".join(targets) or "_"
            index = f"{path}[{number}]" if path else f'get_submodule("{number}")'
            writer.lines.extend(wrap(f"{target} = {self.call(f'self.{index}', words)}", writer.width))
            for output, name in zip(block.outputs, targets, strict=True):
                writer.names[output] = name
                writer.taken.add(name)

    def word(self, writer: FunctionWriter, value: Value, block: Block) -> str:
        if value.parameter is not None and value.known is None:
            reader = next(op for op in block.ops if value in op.inputs)
            return writer.place(reader, value)
        return writer.text(value, None)

    def write_loop(self, writer: FunctionWriter) -> bool:
        """Write a for loop if each block's inputs are the one before's outputs, in one order, and shared values."""
        blocks = self.stack.blocks
        first, rest = blocks[0], blocks[1:]
        count = len(first.outputs)
        if not self.stack.node.path or any(
            len(b.inputs) != len(first.inputs) or len(b.outputs) != count for b in blocks
        ):
            return False
        if self.source.stack_text(self.stack.node) is None or any(self.passed(b) != self.passed(first) for b in blocks):
            return False
        streams: dict[int, int] = {}
        for before, block in zip(blocks, rest, strict=False):
            for position, value in enumerate(block.inputs):
                if value in before.outputs:
                    place = before.outputs.index(value)
                    if streams.setdefault(position, place) != place:
                        return False
                elif value in self.inner or position in streams:
                    return False
        if sorted(streams.values()) != list(range(count)):
            return False
        if any(value in self.used_outside() for block in blocks[:-1] for value in block.outputs):
            return False
        words, zipped = [], []
        carried: dict[int, str] = {}
        for position, value in enumerate(first.inputs):
            if position in streams:
                name = local("hidden", writer.taken)
                writer.taken.add(name)
                writer.lines.append(f"{name} = {self.word(writer, value, first)}")
                carried[streams[position]] = name
                words.append(name)
                continue
            column = [self.word(writer, block.inputs[position], block) for block in blocks]
            if len(set(column)) == 1:
                words.append(column[0])
            else:
                name = local(f"own_{len(zipped)}", writer.taken)
                writer.taken.add(name)
                zipped.append((name, f"({', '.join(column)})"))
                words.append(name)
        words += [writer.size(Size.of(symbol)) for symbol in self.passed(first)]
        target = ", ".join(carried[place] for place in range(count))
        path = f"self.{reach(self.stack.node.path)}"
        block = local("block", writer.taken)
        if zipped:
            names, columns = ", ".join(name for name, _ in zipped), ", ".join(column for _, column in zipped)
            writer.lines.extend(wrap(f"own = zip({path}, {columns})", writer.width))
            writer.lines.append(f"for {block}, {names} in own:")
        else:
            writer.lines.append(f"for {block} in {path}:")
        writer.lines.append(f"    {target} = {self.call(block, words)}")
        for place, value in enumerate(blocks[-1].outputs):
            writer.names[value] = carried[place]
        return True

    def call(self, block: str, words: list[str]) -> str:
        if self.source.checkpoint_blocks:
            return f"checkpoint({', '.join([block, *words])}, use_reentrant=False)"
        return f"{block}({', '.join(words)})"

    def used_outside(self) -> set[Value]:
        mine = {op for block in self.stack.blocks for op in block.ops}
        found = {value for op in self.source.program.ops if op not in mine for value in op.inputs if value is not None}
        return found | set(self.source.program.outputs)


def reach(path: tuple[str, ...]) -> str:
    """Return the text that reaches a member: `h[0].attn.weight`."""
    text = path[0] if path and not path[0].isdigit() else f'get_submodule("{path[0]}")' if path else ""
    for name in path[1:]:
        text += f"[{name}]" if name.isdigit() else f".{name}"
    return text


def _integers(code) -> int:
    from graphclone.pytorch.code import render

    found: list[int] = []
    if code is not None:
        render(code, lambda leaf: "_", found.append)
    return len(found)


def _wrapped(line: str) -> list[str]:
    indent = len(line) - len(line.lstrip())
    return [" " * indent + piece for piece in wrap(line.strip(), 116 - indent)]


def _fold(lines: list[str]) -> list[str]:
    return lines
