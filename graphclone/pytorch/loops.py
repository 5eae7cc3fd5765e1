"""Loops: how a model's forward runs a stack of blocks."""

from typing import TYPE_CHECKING

from graphclone.pytorch.blocks import Block, Stack
from graphclone.pytorch.code import Code
from graphclone.pytorch.function_writer import FunctionWriter, Item, symbols_of, wrap
from graphclone.pytorch.program import Value
from graphclone.pytorch.safe_names import local
from graphclone.pytorch.sizes import Size, Symbol
from graphclone.pytorch.tree import reach

if TYPE_CHECKING:
    from graphclone.pytorch.source import SourceWriter


class SizeReader:
    """Stands for a loop where the sizes that a function needs are collected."""

    def __init__(self, loop: "Loop"):
        self.outputs: list = []
        self.code = Code("", *[Size.of(symbol) for block in loop.stack.blocks for symbol in loop.passed(block)])


class Loop(Item):
    """Run the blocks of a stack."""

    def __init__(self, source: "SourceWriter", stack: Stack):
        self.source = source
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
        for block in self.stack.blocks:
            targets, number = [], block.node.name
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
        block = block if self.stack.method == "forward" else f"{block}.{self.stack.method}"
        if self.source.checkpoint_blocks:
            return f"checkpoint({', '.join([block, *words])}, use_reentrant=False)"
        return f"{block}({', '.join(words)})"

    def used_outside(self) -> set[Value]:
        mine = {op for block in self.stack.blocks for op in block.ops}
        found = {value for op in self.source.program.ops if op not in mine for value in op.inputs if value is not None}
        return found | set(self.source.program.outputs)
