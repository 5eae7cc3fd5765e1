"""Names: what the framework called a stored tensor, from all that exporters leave behind."""

import re
from collections.abc import Mapping

from graphclone.model import Model
from graphclone.pytorch.program import Op, Value

LOST = re.compile(
    r"(^|/)(onnx::|val_\d+|_val_\d+|const_|const_fold|kernel2d_|lifted_tensor|_tensor_constant|Constant_?\d*$)"
    r"|Constant(_\d+)?_output_\d+|^/|::|__\d+$|_to_copy|^(ge|le|lt|gt|eq|expand|new_ones|arange|view|full|cat|mul|add|sub|slice|getitem)(_\d+)?$"
)
"""What exporters call tensors whose name is gone."""
SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
SIGNATURE_LINE = re.compile(r"^(?P<key>\w+): (?P<kind>PARAMETER|BUFFER|CONSTANT_TENSOR) target='(?P<target>[^']+)'", re.MULTILINE)
FX_ARGUMENT = re.compile(r"%([pbc]_\w+)")

LEAVES = {
    ("MatMul", 0): "weight", ("MatMul", 1): "weight", ("Gemm", 1): "weight", ("Gemm", 2): "bias",
    ("Conv", 1): "weight", ("Conv", 2): "bias", ("ConvTranspose", 1): "weight", ("ConvTranspose", 2): "bias",
    ("LayerNormalization", 1): "weight", ("LayerNormalization", 2): "bias", ("RMSNormalization", 1): "weight",
    ("SimplifiedLayerNormalization", 1): "weight", ("GroupNormalization", 1): "weight", ("GroupNormalization", 2): "bias",
    ("BatchNormalization", 1): "weight", ("BatchNormalization", 2): "bias", ("InstanceNormalization", 1): "weight",
    ("InstanceNormalization", 2): "bias", ("Gather", 0): "weight", ("Transpose", 0): "weight",
    ("Mul", 0): "weight", ("Mul", 1): "weight", ("Add", 0): "bias", ("Add", 1): "bias",
}  # fmt: skip
"""What a module calls the tensor in this place."""


class Names:
    """All name sources of one model: the signature that torch.export leaves, scopes of nodes, names of initializers."""

    def __init__(self, model: Model, graph_metadata: Mapping[str, str]):
        lines = SIGNATURE_LINE.findall(graph_metadata.get(SIGNATURE, ""))
        self.by_key = {key: target for key, _, target in lines}
        self.kinds = {target: kind for _, kind, target in lines}
        self.torch = model.graph.producer_name == "pytorch"

    def kind(self, name: str) -> str | None:
        """Return PARAMETER, BUFFER or CONSTANT_TENSOR as the exporter says, or None."""
        return self.kinds.get(name)

    def lost(self, name: str) -> bool:
        """Tell whether the exporter made the name up."""
        if self.kinds:
            return name not in self.kinds
        return LOST.search(name) is not None

    def is_parameter(self, name: str) -> bool:
        """Tell whether a scalar of this name is trained."""
        return self.kinds.get(name) == "PARAMETER" if self.kinds else self.torch and not self.lost(name)

    def buffer(self, name: str) -> str:
        return name

    def of(self, value: Value, op: Op) -> str:
        """Return the name of a stored tensor as the module around `op` calls it."""
        slot = next(slot for slot, each in enumerate(op.inputs) if each is value)
        lost = self.lost(value.name)
        leaf = LEAVES.get((op.type, slot)) if not op.domain else None
        if self.kinds:
            return self._told(value, op, leaf if lost else value.name.rpartition(".")[2])
        if leaf is None or not op.scope or op.type in ("Add", "Mul") and lost:
            return value.name
        own_module = value.name.rpartition(".")[0]
        if not lost and (op.type == "Add" or own_module == op.scope or own_module.startswith(op.scope + ".")):
            return value.name
        return f"{op.scope}.{leaf}"

    def _told(self, value: Value, op: Op, leaf: str | None) -> str:
        """Choose among the names that the signature lists: this module's own, else what torch's own graph says."""
        own = f"{op.scope}.{leaf}".lstrip(".")
        if own in self.kinds:
            return own
        if not self.lost(value.name):
            return value.name
        targets = [self.by_key[key] for key in FX_ARGUMENT.findall(op.fx) if key in self.by_key]
        wanted = "bias" if len(value.weight.shape) == 1 else "weight"
        fitting = [target for target in targets if target.endswith(wanted)] or targets
        return fitting[0] if len(fitting) == 1 else value.name
