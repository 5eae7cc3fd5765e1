"""The tree of modules: where each tensor sits, and which groups of tensors are a torch layer."""

from dataclasses import dataclass, field

from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import IDIOMS
from graphclone.pytorch.safe_names import OF_THE_MODEL, safe


@dataclass(eq=False)
class Node:
    """A module: child modules and tensors by name; `layer` says which torch layer it is."""

    name: str = ""
    parent: "Node | None" = None
    children: dict[str, "Node"] = field(default_factory=dict)
    tensors: dict[str, "Slot"] = field(default_factory=dict)
    layer: "Layer | None" = None

    @property
    def path(self) -> tuple[str, ...]:
        return () if self.parent is None else (*self.parent.path, self.name)

    def walk(self):
        """Yield this node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclass(eq=False)
class Slot:
    """A place for a tensor in a module; `first` is False where another place holds the same Parameter."""

    name: str
    node: Node
    stored: Stored
    original: str
    first: bool = True

    @property
    def path(self) -> tuple[str, ...]:
        return (*self.node.path, self.name)


@dataclass(frozen=True)
class Layer:
    """A torch layer: `kind` is its class; `sizes` and `options` its arguments."""

    kind: str
    sizes: tuple[int, ...]
    options: tuple[tuple[str, object], ...] = ()


class Tree:
    """All modules of a program, and which slot each operator's tensors are read from."""

    def __init__(self, program: Program, stored: list[Stored]):
        self.root = Node()
        self.slots: dict[Stored, list[Slot]] = {}
        self.by_name: dict[str, Slot] = {}
        for each in stored:
            for number, path in enumerate(dict.fromkeys([each.path, *each.aliases])):
                self._place(each, path, first=number == 0)
        for node in self.root.walk():
            if all(name.isdigit() for name in node.children):
                node.children = {name: node.children[name] for name in sorted(node.children, key=int)}
        self._find_layers(program)

    def _place(self, stored: Stored, path: str, first: bool) -> None:
        parts = path.split(".") if len(path) < 2000 else [path]
        if any(not part for part in parts):
            parts = [path]
        node = self.root
        for part in parts[:-1]:
            node = self._child(node, part)
        taken = _taken(node)
        name = safe(parts[-1], taken)
        if name.isdigit():
            name = safe(f"n{name}", taken)
        slot = Slot(name, node, stored, path, first)
        node.tensors[name] = slot
        self.slots.setdefault(stored, []).append(slot)

    def _child(self, node: Node, part: str) -> Node:
        key = ("module", part)
        names = node.__dict__.setdefault("names", {})
        if key not in names:
            name = safe(part, _taken(node))
            names[key] = node.children[name] = Node(name, node)
        return names[key]

    def slot(self, op: Op, value: Value) -> Slot:
        """Return the place an operator reads a tensor from: of several, the one of its own module."""
        slots = self.slots[value.parameter]
        scope = op.scope + "."
        return next((slot for slot in slots if slot.original.rpartition(".")[0] + "." == scope), slots[0])

    def _find_layers(self, program: Program) -> None:
        users: dict[Node, list[tuple[Op, str | None]]] = {}
        for op in program.ops:
            for node in {self.slot(op, value).node for value in op.inputs if _is_stored(value)}:
                users.setdefault(node, []).append(op)
        for node, ops in users.items():
            kinds = {layer_of(op, node, self) for op in ops}
            if len(kinds) == 1 and not node.children:
                node.layer = kinds.pop()

    def module(self, op: Op) -> Node | None:
        """Return the layer that computes an operator whole, or None."""
        nodes = {self.slot(op, value).node for value in op.inputs if _is_stored(value)}
        node = nodes.pop() if len(nodes) == 1 else None
        return node if node is not None and node.layer is not None else None


def _taken(node: Node) -> set[str]:
    return {*node.tensors, *node.children, *(OF_THE_MODEL if node.parent is None else ())}


def _is_stored(value: Value | None) -> bool:
    return value is not None and value.parameter is not None and value.known is None


def layer_of(op: Op, node: Node, tree: Tree) -> Layer | None:
    """Return the layer that this operator would make of the node, or None if it would make none."""
    places = {
        "Linear": ("weight", "bias"),
        "LayerNorm": ("weight", "bias"),
        "RMSNorm": ("weight",),
        "Conv": ("weight", "bias"),
    }
    if op.domain != IDIOMS and op.type != "Conv":
        return None
    if op.type == "Embedding":
        given = {"weight": op[1]}
    elif op.type in places:
        given = {name: op[slot] for slot, name in enumerate(places[op.type], start=1) if op[slot] is not None}
    else:
        return None
    if set(given) != set(node.tensors) or "weight" not in given:
        return None
    if any(not _is_stored(value) or tree.slot(op, value) is not node.tensors[name] for name, value in given.items()):
        return None
    if any(not value.parameter.trainable or value.parameter.frozen for value in given.values()):
        return None
    if _is_stored(op[0]) and op.type != "Embedding":
        return None
    shape, biased = given["weight"].dims, "bias" in given
    without = () if biased else (("bias", False),)
    if op.type == "Linear":
        if op.attribute("transposed"):
            return Layer("Conv1D", tuple(shape)) if biased else None
        return Layer("Linear", (shape[1], shape[0]), without)
    if op.type == "Embedding":
        return Layer("Embedding", tuple(shape))
    if op.type in ("LayerNorm", "RMSNorm"):
        if op.type == "RMSNorm":
            without = ()
        return Layer(op.type, (shape[0],), (("eps", op.attribute("epsilon")), *without))
    return _convolution(op, shape, without)


def _convolution(op: Op, shape: tuple[int, ...], without: tuple) -> Layer | None:
    rank = len(shape) - 2
    code = op.code
    if code is None or not code.template.startswith(f"F.conv{rank}d") or code.operands[0] is not op[0]:
        return None
    stride, padding, dilation, groups = code.operands[3:7]
    options = {"stride": (stride, (1,) * rank), "padding": (padding, (0,) * rank), "dilation": (dilation, (1,) * rank)}
    chosen = [(name, value) for name, (value, default) in options.items() if value != default]
    chosen += [("groups", groups)] if groups != 1 else []
    return Layer(f"Conv{rank}d", (shape[1] * groups, shape[0]), (("kernel_size", tuple(shape[2:])), *chosen, *without))


def reach(path: tuple[str, ...]) -> str:
    """Return the text that reaches a member: `h[0].attn.weight`."""
    text = path[0] if path and not path[0].isdigit() else f'get_submodule("{path[0]}")' if path else ""
    for name in path[1:]:
        text += f"[{name}]" if name.isdigit() else f".{name}"
    return text
