"""Prove that the basis of a width may change: every operator on it is a contraction, an addition, a norm or a move.

Between two bases nothing is computed per channel, so an orthogonal matrix slips through. What scales channels one by
one (a norm's weight, a layer scale) must fold into the matrices that read or write them. Source: SliceGPT, arXiv
2401.15024; the mean-free subspace that keeps the LayerNorm operator exact: see `passes/rotate.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis, find, is_unit, leaves
from graphclone.axes.contractions import contracting_node, contraction_of
from graphclone.axes.typed import TypedNode
from graphclone.errors import CutError
from graphclone.ties import Tie

MOVES = """Identity Cast Transpose Reshape Squeeze Unsqueeze Concat Slice Gather GatherND Split Expand Flatten Dropout
    Tile""".split()
NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1, None), "SimplifiedLayerNormalization": (1, None)}
STATISTICS = ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare")


@dataclass
class Norm:
    """A norm over the width: the tensor it gives, its weight and bias, and the nodes that read it (by weight name)."""

    output: str
    gain: str | None
    shift: str | None
    centred: bool
    readers: list[str] = field(default_factory=list)
    where: str = ""


@dataclass
class Rotatable:
    """What a change of basis touches.

    carriers: initializers and the position of the width in each; tied heads are named as they are untied. stored: what
    those are called in the model. norms: by output. layer_scales: {vector: weights that write what it scales}.
    """

    axis: Axis
    carriers: dict[str, int]
    stored: dict[str, str]
    norms: list[Norm]
    layer_scales: dict[str, tuple[str, ...]]


def rotatable(
    analysis: Analysis, axis: Axis, ties: Iterable[Tie] = (), untied: Mapping[str, str] | None = None
) -> Rotatable:
    """Return what a change of basis of a width touches.

    ties: initializers that hold one matrix. untied: {weight: name of the heads' own copy}, of tied heads that part.
    Raises: CutError naming the node that forbids it.
    """
    return _Proof(analysis, find(axis), ties, untied or {}).run()


class _Proof:
    def __init__(self, analysis: Analysis, axis: Axis, ties: Iterable[Tie], untied: Mapping[str, str]):
        self.analysis = analysis
        self.axis = axis
        self.tied = {name for tie in ties for name in (tie.first, tie.second)} - untied.keys()
        self.untied = untied
        self.nodes = [n for n in analysis.typing.nodes if n.constrains]
        self.by_output = {t.name: n for n in self.nodes for t in n.op.node.outputs}
        self.by_input: dict[str, list[TypedNode]] = {}
        for node in self.nodes:
            for tensor in node.op.node.inputs:
                self.by_input.setdefault(tensor.name, []).append(node)
        self.scales: list[tuple[TypedNode, int]] = []  # products with a vector along the width
        self.norms: list[Norm] = []

    def run(self) -> Rotatable:
        for name, axes in self.analysis.typing.types.items():
            if axes and self._carries(axes) and not any(find(a) is self.axis for a in axes):
                raise CutError(f"cannot rotate the width {self.axis.size[0]}: '{name}' groups it with another axis")
        for node in self.nodes:
            slots = [s for s, axes in enumerate(node.op.axes) if axes and self._carries(axes)]
            if slots or any(axes and self._carries(axes) for axes in node.outputs):
                self._check(node, slots)
        layer_scales = self._sort_scales()
        for norm in self.norms:
            norm.readers = self._readers(norm.output, norm.where)
        self._check_outputs()
        self._check_ties()
        carriers, stored = self._carriers()
        return Rotatable(self.axis, carriers, stored, self.norms, layer_scales)

    def _carries(self, axes: Iterable[Axis]) -> bool:
        return any(leaf is self.axis for axis in axes for leaf in leaves(axis))

    def _forbid(self, node: TypedNode, why: str) -> CutError:
        return CutError(f"cannot rotate the width {self.axis.size[0]}: {node.op.where} {why}")

    def _check(self, node: TypedNode, slots: list[int]) -> None:
        op = node.op
        if not node.text:
            raise self._forbid(node, "has no axis rule")
        if op.type in NORMS:
            return self._norm(node)
        contraction = contraction_of(node)
        if contraction is not None:
            channelwise = any(find(axis) is self.axis for axis in contraction.shared) and contraction.weight in slots
            if channelwise or op.type == "Attention" or (op.type == "Conv" and op.attribute("group", 1) != 1):
                raise self._forbid(node, "works channel by channel")
        elif op.type in MOVES:
            return None
        elif op.type in ("Add", "Sub", "Sum"):
            if len(slots) < len(op.node.inputs) and not self._is_centring(node):
                raise self._forbid(node, "adds the same number to every channel")
        elif op.type in ("Mul", "Div"):
            self._product(node, slots)
        elif op.type == "Pow" or op.type in ("ReduceL2", "ReduceSumSquare"):
            self._square(node)
        elif op.type in STATISTICS:
            return None
        elif op.type == "Where" and self._masks(node, slots):
            return None
        else:
            raise self._forbid(node, "works channel by channel")

    def _is_centring(self, node: TypedNode) -> bool:
        """Tell whether a Sub takes the mean over the width off."""
        if node.op.type != "Sub":
            return False
        producer = self.by_output.get(node.op.node.inputs[1].name)
        return producer is not None and producer.op.type == "ReduceMean"

    def _masks(self, node: TypedNode, slots: list[int]) -> bool:
        """Tell whether a Where puts zeros."""
        others = [s for s in (1, 2) if s not in slots]
        return all((v := node.op.value(s)) is not None and not v[0].any() for s in others) and 0 not in slots

    def _product(self, node: TypedNode, slots: list[int]) -> None:
        wide = [s for s in slots if any(find(a) is self.axis and not is_unit(a) for a in node.op.axes[s])]
        if len(wide) < 2:
            if wide and node.op.is_constant(wide[0]):
                raise self._forbid(node, "spreads a vector over the channels")
            return
        constants = [s for s in wide if node.op.is_constant(s)]
        if constants and node.op.type == "Mul":
            self.scales.append((node, constants[0]))
        else:
            self._square(node)

    def _square(self, node: TypedNode) -> None:
        """Let squares of channels pass where only their sum or mean over the width is read."""
        output = node.op.node.outputs[0].name
        if node.op.type in STATISTICS:
            return
        for consumer in self.by_input.get(output, []):
            if consumer.op.type not in ("ReduceMean", "ReduceSum"):
                raise self._forbid(node, "works channel by channel")

    def _norm(self, node: TypedNode) -> None:
        gain, shift = (
            op_input.name if s is not None and node.op.is_constant(s) and (op_input := node.op.node.inputs[s]) else None
            for s in NORMS[node.op.type]
        )
        if find(node.op.axes[0][-1]) is not self.axis:
            raise self._forbid(node, "normalises other axes with it")
        centred = node.op.type == "LayerNormalization"
        self.norms.append(Norm(node.op.node.outputs[0].name, gain, shift, centred, where=node.op.where))

    # vectors that scale channels --------------------------------------------------------------------------------

    def _sort_scales(self) -> dict[str, tuple[str, ...]]:
        """Decide for each product with a vector: a written-out norm's weight folds forward, a layer scale back."""
        layer_scales: dict[str, tuple[str, ...]] = {}
        for node, slot in self.scales:
            name = node.op.node.inputs[slot].name
            other = node.op.node.inputs[1 - slot]
            if self._is_normalised(other.name):
                output, shift = node.op.node.outputs[0].name, None
                following = self.by_input.get(output, [])
                if len(following) == 1 and following[0].op.type == "Add":
                    constants = [t for t in following[0].op.node.inputs if isinstance(t, gs.Constant)]
                    if constants:
                        output, shift = following[0].op.node.outputs[0].name, constants[0].name
                self.norms.append(Norm(output, name, shift, self._is_centred(other.name), where=node.op.where))
                continue
            writers = self._writers(other.name)
            if not writers:
                raise self._forbid(node, "scales channels that no matrix writes alone")
            layer_scales[name] = tuple(writers)
        return layer_scales

    def _is_normalised(self, name: str) -> bool:
        """Tell whether a tensor is x times (or over) a statistic over the width."""
        node = self.by_output.get(name)
        while node is not None and node.op.type in ("Cast", "Identity"):
            node = self.by_output.get(node.op.node.inputs[0].name)
        if node is None or node.op.type not in ("Mul", "Div"):
            return False
        return any(
            axes is not None and not any(find(a) is self.axis for a in axes) and not node.op.is_constant(s)
            for s, axes in enumerate(node.op.axes)
        )

    def _is_centred(self, name: str) -> bool:
        seen, waiting = set(), [name]
        for _ in range(12):
            if not waiting:
                return False
            node = self.by_output.get(waiting.pop(0))
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if node.op.type == "Sub":
                return True
            waiting += [t.name for t in node.op.node.inputs if not isinstance(t, gs.Constant)]
        return False

    def _writers(self, name: str) -> list[str]:
        """Return the weights (and biases) whose output a tensor is, through moves and bias additions alone."""
        found: list[str] = []
        waiting = [name]
        while waiting:
            node = self.by_output.get(waiting.pop())
            if node is None:
                return []
            contraction = contraction_of(node)
            if contraction is not None and contraction.weight is not None:
                found.append(self._name_of(node.op.node.inputs[contraction.weight]))
                found += [node.op.node.inputs[2].name] if node.op.type in ("Gemm", "Conv") and node.op.has(2) else []
            elif node.op.type in MOVES or node.op.type == "Add":
                for tensor in node.op.node.inputs:
                    if isinstance(tensor, gs.Constant):
                        found += [tensor.name] if node.op.type == "Add" else []
                    else:
                        waiting.append(tensor.name)
            else:
                return []
        return found

    def _readers(self, output: str, where: str) -> list[str]:
        """Return the weights that read what a norm gives; nothing else may read it."""
        found: list[str] = []
        waiting, seen = [output], set()
        while waiting:
            name = waiting.pop()
            for consumer in self.by_input.get(name, []):
                if id(consumer) in seen:
                    continue
                seen.add(id(consumer))
                contraction = contraction_of(consumer)
                if contraction is not None and contraction.weight is not None:
                    if any(find(axis) is self.axis for axis in contraction.contracted):
                        found.append(self._name_of(consumer.op.node.inputs[contraction.weight]))
                        continue
                if consumer.op.type not in MOVES and not self._scales_all(consumer):
                    raise self._forbid(
                        consumer, f"reads what {where} scales channel by channel, and is no matrix product"
                    )
                waiting += [t.name for t in consumer.op.node.outputs]
        return found

    def _scales_all(self, node: TypedNode) -> bool:
        """Tell whether a node multiplies or divides every channel by the same number."""
        wide = [axes for axes in node.op.axes if axes and self._carries(axes)]
        return node.op.type in ("Mul", "Div") and len(wide) == 1

    # what the outside sees --------------------------------------------------------------------------------------

    def _check_outputs(self) -> None:
        for node in self.nodes:
            for tensor, axes in zip(node.op.node.outputs, node.outputs, strict=False):
                if axes and self._carries(axes) and tensor.name in self.analysis.outputs:
                    raise CutError(
                        f"cannot rotate the width {self.axis.size[0]}: output '{tensor.name}' of {node.op.where} "
                        f"would change its basis"
                    )

    def _check_ties(self) -> None:
        """A matrix into which a norm's weight folds must belong to the norm's readers alone."""
        own = set(self.untied.values())
        for norm in self.norms:
            for name in norm.readers if norm.gain else ():
                if name not in own and (name in self.tied or len(self.analysis.typing.uses[name]) > 1):
                    raise CutError(
                        f"cannot rotate the width {self.axis.size[0]}: the weight of {norm.where} cannot fold into "
                        f"'{name}', which is shared; where that is a tied head, rotate{{untie=true}} gives it a "
                        f"matrix of its own"
                    )

    def _carriers(self) -> tuple[dict[str, int], dict[str, str]]:
        found: dict[str, int] = {}
        stored: dict[str, str] = {}
        for name, uses in self.analysis.typing.uses.items():
            for use in uses:
                if sum(find(axis) is self.axis for axis in use.axes) > 1:
                    raise CutError(f"cannot rotate the width {self.axis.size[0]}: '{name}' has it on both sides")
                own = self.untied.get(name, name) if contracting_node(use.node) is not None else name
                for position, axis in enumerate(use.axes):
                    if find(axis) is self.axis:
                        found[own], stored[own] = position, name
        return found, stored

    def _name_of(self, tensor: gs.Tensor) -> str:
        name = _weight_name(tensor)
        return self.untied.get(name, name)


def _weight_name(tensor: gs.Tensor) -> str:
    while not isinstance(tensor, gs.Constant):
        tensor = tensor.inputs[0].inputs[0]
    return tensor.name
