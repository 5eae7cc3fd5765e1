"""Find scalars that follow a size (attention, embedding, logit scales) and the weights that could carry them.

A cut keeps the parent's value of each. The framework's own class of the smaller size computes another one, and the
ratio has to sit in a weight then. A scalar counts by where it stands - between a query/key projection and a softmax,
on an embedding's output, before a head - and then by its value, a power of the parent's size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import multiply
from graphclone.axes.contractions import Contraction, contraction_of
from graphclone.axes.linear import Gain, Linear, Scalar, Trace, scalar_at, static_size
from graphclone.axes.typed import AxisTyping, TypedNode
from graphclone.errors import CutError

FUSED = {"Attention", "MultiHeadAttention", "GroupQueryAttention"}
SCORE_OPS = {
    "Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout",
    "Max", "Min", "Clip", "GatherElements", "Expand", "Softmax", "Exp", "Tanh", "Sum", "Slice", "Concat", "Split",
}  # fmt: skip
SHARP = {"Softmax", "Exp"}
SATURATING = {"Tanh", *SHARP}
POWERS = (0.5, -0.5, 0.25, -0.25, 1.0, -1.0)
MULTIPLES = (1, 2, 3)
"""DeBERTa's scores are divided by sqrt(3 * head_dim): one term for the content, two for relative positions."""
ATTENTION_TOTALS = (-0.5, -1.0)
TOLERANCES = {2: 6e-3, 4: 1e-5, 8: 1e-5}
"""Relative, by bytes of the float type: bfloat16 keeps eight bits."""
ESCAPE = ", or leave out --native-constants"
"""How messages end where the parent's constants would do."""
IDLE = {"Cast", "Reshape", "Identity", "Dropout", "Unsqueeze", "Squeeze", "Transpose"}


@dataclass(frozen=True)
class Exchange:
    """A number that becomes another one; `value` None: the attribute goes, so that the operator's default holds."""

    node: gs.Node
    slot: int | str
    value: float | None


@dataclass(frozen=True)
class Scale:
    """A scale whose size was cut: the scalars get their new values, the gains are multiplied by `ratio`."""

    kind: str
    where: str
    ratio: float
    exchanges: tuple[Exchange, ...]
    gains: tuple[Gain, ...]


@dataclass
class _Score:
    """A contraction whose result reaches a softmax: the scalars behind it, and what would scale either operand."""

    node: TypedNode
    behind: dict[tuple[int, int | str], Scalar] = field(default_factory=dict)


def find_scales(
    typing: AxisTyping,
    parents: Mapping[int, TypedNode],
    outputs: Iterable[str] = (),
    ties: Iterable[tuple[str, str]] = (),
) -> list[Scale]:
    """Return the scales of a cut graph that still have the parent's value.

    typing: of the cut graph. parents: {id of its node: the same node before the cut}. outputs: of the graph.
    ties: pairs of equal initializers. Raises: CutError where a scale follows the cut and no weight can take the ratio.
    """
    return _Finder(typing, parents, outputs, ties).run()


