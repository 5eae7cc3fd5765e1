"""Compensate: let biases stand in for the mean of what was dropped."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from graphclone.axes.axis import find
from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Tap
from graphclone.errors import InputError
from graphclone.linears import Linear, find_linears
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import resolve


@dataclass(frozen=True)
class Compensate:
    """Add W_dropped' E[x_dropped] to the bias of every linear operator whose inputs are cut and were measured.

    Measured are what the FFN and the heads give to the matrices that read them; a matrix without a bias stays as it is.
    Source: FLAP, arXiv 2312.11983, section 3.3. Runs after `width`; a later `refit` does more.

    Example:
        width{ffn=256},compensate
    """

    name = "compensate"

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        cut = resolve(plan, context.analysis)
        found = find_linears(context.analysis, parent)
        uses = Counter(n.shared for n in found)
        linears = [n for n in found if n.bias and len(n.inner) == len(n.outer) == uses[n.shared] == 1]
        linears = [n for n in linears if cut.picks(n.inner[0]) is not None]
        if not linears:
            return plan
        if stats is None:
            raise InputError("compensate adds measured means; give samples (--data) or statistics (--stats)")
        weights, replaced = parent.weights, dict(plan.replace)
        for linear in linears:
            mean = _mean(linear, stats, context)
            if mean is None or linear.bias in replaced:
                continue
            weight = weights[linear.weight].load().astype(np.float64).transpose(np.argsort(linear.order))
            dropped = np.setdiff1d(np.arange(find(linear.inner[0]).size[0]), cut.picks(linear.inner[0]))
            bias = weights[linear.bias].load()
            whole = bias.reshape(-1).astype(np.float64) + mean[dropped] @ weight[dropped]
            kept = cut.picks(linear.outer[0])
            shape = [*bias.shape[:-1], len(whole) if kept is None else len(kept)]
            replaced[linear.bias] = (whole if kept is None else whole[kept]).reshape(shape).astype(bias.dtype)
        return plan.with_(replace=replaced)


def _mean(linear: Linear, stats: Statistics, context: Context) -> np.ndarray | None:
    """Return E[x] of an operator's inputs, where calibration measured them."""
    axes = context.analysis.typing.types[linear.x]
    try:
        return stats.mean(Tap(linear.x, len(axes) - 1))
    except (InputError, KeyError):
        return None
