"""Names: what the framework called a stored tensor, from all that exporters leave behind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from graphclone.model import Model
from graphclone.pytorch import fx
from graphclone.pytorch.program import Op, Program, Value

LOST = re.compile(
    r"(^|/)(onnx::|val_\d+|_val_\d+|const_|const_fold|kernel2d_|lifted_tensor|_tensor_constant|Constant_?\d*$)"
    r"|Constant(_\d+)?_output_\d+|^/|::|__\d+$|_to_copy|^(ge|le|lt|gt|eq|expand|new_ones|arange|view|full|cat|mul|add|sub|slice|getitem|scalar_tensor_default|unsqueeze|squeeze)(_\d+)?$"
)
"""What exporters call tensors whose name is gone."""
STATISTICS = re.compile(r"(^|\.)(running_mean|running_var)$")
MERGED = re.compile(r"_merged_\d+$")
"""What optimum adds to the name of the first of several equal tensors."""
SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
SIGNATURE_LINE = re.compile(
    r"^(?P<key>\w+): (?P<kind>PARAMETER|BUFFER|CONSTANT_TENSOR) target='(?P<target>[^']+)'"
    r"( persistent=(?P<kept>True))?",
    re.MULTILINE,
)

LEAVES = {
    ("MatMul", 0): "weight", ("MatMul", 1): "weight", ("Gemm", 1): "weight", ("Gemm", 2): "bias",
    ("Conv", 1): "weight", ("Conv", 2): "bias", ("ConvTranspose", 1): "weight", ("ConvTranspose", 2): "bias",
    ("LayerNormalization", 1): "weight", ("LayerNormalization", 2): "bias", ("RMSNormalization", 1): "weight",
    ("SimplifiedLayerNormalization", 1): "weight",
    ("GroupNormalization", 1): "weight", ("GroupNormalization", 2): "bias",
    ("BatchNormalization", 1): "weight", ("BatchNormalization", 2): "bias", ("InstanceNormalization", 1): "weight",
    ("InstanceNormalization", 2): "bias", ("Gather", 0): "weight", ("GatherND", 0): "weight",
    ("Transpose", 0): "weight",
    ("Mul", 0): "weight", ("Mul", 1): "weight", ("Add", 0): "bias", ("Add", 1): "bias",
}  # fmt: skip
"""What a module calls the tensor in this place."""
OTHER_LEAF = {"weight": "bias", "bias": "weight"}


class Names:
    """All name sources of one model: the signature that torch.export leaves, scopes of nodes, names of initializers."""

    def __init__(self, model: Model, program: Program, graph_metadata: Mapping[str, str]):
        lines = list(SIGNATURE_LINE.finditer(graph_metadata.get(SIGNATURE, "")))
        self.by_key = {line["key"]: line["target"] for line in lines}
        self.kinds = {line["target"]: line["kind"] for line in lines}
        self.kept = [line["target"] for line in lines if line["kind"] == "PARAMETER" or line["kept"]]
        self.torch = (model.graph.producer_name or "").startswith(("pytorch", "onnxruntime"))
        self.users = program.users()
        self.buffers: frozenset[str] = frozenset()
        self.heads = self._learn(program)

    def is_buffer(self, name: str) -> bool:
        """Tell whether a float tensor of this name is in state dicts but not trained."""
        return name in self.buffers or self.kinds.get(name) == "BUFFER" or STATISTICS.search(name) is not None

    def order(self, checkpoint: object) -> dict[str, int]:
        """Return the places of names where the framework lists them: in the signature, else in a state dict."""
        listed = self.kinds or (checkpoint if isinstance(checkpoint, Mapping) else ())
        return {name: place for place, name in enumerate(listed)}

    def kind(self, name: str) -> str | None:
        """Return PARAMETER, BUFFER or CONSTANT_TENSOR as the exporter says, or None."""
        return self.kinds.get(name)

    def kind_when_indexed(self, value: Value, reading: Iterable[Op]) -> str | None:
        """Return the kind of a tensor without a name that modules index, `self.weight[positions]`, or None."""
        if not self.kinds or not self.lost(value.name):
            return None
        kinds = {self.kind(self.of(value, op)) for op in reading if op.type == "GatherND" and op[0] is value}
        return kinds.pop() if len(kinds) == 1 else None

    def lost(self, name: str) -> bool:
        """Tell whether the exporter made the name up."""
        if self.kinds and self.torch:
            return name not in self.kinds
        return LOST.search(name) is not None

    def given(self, name: str) -> bool:
        """Tell whether torch, and no other exporter, gave a tensor this name."""
        return self.torch and not self.lost(name)

    def is_parameter(self, name: str) -> bool:
        """Tell whether a scalar of this name is trained."""
        return self.kinds.get(name) == "PARAMETER" if self.kinds else self.torch and not self.lost(name)

    def of(self, value: Value, op: Op) -> str:
        """Return the name of a stored tensor as the module around `op` calls it."""
        slot = next(slot for slot, each in enumerate(op.inputs) if each is value)
        lost, scope = self.lost(value.name), self.scope(op)
        leaf = LEAVES.get((op.type, slot)) if not op.domain else None
        if leaf is None and not lost:
            return self.own(value)
        if self.holds_norm(op) and not self.lost(op[1].name):
            return f"{op[1].name.rpartition('.')[0]}.{leaf}"
        if self.by_key and fx.is_computed(fx.argument(op.type, op.fx, slot, value.name)):
            return self.folded(value, op, scope)
        if lost and (beside := self._beside(op, leaf, scope)):
            return beside
        if self.kinds:
            return self._told(value, op, scope, leaf if lost else value.name.rpartition(".")[2])
        if lost and (leaf is None or op.type in ("Add", "Mul")):
            return self.folded(value, op, scope)
        if leaf is None or not scope:
            return self.own(value)
        own_module = value.name.rpartition(".")[0]
        if not lost and (op.type == "Add" or own_module == scope or own_module.startswith(scope + ".")):
            return self.own(value)
        return f"{scope}.{leaf}"

    def own(self, value: Value) -> str:
        """Return a stored tensor's name without the number of the group of equal tensors that it stands for."""
        return MERGED.sub("", value.name)

    def made_up(self, value: Value, op: Op) -> bool:
        """Tell whether no parameter of the checkpoint stands behind a stored tensor, as far as names tell."""
        if op.type == "InstanceNormalization" and "group_norm" in fx.target(op.fx):
            return self.lost(value.name)
        return self.lost(value.name) and self.of(value, op) not in self.kinds

    def holds_norm(self, op: Op) -> bool:
        """Tell whether a batch norm is folded into the weights of a linear operator."""
        return bool(self.kinds) and fx.holds_norm(op.type, op.fx)

    def folded(self, value: Value, op: Op, scope: str) -> str:
        """Return a name for what the exporter computed from tensors of the checkpoint, in the module that reads it."""
        return f"{scope}.folded_{op.type.lower()}" if scope and self.torch else value.name

    def _told(self, value: Value, op: Op, scope: str, leaf: str | None) -> str:
        """Choose among the names that the signature lists: this module's own, else what torch's own graph says."""
        own = f"{scope}.{leaf}".lstrip(".")
        if own in self.kinds or (self.translated(op) and leaf is not None):
            return own
        if not self.lost(value.name):
            return value.name
        others = {each.name for each in op.inputs if each is not None and each is not value}
        targets = [name for name in self.told(op) if name not in others]
        wanted = "bias" if len(value.weight.shape) == 1 else "weight"
        fitting = [target for target in targets if target.endswith(wanted)] or targets
        if not fx.LAYERS.fullmatch(fx.target(op.fx)) or len(fitting) != 1:
            return self.folded(value, op, scope)
        return fitting[0]

    def told(self, op: Op) -> list[str]:
        """Return the names of what torch's own graph gives the operator."""
        return [self.by_key[key] for key in fx.PARAMETER.findall(op.fx) if key in self.by_key]

    def _beside(self, op: Op, leaf: str | None, scope: str) -> str | None:
        """Return the name beside that of a layer's other tensor: `conv.weight` beside `conv.bias`; None without one.

        Functions that a module calls with the tensors of a layer below it leave the scope of the module. Quantizers
        leave none, nor what torch's own graph says.
        """
        wanted = OTHER_LEAF.get(leaf)
        others = [each for slot, each in enumerate(op.inputs) if each and LEAVES.get((op.type, slot)) == wanted]
        if not scope and op.type in ("Transpose", "MatMul"):
            products = self.users.get(op.output, []) if op.type == "Transpose" else [op]
            sums = [user for product in products for user in self.users.get(product.output, []) if user.type == "Add"]
            others = [each for user in sums for each in user.inputs]
        for each in others if wanted else ():
            module, _, ending = self.own(each).rpartition(".")
            name = f"{module}.{leaf}"
            told = each.weight is not None and not self.lost(each.name) and ending == wanted
            if told and (not self.kinds or name in self.kinds) and (not scope or module.startswith(f"{scope}.")):
                return name
        return None

    # -- modules --------------------------------------------------------------------------------------------------

    def scope(self, op: Op) -> str:
        """Return the path of the module around an operator, as the initializers call it."""
        parts = op.scope.split(".") if op.scope else []
        for length in range(len(parts), -1, -1):
            head = tuple(parts[:length])
            if head in self.heads:
                return ".".join((*self.heads[head], *parts[length:]))
        return op.scope

    def translated(self, op: Op) -> bool:
        return self.scope(op) != op.scope

    def _learn(self, program: Program) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Learn where scopes and names part: a wrapper that scopes leave out, blocks that a cut renumbered."""
        votes: dict[tuple[str, ...], Counter] = {}
        for op in program.ops:
            for value in op.inputs:
                if (
                    value is None
                    or value.weight is None
                    or LOST.search(value.name)
                    or not op.scope
                    or op.type == "Identity"
                ):
                    continue
                scope, own = op.scope.split("."), value.name.split(".")[:-1]
                same = 0
                while same < min(len(scope), len(own)) and scope[-1 - same] == own[-1 - same]:
                    same += 1
                if not same:
                    continue
                if scope == own:
                    for length in range(len(scope) + 1):
                        votes.setdefault(tuple(scope[:length]), Counter())[tuple(scope[:length])] += 1
                else:
                    more = int(
                        same == len(scope)
                    )  # the whole scope fits: what is before it holds for its first part alone
                    head, target = tuple(scope[: len(scope) - same + more]), tuple(own[: len(own) - same + more])
                    votes.setdefault(head, Counter())[target] += 1
        winners = {head: counter.most_common(1)[0][0] for head, counter in votes.items()}
        counts = Counter(winners.values())
        return {head: target for head, target in winners.items() if head != target and counts[target] == 1}


def without_repeats(paths: list[str]) -> list[str]:
    """Drop names that only number another call of the same module: `attn.query_1.weight` beside `attn.query.weight`."""
    given = set(paths)

    def plain(path: str) -> str:
        return ".".join(re.sub(r"_\d+$", "", part) for part in path.split("."))

    return [path for path in paths if plain(path) == path or plain(path) not in given]
