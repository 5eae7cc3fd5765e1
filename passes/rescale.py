"""Rescale: what keeps the scale of activations after a cut."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis
from graphclone.axes.axis import find
from graphclone.axes.contractions import BLOCKWISE, contraction_of
from graphclone.calibration.statistics import Statistics
from graphclone.cut import Cut
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.taps import norm_inputs

MODES = ("none", "paper", "norm_gain")


@dataclass(frozen=True)
class Rescale:
    """Scale weights so that what they compute keeps its size.

    mode: paper (linear weights by sqrt(d_in / d_in'); biases, norms and embeddings not, a tied head not either:
    arXiv 2312.09299, section 4.3), norm_gain (each norm's scale by sqrt((sum of kept variances / sum of all) * d / d'),
    what makes its kept outputs what they were), none.

    Example:
        rescale{mode=norm_gain}
    """

    name = "rescale"
    mode: str = "paper"

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        if self.mode not in MODES:
            raise InputError(f"no rescale mode is called '{self.mode}'; there are {', '.join(MODES)}")
        if self.mode == "none":
            return plan
        cut = resolve(plan, context.analysis)
        if self.mode == "paper":
            factors = paper_factors(context.analysis, cut, parent)
        else:
            factors = _norm_gains(context.analysis, cut, stats)
        scale = dict(plan.scale)
        for name, factor in factors.items():
            scale[name] = scale.get(name, 1.0) * factor
        return plan.with_(scale=scale)


def paper_factors(analysis: Analysis, cut: Cut, parent: Model) -> dict[str, float]:
    """Return sqrt(d_in / d_in') of every linear weight whose contracted axes are cut, each weight once."""
    tied = _embeddings(analysis, parent)
    factors: dict[str, float] = {}
    for node in analysis.typing.nodes:
        contraction = contraction_of(node) if node.constrains and node.text else None
        if contraction is None or contraction.weight is None:
            continue
        name = _scalable(node.op.node, contraction.weight)
        if name is None or name in tied or name in factors:
            continue
        before = np.prod([find(axis).size[0] for axis in contraction.contracted])
        after = np.prod([cut.size(axis)[0] for axis in contraction.contracted])
        if before != after:
            factors[name] = float(np.sqrt(before / after))
    return factors


def _scalable(node: gs.Node, slot: int) -> str | None:
    """Return the initializer whose scale is the operand's: a quantized weight's is its scale."""
    if node.op in BLOCKWISE:
        return node.inputs[slot + 1].name
    if node.op in ("MatMulInteger", "ConvInteger"):
        return _scale_behind(node)
    tensor = node.inputs[slot]
    while not isinstance(tensor, gs.Constant):
        producer = tensor.inputs[0]
        if producer.op == "DequantizeLinear":
            scale = producer.inputs[1]
            return scale.name if isinstance(scale, gs.Constant) else None
        tensor = producer.inputs[0]
    return tensor.name if tensor._values.dtype.kind not in "iub" else None


def _scale_behind(node: gs.Node) -> str | None:
    """Return the weight's scale in what a product of whole numbers is multiplied by: x's scale times the weight's."""
    following = node.outputs[0].outputs
    while len(following) == 1 and following[0].op in ("Cast", "Reshape"):
        following = following[0].outputs[0].outputs
    for tensor in following[0].inputs if len(following) == 1 and following[0].op == "Mul" else ():
        factors = tensor.inputs[0].inputs if tensor.inputs and tensor.inputs[0].op == "Mul" else [tensor]
        scale = next((factor for factor in factors if isinstance(factor, gs.Constant)), None)
        if scale is not None:
            return scale.name
    return None


def _embeddings(analysis: Analysis, parent: Model) -> set[str]:
    """Return the initializers that rows are gathered from by data, and what is tied to them."""
    names = set()
    for node in analysis.typing.nodes:
        op = node.op
        picked = op.type == "Gather" and op.is_constant(0) and op.value(1) is None
        if picked or op.type == "EmbedLayerNormalization":
            names |= {t.name for t in op.node.inputs if isinstance(t, gs.Constant)}
    for tie in parent.ties:
        if {tie.first, tie.second} & names:
            names |= {tie.first, tie.second}
    return names


def _norm_gains(analysis: Analysis, cut: Cut, stats: Statistics | None) -> dict[str, float]:
    gains: dict[str, float] = {}
    for norm in norm_inputs(analysis):
        kept = cut.picks(norm.axis)
        if kept is None:
            continue
        if stats is None:
            raise InputError(
                "rescale 'norm_gain' is measured by calibration; give samples (--data) or statistics (--stats)"
            )
        energy = stats.variance(norm.tap) if norm.centred else stats.mean_square(norm.tap)
        if energy[kept].sum() > 0:  # a norm of zeros gives zeros, whatever its scale
            gains[norm.gain] = float(np.sqrt(energy[kept].sum() / energy.sum() * len(energy) / len(kept)))
    return gains