class _Finder:
    def __init__(self, typing: AxisTyping, parents: Mapping[int, TypedNode], outputs: Iterable[str], ties):
        self.typing = typing
        self.outputs = set(outputs)
        self.parents = parents
        self.linear = Linear(typing)
        self.ties = [set(pair) for pair in ties]
        self.contractions = {id(n.op.node): contraction_of(n) for n in typing.nodes if n.text}
        self.nodes = {id(n.op.node): n for n in typing.nodes}
        self.taken: set[tuple[int, int]] = set()  # uses that carry an attention's ratio
        self.plain: set[tuple[int, int]] = set()  # uses on the other side of one, which must not

    def run(self) -> list[Scale]:
        found = []
        for node in self.typing.nodes:
            if node.op.type in FUSED and node.constrains:
                found += self._fused(node)
            elif self._is_mix(node):
                found += self._decomposed(node)
        embeddings = [
            scale for node in self.typing.nodes if node.op.type == "Gather" for scale in self._embedding(node)
        ]
        logits = [scale for node in self.typing.nodes for scale in self._logits(node)]
        return found + embeddings + self._compensations(embeddings) + logits

    # attention --------------------------------------------------------------------------------------------------

    def _is_mix(self, node: TypedNode) -> bool:
        contraction = self.contractions.get(id(node.op.node))
        return contraction is not None and contraction.weight is None and node.constrains

    def _decomposed(self, mix: TypedNode) -> list[Scale]:
        """Return the scales of the scores that a contraction mixes values by."""
        scores = [score for slot in (0, 1) for score in self._scores_above(mix, slot)]
        found = []
        for score in scores:
            old, new = self._contracted(score.node, parent=True), self._contracted(score.node)
            if old == new:
                continue
            sides = [self.linear.attempt(score.node, slot) for slot in (0, 1)]
            scalars = {**score.behind, **{k: v for side in sides for k, v in side.scalars.items()}}
            scalars |= self._alpha(score.node)
            found += self._scale("attention", score.node, scalars, old, new, sides)
        return found

    def _contracted(self, node: TypedNode, parent: bool = False) -> int:
        other = self.parents.get(id(node.op.node)) if parent else node
        contraction: Contraction | None = contraction_of(other) if other is not None and other.text else None
        return multiply(axis.size for axis in contraction.contracted)[0] if contraction else 0

    def _alpha(self, node: TypedNode) -> dict:
        value = node.op.node.attrs.get("alpha")
        return {} if value is None else {(id(node.op.node), "alpha"): Scalar(node, "alpha", 1, float(value))}

    def _scores_above(self, mix: TypedNode, slot: int) -> list[_Score]:
        """Return the contractions whose sum reaches an operand of `mix` through a softmax."""
        found: dict[int, _Score] = {}
        seen: set[tuple[str, bool]] = set()
        waiting = [(mix, slot, False, {})]
        while waiting:
            node, at, sharp, behind = waiting.pop()
            tensor = node.op.node.inputs[at]
            above = self.linear.producer(tensor)
            if above is None or (tensor.name, sharp) in seen:
                continue
            seen.add((tensor.name, sharp))
            contraction = self.contractions.get(id(above.op.node))
            if contraction is not None:
                if contraction.weight is None and sharp:
                    found.setdefault(id(above.op.node), _Score(above)).behind.update(behind)
                continue
            if above.op.type not in SCORE_OPS:
                continue
            kept = {} if above.op.type in SATURATING else dict(behind)
            sharp = sharp or above.op.type in SHARP
            slots = {"Where": (1, 2), "Div": (0,), "GatherElements": (0,), "Reshape": (0,)}.get(
                above.op.type, range(len(above.op.node.inputs))
            )
            if above.op.type in ("Mul", "Div"):
                for other in (1, 0)[: 1 if above.op.type == "Div" else 2]:
                    if (value := scalar_at(above, other)) is not None:
                        effect = -1 if above.op.type == "Div" else 1
                        kept[id(above.op.node), other] = Scalar(above, other, effect, value)
                        slots = (1 - other,)
                        break
            waiting += [(above, each, sharp, kept) for each in slots if above.op.has(each)]
        return sorted(found.values(), key=lambda score: self.linear.order[score.node.op.node.outputs[0].name])

    def _scale(
        self, kind: str, node: TypedNode, scalars: Mapping, old: int, new: int, sides: Sequence[Trace]
    ) -> list[Scale]:
        """Match scalars with a size, and choose the operand whose weights take the ratio: queries where possible."""
        matched = [(each, power) for each in scalars.values() if (power := _power(each, old)) is not None]
        total = sum(each.effect * power for each, (power, _) in matched)
        if not any(abs(total - wanted) < 1e-9 for wanted in ATTENTION_TOTALS):
            return []
        keys = [set() if side.failure else set(side.gains) for side in sides]
        order = [i for i in range(len(sides)) if keys[i]]
        fitting = [i for i in order if keys[i] <= self.taken] or [i for i in order if not keys[i] & self.plain]
        fitting = [i for i in fitting if not any(keys[j] & self.taken for j in order if j != i)]
        if not fitting:
            reason = next((str(side.failure) for side in sides if side.failure), "its weights serve other scores too")
            raise CutError(
                f"{node.op.where}: the scale of its scores follows the head size, "
                f"and no weight can take the ratio ({reason}); "
                f"do not cut its head size{ESCAPE}"
            )
        chosen = fitting[0]
        self.taken |= keys[chosen]
        for i in order:
            self.plain |= keys[i] if i != chosen else set()
        exchanges = tuple(_exchange(each, power, new) for each, power in matched)
        return [Scale(kind, node.op.where, (old / new) ** total, exchanges, tuple(sides[chosen].gains.values()))]

    def _fused(self, node: TypedNode) -> list[Scale]:
        """Return the scale of a fused attention: its attribute, or the default of its own head size."""
        parent = self.parents.get(id(node.op.node))
        if parent is None:
            return []
        old, new = _head_size(parent), _head_size(node)
        if old == new:
            return []
        given = parent.op.node.attrs.get("scale")
        if node.op.type == "Attention" and node.op.domain:
            sides, scalars = [self._packed(node)], {}
        else:
            sides = [self._queries(node), *([self.linear.attempt(node, 1)] if node.op.has(1) else [])]
            scalars = {k: v for side in sides for k, v in side.scalars.items()}
        key = (id(node.op.node), "scale")
        if given in (None, 0.0):
            scalars[key] = Scalar(node, "scale", 1, old**-0.5)
        else:
            scalars[key] = Scalar(node, "scale", 1, float(given))
        found = self._scale("attention", node, scalars, old, new, sides)
        if given in (None, 0.0):
            found = [_without(scale, node.op.node) for scale in found]
        return found

    def _queries(self, node: TypedNode) -> Trace:
        """Trace the queries of an operator, in an input of their own or packed with keys and values."""
        op, axes = node.op, node.op.axes[0]
        mask = np.ones([static_size(axis) for axis in axes], bool)
        if len(axes) == 5:
            mask[:, :, :, 1:] = False
        elif op.type == "GroupQueryAttention" and not op.has(1):
            heads, groups = int(op.attribute("num_heads")), int(op.attribute("kv_num_heads"))
            mask[..., mask.shape[-1] * heads // (heads + 2 * groups) :] = False
        trace = self.linear.attempt(node, 0, mask)
        if op.type == "MultiHeadAttention" and op.is_constant(3):
            bias = np.zeros(op.axes[3][0].size[0], bool)
            bias[: int(op.attribute("num_heads")) * _head_size(node)] = True
            trace.gains[id(op.node), 3] = Gain(op.node, 3, bias)
        return trace

    def _packed(self, node: TypedNode) -> Trace:
        """com.microsoft.Attention holds the projection itself."""
        op, trace = node.op, Trace()
        width = int(op.attribute("num_heads")) * _head_size(node)
        for slot in (1, 2):
            if op.has(slot) and not op.is_constant(slot):
                trace.failure = CutError(f"input {slot} of {op.where} is computed")
            elif op.has(slot):
                mask = np.zeros([static_size(axis) for axis in op.axes[slot]], bool)
                mask[..., :width] = True
                trace.gains[id(op.node), slot] = Gain(op.node, slot, mask)
        return trace

    # embeddings and logits --------------------------------------------------------------------------------------

    def _embedding(self, gather: TypedNode) -> list[Scale]:
        """Return the scale of a lookup's result, where a power of its width multiplies it at once."""
        parent = self.parents.get(id(gather.op.node))
        if parent is None or not gather.op.is_constant(0) or not gather.outputs[0] or len(gather.op.axes[0]) != 2:
            return []
        if gather.op.axis(2) != 0 or gather.op.value(1) is not None or not parent.op.axes[0]:
            return []
        old, new = parent.op.axes[0][1].size[0], gather.op.axes[0][1].size[0]
        scalars, unscaled = self._scalars_below(gather, old) if old != new else ([], None)
        if not scalars:
            return []
        table = gather.op.node.inputs[0].name
        if unscaled is not None:
            raise CutError(
                f"{gather.op.where} looks up '{table}', scaled by its width, and {unscaled.op.where} uses it unscaled"
            )
        gain = Gain(gather.op.node, 0, np.ones([axis.size[0] for axis in gather.op.axes[0]], bool))
        return self._widths("embedding", gather, scalars, old, new, (gain,))

    def _scalars_below(self, node: TypedNode, size: int) -> tuple[list, TypedNode | None]:
        """Return the scalars that multiply a node's output at once, and a consumer that takes it as it is."""
        waiting, scalars, unscaled = [node.op.node.outputs[0]], [], None
        while waiting:
            for consumer in waiting.pop().outputs:
                below = self.nodes.get(id(consumer))
                if below is None or consumer.op in ("Shape", "Size"):
                    continue
                scalar = _own_scalar(below)
                if scalar is not None and _power(scalar, size, (0.5, -0.5), (1,)):
                    scalars.append(scalar)
                elif consumer.op in IDLE:
                    waiting.append(consumer.outputs[0])
                else:
                    unscaled = below
        return scalars, unscaled

    def _widths(self, kind, node, scalars, old, new, gains) -> list[Scale]:
        matched = [(each, power) for each in scalars if (power := _power(each, old, (0.5, -0.5), (1,)))]
        totals = {each.effect * power for each, (power, _) in matched}
        if len(totals) != 1:
            return []
        exchanges = tuple(_exchange(each, power, new) for each, power in matched)
        return [Scale(kind, node.op.where, (old / new) ** totals.pop(), exchanges, gains)]

    def _compensations(self, embeddings: Sequence[Scale]) -> list[Scale]:
        """Scale the other uses of a scaled table too; a head undoes that in what it is multiplied with."""
        done = {(id(gain.node), gain.slot) for scale in embeddings for gain in scale.gains}
        found = []
        for scale in embeddings:
            table = scale.gains[0].node.inputs[0].name
            names = {table}.union(*(pair for pair in self.ties if table in pair))
            for name in names:
                for use in self.typing.uses.get(name, ()):
                    if use.node is None or (id(use.node), use.slot) in done:
                        continue
                    done.add((id(use.node), use.slot))
                    mask = np.ones([axis.size[0] for axis in use.axes], bool)
                    found.append(Scale("tie", scale.where, scale.ratio, (), (Gain(use.node, use.slot, mask),)))
                    found.append(self._undone(use.node, scale))
        return found

    def _undone(self, node: gs.Node, scale: Scale) -> Scale:
        while node.op in IDLE and node.outputs[0].outputs:
            node = node.outputs[0].outputs[0]
        head = self.nodes.get(id(node))
        contraction = self.contractions.get(id(node))
        if head is None or contraction is None:
            raise CutError(f"{scale.where} looks up a scaled embedding, and node '{node.name}' uses it otherwise")
        trace = self.linear.trace(head, contraction.activation)
        self._exclusive(trace, head)
        return Scale("compensation", head.op.where, 1 / scale.ratio, (), tuple(trace.gains.values()))

    def _exclusive(self, trace: Trace, last: TypedNode) -> None:
        """Refuse to scale what something else reads as well."""
        for name in trace.passed:
            producer = self.typing.nodes[self.linear.order[name]].op.node
            tensor = next(t for t in producer.outputs if t.name == name)
            for consumer in tensor.outputs:
                below = self.nodes.get(id(consumer))
                inside = consumer is last.op.node or any(t.name in trace.passed for t in consumer.outputs)
                if below is not None and not inside and below.constrains and consumer.op not in ("Shape", "Size"):
                    raise CutError(f"{last.op.where} needs the scale of '{name}', which {below.op.where} reads as well")
            if name in self.outputs:
                raise CutError(f"{last.op.where} needs the scale of '{name}', which is an output of the model as well")

    def _logits(self, node: TypedNode) -> list[Scale]:
        """Return the scale of a final hidden state: a power of its width, right before the head's contraction."""
        contraction = self.contractions.get(id(node.op.node))
        if contraction is None or contraction.weight is None:
            return []
        old, new = self._contracted(node, parent=True), self._contracted(node)
        if not old or old == new:
            return []
        scalars, place, slot = [], node, contraction.activation
        while (above := self.linear.producer(place.op.node.inputs[slot])) is not None:
            scalar = _own_scalar(above)
            if scalar is not None and _power(scalar, old, (0.5, -0.5), (1,)):
                scalars.append(scalar)
            elif above.op.type not in IDLE:
                break
            place, slot = above, 1 - scalar.slot if scalar else 0
        if (
            not scalars
            or (before := self.linear.producer(place.op.node.inputs[slot])) is None
            or before.op.type == "Gather"
        ):
            return []
        trace = self.linear.trace(place, slot)
        self._exclusive(trace, place)
        return self._widths("logits", node, scalars, old, new, tuple(trace.gains.values()))


def _own_scalar(node: TypedNode) -> Scalar | None:
    if node.op.type not in ("Mul", "Div"):
        return None
    for slot in (1, 0) if node.op.type == "Mul" else (1,):
        if (value := scalar_at(node, slot)) is not None:
            return Scalar(node, slot, 1 if node.op.type == "Mul" else -1, value)
    return None


def _power(scalar: Scalar, size: int, powers=POWERS, multiples=MULTIPLES) -> tuple[float, int] | None:
    """Return (power, multiple) such that the scalar is (multiple * size) ** power."""
    value = scalar.node.op.value(scalar.slot) if isinstance(scalar.slot, int) else None
    tolerance = TOLERANCES.get(value[0].dtype.itemsize if value else 4, 1e-5)
    for multiple in multiples if size > 1 else ():
        for power in powers if multiple == 1 else (0.5, -0.5):
            if abs(scalar.value / (multiple * size) ** power - 1) < tolerance:
                return power, multiple
    return None


def _exchange(scalar: Scalar, power: tuple[float, int], size: int) -> Exchange:
    return Exchange(scalar.node.op.node, scalar.slot, float(power[1] * size) ** power[0])


def _without(scale: Scale, node: gs.Node) -> Scale:
    exchanges = tuple(Exchange(e.node, e.slot, None) if e.node is node else e for e in scale.exchanges)
    return Scale(scale.kind, scale.where, scale.ratio, exchanges, scale.gains)


def _head_size(node: TypedNode) -> int:
    if "d" in node.bound:
        return node.bound["d"].size[0]
    pairs = 2 * node.bound["p"].size[0]
    return pairs + (node.bound["u"].size[0] if "u" in node.bound else 0)
