"""Names: what the framework called a stored tensor, from all that exporters leave behind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from graphclone.model import Model
from graphclone.pytorch.program import Op, Program, Value

LOST = re.compile(
    r"(^|/)(onnx::|val_\d+|_val_\d+|const_|const_fold|kernel2d_|lifted_tensor|_tensor_constant|Constant_?\d*$)"
    r"|Constant(_\d+)?_output_\d+|^/|::|__\d+$|_to_copy|^(ge|le|lt|gt|eq|expand|new_ones|arange|view|full|cat|mul|add|sub|slice|getitem|scalar_tensor_default|unsqueeze|squeeze)(_\d+)?$"
)
"""What exporters call tensors whose name is gone."""
MERGED = re.compile(r"_merged_\d+$")
"""What optimum adds to the name of the first of several equal tensors."""
SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
SIGNATURE_LINE = re.compile(
    r"^(?P<key>\w+): (?P<kind>PARAMETER|BUFFER|CONSTANT_TENSOR) target='(?P<target>[^']+)'", re.MULTILINE
)
FX_TARGET = re.compile(
    r"target=torch\.ops\.aten\.(linear|addmm|mm|bmm|matmul|embedding|index|conv\w*|convolution|layer_norm|native_layer_norm)\."
)
FX_ARGUMENT = re.compile(r"%([pbc]_\w+)")

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


class Names:
    """All name sources of one model: the signature that torch.export leaves, scopes of nodes, names of initializers."""

    def __init__(self, model: Model, program: Program, graph_metadata: Mapping[str, str]):
        lines = SIGNATURE_LINE.findall(graph_metadata.get(SIGNATURE, ""))
        self.by_key = {key: target for key, _, target in lines}
        self.kinds = {target: kind for _, kind, target in lines}
        self.torch = (model.graph.producer_name or "").startswith(("pytorch", "onnxruntime"))
        self.heads = self._learn(program)

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
        return self.lost(value.name) and self.of(value, op) not in self.kinds

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
        match = FX_TARGET.search(op.fx)
        targets = [self.by_key[key] for key in FX_ARGUMENT.findall(op.fx) if key in self.by_key]
        wanted = "bias" if len(value.weight.shape) == 1 else "weight"
        fitting = [target for target in targets if target.endswith(wanted)] or targets
        if match is None or len(fitting) != 1:
            return self.folded(value, op, scope)
        return fitting[0]

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
