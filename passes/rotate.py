"""Rotate: one orthogonal change of basis of the residual stream, so that a cut keeps its main directions."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from graphclone.axes.axis import find
from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Moment, Tap
from graphclone.cut import Cut
from graphclone.dimensions import Dimension, axis_key
from graphclone.errors import CutError
from graphclone.linears import heads
from graphclone.model import Model
from graphclone.pipeline import Context
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.rotation import Norm, Rotatable, rotatable

SMALLEST_GAIN = 1e-6
MOST_SHIFT = 1e3  # times the gain: beyond, a norm's bias in the new basis would drown what it is added to


@dataclass(frozen=True)
class Rotate:
    """Replace the choice of channels of every cut hidden width by its principal directions.

    The covariance is that of the normalised stream, with an equal vote of every norm (arXiv 2401.15024 for the
    rotation; balanced over depth). Norm weights fold into their readers first. For RMSNorm the d' main directions are
    kept; for LayerNorm d' - 1 of them, mapped into the mean-free subspace of R^d', where the operator stays exact:
    M = V U' with U orthogonal to the vector of ones. What readers take from a norm's bias along the parent's vector of
    ones goes along the child's, which the stream leaves free. Each norm's gain becomes sqrt(kept energy / d'), a
    number. Runs after `width`, which sets the sizes.
    untie: a tied head, into which no norm can fold, gets a matrix of its own; the framework's class may have no place
    for it.
    skip: where a node forbids it, tell and go on with the plan as it is, instead of raising CutError.

    Example:
        width{hidden=384},rotate
    """

    name = "rotate"
    skip: bool = False
    untie: bool = False

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan:
        cut = resolve(plan, context.analysis)
        cuts = [d for d in context.analysis.dimensions if d.role == "hidden" and cut.picks(d.axes[0]) is not None]
        if not cuts:
            return plan
        for dimension in cuts:
            try:
                plan = self._rotate(parent, plan, cut, dimension, context)
            except CutError as error:
                if not self.skip:
                    raise
                context.notes.append(f"rotate: skipped, {error}")
        return plan

    def _rotate(self, parent: Model, plan: Plan, cut: Cut, dimension: Dimension, context: Context) -> Plan:
        untied = {**(heads(context.analysis, parent) if self.untie else {}), **plan.untie}
        proof = rotatable(context.analysis, dimension.axes[0], parent.ties, untied)
        gone = _dropped_tensors(context, cut)
        norms = [norm for norm in proof.norms if norm.output not in gone]
        if not norms:
            raise CutError(f"cannot rotate '{dimension.name}': no norm reads it, so there is no covariance to balance")
        weights = parent.weights
        vectors = {name: weights[name].load().astype(np.float64) for name in _vectors(proof)}
        _check_shifts(norms, vectors)
        second = _second_moments(parent, norms, vectors, context)
        mean_free = any(norm.centred for norm in norms)
        basis = _basis(sum(moment / np.trace(moment) for moment in second), cut.size(proof.axis)[0], mean_free)
        reading = basis + len(basis) ** -0.5 * basis.shape[1] ** -0.5 if mean_free else basis
        replaced = {}
        for name, value in _new_vectors(proof, norms, vectors, second, basis, reading).items():
            replaced[name] = value.astype(weights[name].dtype)
        factors = _factors(proof, vectors)
        readers = {reader for norm in proof.norms for reader in norm.readers}
        for name, position in proof.carriers.items():
            if name in vectors:
                continue
            stored = weights[proof.stored[name]]
            array = stored.load().astype(np.float64)
            for factor in factors.get(name, ()):
                array *= factor.reshape([-1 if axis == position else 1 for axis in range(array.ndim)])
            onto = reading if name in readers else basis
            array = np.moveaxis(np.tensordot(array, onto, (position, 0)), -1, position)
            for axis, pick in enumerate(_other_picks(context, cut, proof.stored[name], position)):
                array = array if pick is None else np.take(array, pick, axis)
            replaced[name] = array.astype(stored.dtype)
        context.bases[axis_key(proof.axis)] = basis
        for norm in norms:
            folded = _gain(norm, vectors, len(basis))[:, None]
            context.readers.update({reader: reading / folded for reader in norm.readers})
        context.notes.append(_told(dimension, second, basis))
        scale = {name: factor for name, factor in plan.scale.items() if name not in replaced}
        return plan.with_(replace={**plan.replace, **replaced}, scale=scale, untie=untied)


def _told(dimension: Dimension, second: list[np.ndarray], basis: np.ndarray) -> str:
    share = np.mean([np.trace(basis.T @ m @ basis) / np.trace(m) for m in second])
    return (
        f"rotate: '{dimension.name}' keeps {share:.1%} of the normalised stream's energy in {basis.shape[1]} directions"
    )


def _dropped_tensors(context: Context, cut: Cut) -> set[str]:
    """Return the tensors computed in dropped blocks."""
    nodes = context.analysis.typing.nodes
    halves = [
        h for s in context.analysis.stacks for b in s.blocks if b.index not in cut.blocks[s.prefix] for h in b.halves
    ]
    return {t.name for half in (*halves, *cut.dropped) for n in half.nodes for t in nodes[n].op.node.outputs}


def _second_moments(parent: Model, norms: list[Norm], values: dict, context: Context) -> list[np.ndarray]:
    """Return E[n n'] of what each norm gives before its weight and bias, measured on the parent."""
    taps, moments = [Tap(norm.output) for norm in norms], [Moment(norm.output) for norm in norms]
    found = context.measure(parent, taps, moments)
    result = []
    for norm in norms:
        moment, mean = found.second_moment(Moment(norm.output)), found.mean(Tap(norm.output))
        shift = values[norm.shift].reshape(-1) if norm.shift else np.zeros(len(mean))
        gain = _gain(norm, values, len(mean))
        centred = moment - np.outer(shift, mean) - np.outer(mean, shift) + np.outer(shift, shift)
        seen = np.abs(values[norm.gain].reshape(-1)) >= SMALLEST_GAIN if norm.gain else np.ones(len(mean), bool)
        result.append(_completed(centred / np.outer(gain, gain), seen))
    return result


def _completed(moment: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return the moments with what a norm's weight of zero hides: a root mean square norm gives d in all."""
    if seen.all():
        return moment
    known = moment * np.outer(seen, seen)
    energy = float(np.trace(known))
    whole = max(len(seen), energy) if 2 * energy >= seen.sum() else energy * len(seen) / seen.sum()
    return known + np.diag(np.where(seen, 0.0, (whole - energy) / (~seen).sum()))


def _check_shifts(norms: list[Norm], values: dict[str, np.ndarray]) -> None:
    """Raise CutError for a norm whose bias no weight of its own carries into its readers."""
    for norm in norms:
        if norm.gain and norm.shift:
            gain, shift = (np.abs(values[name].reshape(-1)) for name in (norm.gain, norm.shift))
            if np.any(bad := shift > MOST_SHIFT * gain):
                raise CutError(
                    f"cannot rotate: {norm.where} scales channel {int(np.argmax(bad))} by nearly nothing and shifts "
                    f"it, so its bias cannot fold into what reads it"
                )


def _gain(norm: Norm, values: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Return a norm's weight, to divide by."""
    gain = values[norm.gain].reshape(-1) if norm.gain else np.ones(size)
    return np.where(np.abs(gain) < SMALLEST_GAIN, SMALLEST_GAIN, gain)


def _basis(covariance: np.ndarray, kept: int, mean_free: bool) -> np.ndarray:
    """Return M [d, d']: the main directions, mapped into the mean-free subspace of R^d' for LayerNorm."""
    covariance = (covariance + covariance.T) / 2
    if not mean_free:
        return np.linalg.eigh(covariance)[1][:, ::-1][:, :kept]
    inside = mean_free_basis(len(covariance))
    vectors = inside @ np.linalg.eigh(inside.T @ covariance @ inside)[1]
    return vectors[:, ::-1][:, : kept - 1] @ mean_free_basis(kept).T


def mean_free_basis(size: int) -> np.ndarray:
    """Return U [d', d'-1] with orthonormal columns that are orthogonal to the vector of ones: a reflection's columns.

    Example:
        >>> U = mean_free_basis(4)
        >>> bool(np.allclose(U.T @ U, np.eye(3)) and np.allclose(U.sum(axis=0), 0))
        True
    """
    ones = np.full(size, size**-0.5)
    normal = ones.copy()
    normal[0] += 1.0
    reflection = np.eye(size) - 2 * np.outer(normal, normal) / (normal @ normal)
    return reflection[:, 1:]


def _factors(proof: Rotatable, vectors: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Return what folds into each matrix: weights of norms it reads behind, layer scales it writes in front of."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for norm in proof.norms:
        for reader in norm.readers if norm.gain else ():
            found[reader].append(vectors[norm.gain])
    for scale, writers in proof.layer_scales.items():
        for writer in writers:
            found[writer].append(vectors[scale])
    return found


def _vectors(proof: Rotatable) -> set[str]:
    """Return the initializers that scale or shift channel by channel."""
    return {name for norm in proof.norms for name in (norm.gain, norm.shift) if name} | set(proof.layer_scales)


def _new_vectors(
    proof: Rotatable,
    norms: list[Norm],
    vectors: dict[str, np.ndarray],
    second: list[np.ndarray],
    basis: np.ndarray,
    reading: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return each norm's gain as a number, its bias as readers take it in the new basis, and layer scales of one."""
    size, kept = basis.shape
    found = {name: np.ones((*vectors[name].shape[:-1], kept)) for name in proof.layer_scales}
    gains: dict[str, list[float]] = defaultdict(list)
    for norm, moment in zip(norms, second, strict=True):
        if norm.gain:
            gains[norm.gain].append(float(np.sqrt(np.trace(basis.T @ moment @ basis) / kept)))
        if norm.shift:
            old = vectors[norm.shift]
            new = ((old.reshape(-1) / _gain(norm, vectors, size)) @ reading).reshape(*old.shape[:-1], kept)
            if not np.allclose(found.setdefault(norm.shift, new), new):
                raise CutError(f"cannot rotate: '{norm.shift}' is the bias of several norms with different weights")
    for name, several in gains.items():
        found[name] = np.full((*vectors[name].shape[:-1], kept), np.mean(several))
    return found


def _other_picks(context: Context, cut: Cut, name: str, position: int) -> list[np.ndarray | None]:
    """Return the kept indices of the other axes of an initializer."""
    use = context.analysis.typing.uses[name][0]
    return [None if axis == position else cut.picks(find(a)) for axis, a in enumerate(use.axes)]
