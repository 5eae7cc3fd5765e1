"""Judge an analysis without a reference: permute everything, zero what a cut drops, keep half of everything."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphclone.axes.axis import Axis, find, leaves
from graphclone.axes.notation import Pattern, parse
from graphclone.axes.steps import atom_steps
from graphclone.cut import Cut
from graphclone.errors import GraphcloneError
from graphclone.verify.bench import Bench
from graphclone.verify.inputs import Feeds
from graphclone.verify.report import Check
from graphclone.verify.running import TOLERANCE, difference, run
from graphclone.verify.weights import zeroed
from graphclone.verify.zeros import summed_beside_zero


def permutation(bench: Bench, seed: int = 0) -> Check:
    """Check that a random order of the indices of every atom at once leaves the outputs as they are.

    A permutation is a cut that drops nothing. Catches axes that were matched, grouped or tied wrongly.
    """
    random = np.random.default_rng((seed, 1))
    orders = {atom: _shuffled(random, atom.size[0]) for atom in bench.atoms()}

    def figure(atoms: Sequence[Axis]) -> float:
        cut = bench.cut({atom: orders[atom] for atom in atoms})
        return _compare(bench, cut, lambda: bench.outputs)

    return _judge("permutation", bench, list(orders), figure)


def zero(bench: Bench, seed: int = 0) -> Check:
    """Check that cutting half of every atom equals setting that half of every weight to zero.

    Only of atoms that no operator takes statistics over: norms and softmax see fewer entries after a cut. Catches
    stored sizes and offsets that were rewritten wrongly, which a permutation cannot see.
    """
    return _zero("zero", bench, _halves(bench, seed))


def zero_cut(bench: Bench, seed: int = 0) -> Cut:
    """Return the cut that `zero` judges where it judges all atoms at once."""
    excluded = _statistic_atoms(bench)
    return bench.cut({atom: kept for atom, kept in _halves(bench, seed).items() if id(atom) not in excluded})


def planned(bench: Bench, cut: Cut) -> Check:
    """Check that what a plan cuts equals the parent with the dropped slices zeroed; `bench` is the parent's."""
    return _zero("plan", bench, {atom: cut.indices[id(atom)] for atom in cut.atoms if id(atom) in cut.indices})


def _zero(name: str, bench: Bench, kept: Mapping[Axis, np.ndarray]) -> Check:
    excluded = _statistic_atoms(bench)
    kept = {atom: indices for atom, indices in kept.items() if id(atom) not in excluded}

    def figure(atoms: Sequence[Axis]) -> float:
        cut = bench.cut({atom: kept[atom] for atom in atoms})
        feeds = [_zeroed_inputs(bench, cut, bench.feeds(cut, probe)[0]) for probe in bench.probes]
        parent = bench.whole(zeroed(bench.model, bench.copy, bench.analysis.typing, cut))
        return _compare(bench, cut, lambda: bench.run(parent, feeds))

    return _judge(name, bench, list(kept), figure)


def half(bench: Bench, seed: int = 0) -> Check:
    """Check that a random half of every atom runs on both probes, and gives outputs of the sizes it should."""
    halves = _halves(bench, seed)

    def figure(atoms: Sequence[Axis]) -> float:
        cut = bench.cut({atom: halves[atom] for atom in atoms})
        try:
            results = run(bench.child(cut), [bench.feeds(cut, feeds)[1] for feeds in bench.probes])
            expected = [bench.expected(cut, outputs) for outputs in bench.outputs]
        except (GraphcloneError, ArithmeticError, LookupError, ValueError):
            return float("inf")
        for got, child in zip(results, expected, strict=True):
            for name, wanted in child.items():
                if got[name].shape != wanted.shape or np.isfinite(wanted).all() > np.isfinite(got[name]).all():
                    return float("inf")
        return 0.0

    return _judge("half cut", bench, list(halves), figure)


