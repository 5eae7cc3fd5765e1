"""The text of constructors: what builds each module of the tree."""

from collections.abc import Callable, Iterator

import torch

from graphclone.pytorch.code import render
from graphclone.pytorch.tree import Layer, Node, Slot

Integer = Callable[[int], str]


def build(node: Node, numbers: Iterator[str], stacks: Callable[[Node], str | None]) -> str:
    """Return the expression that makes a module; `numbers` gives the sizes in the order of `sizes_of`."""
    if (stack := stacks(node)) is not None:
        return stack
    if node.layer is not None:
        return layer(node.layer, numbers, next(iter(node.tensors.values())).stored.dtype)
    members = dict(_members(node, numbers, stacks))
    if members and not node.tensors and list(members) == [str(index) for index in range(len(members))]:
        return "nn.ModuleList([" + ", ".join(members.values()) + "])"
    named = [f"{name}={text}" for name, text in members.items() if not name.isdigit()]
    indexed = [f"{name!r}: {text}" for name, text in members.items() if name.isdigit()]
    return "Group(" + ", ".join([*named, *(["**{" + ", ".join(indexed) + "}"] if indexed else [])]) + ")"


def _members(node: Node, numbers: Iterator[str], stacks) -> Iterator[tuple[str, str]]:
    own = [(name, tensor(slot, numbers)) for name, slot in node.tensors.items()]
    for name, child in node.children.items():
        yield name, build(child, numbers, stacks)
    yield from [(name, text) for name, text in own if text is not None]


def tensor(slot: Slot, numbers: Iterator[str]) -> str | None:
    """Return the expression of a tensor that stands alone, None for another name of one."""
    shape = "(" + "".join(f"{next(numbers)}, " for _ in slot.stored.shape).strip()
    shape = (shape.rstrip(",") if len(slot.stored.shape) > 1 else shape) + ")"
    kind = "" if slot.stored.dtype == torch.float32 else f", dtype={slot.stored.dtype}"
    if not slot.first:
        return None
    empty = f"torch.empty({shape}{kind})"
    frozen = ", requires_grad=False" if slot.stored.frozen else ""
    if slot.stored.trainable:
        return f"nn.Parameter({empty}{frozen})"
    return f"nn.Buffer({empty})" if slot.stored.persistent else empty


def layer(given: Layer, numbers: Iterator[str], dtype: torch.dtype) -> str:
    """Return the constructor call of a torch layer."""
    words = [next(numbers) for _ in given.sizes]
    words += [f"{name}={render(value, str)}" for name, value in given.options]
    if dtype != torch.float32 and given.kind != "Conv1D":
        words.append(f"dtype={dtype}")
    return f"{'' if given.kind == 'Conv1D' else 'nn.'}{given.kind}({', '.join(words)})"


def sizes_of(node: Node, stop: Callable[[Node], bool] = lambda node: False) -> Iterator[int]:
    """Yield the sizes that `build` asks for, in its order."""
    if stop(node):
        return
    if node.layer is not None:
        yield from node.layer.sizes
        return
    for slot in node.tensors.values():
        yield from slot.stored.shape
    for child in node.children.values():
        yield from sizes_of(child, stop)
