"""Prove a model, and a cut of it, on synthesised inputs: what `graphclone verify` prints."""

import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from graphclone.analysis import Analysis, analyse
from graphclone.calibration.session import runnable
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.native import has_native_constants
from graphclone.plan import Plan
from graphclone.precision import is_low, raised
from graphclone.resolution import resolve
from graphclone.surgery import apply
from graphclone.verify import oracles
from graphclone.verify.bench import Bench
from graphclone.verify.child import compare_outputs, compare_weights
from graphclone.verify.inputs import Feeds
from graphclone.verify.report import Check, Report
from graphclone.verify.running import TOLERANCE, first_run, run
from graphclone.verify.structure import problem_of

PROBES = 2


def verify(
    model: Model,
    *,
    data: Iterable[Mapping[str, np.ndarray]] | None = None,
    parent: Model | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    analysis: Analysis | None = None,
) -> Report:
    """Check a model's form, run it, and judge its analysis by the permutation, zero and half-cut oracles.

    data: feeds by input name; the first two are used in place of synthesised ones. parent, plan: judge the model as the
    child of this cut too. seed: of inputs, noise, orders and halves. analysis: of the model, where it is at hand.
    Raises: InputError where onnxruntime cannot run the model at all. A check that fails is in the report.

    Example:
        >>> verify(encoder).ok
        True
    """
    checks = [_timed(lambda: _form(model, parent))]
    analysis = analysis or analyse(model)
    started = time.perf_counter()
    note, probes, outputs = _run(model, analysis, data, seed)
    checks.append(_finished(_finite(note, probes, outputs), started))
    bench = Bench.of(model, analysis, probes, seed)
    for oracle in (oracles.permutation, oracles.zero, oracles.half):
        checks.append(_timed(lambda oracle=oracle: oracle(bench, seed)))
    if parent is not None and plan is not None:
        checks += _judge_child(model, parent, plan, probes, seed)
    return Report(tuple(checks))


def _judge_child(child: Model, parent: Model, plan: Plan, probes: list[Feeds], seed: int) -> list[Check]:
    """Compare a child with the plan carried out again, and that with the parent's slices zeroed."""
    analysis = analyse(parent)
    again = apply(parent, plan, analysis)
    folded = apply(parent, plan, analysis, native_constants=True) if has_native_constants(child) else again
    return [
        _timed(lambda: _slices(child.reread(), folded.reread())),
        _timed(lambda: _same_outputs(runnable(child), runnable(again), probes)),
        _timed(lambda: _planned(parent, plan, analysis, seed)),
    ]


def _planned(parent: Model, plan: Plan, analysis: Analysis, seed: int) -> Check:
    _, probes, _ = _run(parent, analysis, None, seed)
    return oracles.planned(Bench.of(parent, analysis, probes, seed), resolve(plan, analysis))


def _timed(check: Callable[[], Check]) -> Check:
    started = time.perf_counter()
    return _finished(check(), started)


def _finished(check: Check, started: float) -> Check:
    return Check(check.name, check.ok, check.figure, check.tolerance, check.where, time.perf_counter() - started)


def _form(model: Model, parent: Model | None) -> Check:
    """Judge the form of a file; a child may have the fault that its parent has."""
    problem = problem_of(model)
    inherited = bool(problem) and parent is not None and problem_of(parent) == problem
    return Check("checker", not problem or inherited, where=f"as in the parent: {problem}" if inherited else problem)


def _run(model: Model, analysis: Analysis, data, seed: int) -> tuple[str, list[Feeds], list[dict[str, np.ndarray]]]:
    """Return a note, feeds and outputs; a 16-bit model that onnxruntime has no kernels for runs in fp32."""
    low = is_low(model)
    for number, version in enumerate([model, raised(model)] if low else [model]):
        widened = "in fp32, because onnxruntime does not run it in 16 bits" if number else ""
        try:
            if data is None:
                note, probes, outputs = first_run(version, analysis, seed)
                return "; ".join(filter(None, (note, widened))), probes, outputs
            probes = _given(model, data)
            return widened, probes, run(version, probes)
        except InputError:
            if number == low:
                raise
    raise AssertionError("one version ran or raised")


def _given(model: Model, data: Iterable[Mapping[str, np.ndarray]]) -> list[Feeds]:
    names = [tensor.name for tensor in model.inputs]
    probes = []
    for feeds in data:
        for name in names:
            if name not in feeds:
                raise InputError(f"the data has no values for the input '{name}'; the inputs are {', '.join(names)}")
        probes.append({name: np.asarray(feeds[name]) for name in names})
        if len(probes) == PROBES:
            break
    if not probes:
        raise InputError("the data is empty; give at least one feed, or none for synthesised inputs")
    return probes


def _finite(note: str, probes: list[Feeds], outputs: list[dict[str, np.ndarray]]) -> Check:
    bad = [
        name
        for result in outputs
        for name, array in result.items()
        if isinstance(array, np.ndarray)
        and array.dtype.kind not in "iubUSO"
        and not np.isfinite(array.astype(np.float32)).all()
    ]
    where = f"output '{bad[0]}' holds NaN or infinity" if bad else note or f"{len(probes)} shapes"
    return Check("run", not bad, where=where)


def _slices(child: Model, again: Model) -> Check:
    problem = compare_weights(child, again)
    return Check("slices", not problem, where=problem or f"{len(again.weights)} initializers")


def _same_outputs(child: Model, again: Model, probes: list[Feeds]) -> Check:
    figure = compare_outputs(child, again, probes)
    return Check("outputs", figure <= TOLERANCE, figure, TOLERANCE)


__all__ = ["Check", "Report", "verify"]