def _judge(name: str, bench: Bench, atoms: list[Axis], figure: Callable[[Sequence[Axis]], float]) -> Check:
    """Run one oracle over all atoms at once; where it fails, name the atom that fails alone."""
    if not atoms:
        return Check(name, True, 0.0, TOLERANCE, "nothing to cut that it could judge")
    total = figure(atoms)
    if total <= TOLERANCE:
        notes = "" if name == "half cut" and bench.is_whole else bench.notes
        return Check(name, True, total, TOLERANCE, f"{len(atoms)} axes{notes}")
    culprits = _culprits(atoms, lambda some: figure(some) > TOLERANCE)
    listed = ", ".join(bench.name(atom) for atom in culprits[:3])
    more = f" and {len(culprits) - 3} more together" if len(culprits) > 3 else " together" if len(culprits) > 1 else ""
    return Check(name, False, total, TOLERANCE, listed + more)


def _culprits(atoms: list[Axis], fails: Callable[[list[Axis]], bool]) -> list[Axis]:
    """Halve a failing list while one of its halves fails alone."""
    while len(atoms) > 1:
        middle = len(atoms) // 2
        failing = next((part for part in (atoms[:middle], atoms[middle:]) if fails(part)), None)
        if failing is None:
            break
        atoms = failing
    return atoms


def _compare(bench: Bench, cut: Cut, parent: Callable) -> float:
    """Return how far the child of a cut is from what the parent's outputs say; `inf` where it does not run."""
    try:
        results = bench.run(bench.child(cut), [bench.feeds(cut, feeds)[1] for feeds in bench.probes])
        wanted = [bench.expected(cut, outputs) for outputs in parent()]
    except (GraphcloneError, ArithmeticError, LookupError, ValueError):
        return float("inf")
    return max(difference(got, want) for got, want in zip(results, wanted, strict=True))


def _shuffled(random: np.random.Generator, size: int) -> np.ndarray:
    """Return a permutation that is not the identity."""
    order = random.permutation(size)
    return np.roll(order, 1) if np.array_equal(order, np.arange(size)) else order


def _halves(bench: Bench, seed: int) -> dict[Axis, np.ndarray]:
    """Return a random half of every atom, in order; no fewer than the graph needs, and in steps that it admits."""
    random = np.random.default_rng((seed, 2))
    least: dict[int, int] = {}
    for axis, count, _ in bench.analysis.typing.minimum:
        for leaf in leaves(axis):
            single = leaf is find(axis)
            least[id(leaf)] = max(least.get(id(leaf), 1), count if single else leaf.size[0])
    steps, halves = atom_steps(bench.analysis.typing.steps), {}
    for atom in bench.atoms():
        size = atom.size[0]
        step = steps.get(id(atom), 1)
        count = step * math.ceil(max(least.get(id(atom), 1), size // 2) / step)
        if count < size:
            halves[atom] = np.sort(random.permutation(size)[:count])
    return halves


def _statistic_atoms(bench: Bench) -> set[int]:
    """Return the ids of atoms that some operator takes statistics over, divides by the size of, or indexes with, and of
    those over which numbers are summed that zeroed weights do not make zero."""
    typing = bench.analysis.typing
    found: list[Axis] = [axis for site in typing.sites if site.kind == "denominator" for axis in site.axes]
    found += summed_beside_zero(typing)
    found += [axis for use in bench.indices for axis in use.axes]
    for node in typing.nodes:
        signature = parse(node.text) if node.text and node.constrains else None
        for pattern in (
            (p for patterns in (*signature.inputs, *signature.outputs) for p in patterns) if signature else ()
        ):
            found += [node.bound[name] for name in _statistics(pattern) if name in node.bound]
    return {id(leaf) for axis in found for leaf in leaves(axis)}


def _statistics(pattern: Pattern, inside: bool = False) -> list[str]:
    inside = inside or pattern.statistic
    if pattern.kind == "name":
        return [pattern.name] if inside else []
    return [name for part in pattern.parts for name in _statistics(part, inside)]


def _zeroed_inputs(bench: Bench, cut: Cut, feeds: Feeds) -> Feeds:
    """Return feeds whose float entries that the cut drops are zero."""
    result = dict(feeds)
    for name, array in feeds.items():
        if array.dtype.kind not in "iubUSO":
            for position, axis in enumerate(bench.analysis.typing.types.get(name) or ()):
                kept = cut.picks(axis)
                if kept is not None:
                    mask = np.zeros(array.shape[position], array.dtype)
                    mask[kept] = 1
                    array = array * mask.reshape((-1,) + (1,) * (array.ndim - position - 1))
            result[name] = array
    return result
