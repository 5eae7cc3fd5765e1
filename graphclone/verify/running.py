"""Run a model on feeds with onnxruntime, repeatable bit by bit, and say how far outputs are apart."""

from collections.abc import Iterable

import numpy as np
import onnxruntime

from graphclone.analysis import Analysis
from graphclone.calibration.session import RUNTIME_ERRORS, describe, first_line, open_session
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.verify.inputs import Feeds, candidates

Outputs = dict[str, np.ndarray]

TOLERANCE = 1e-5
QUIET = onnxruntime.RunOptions()
QUIET.log_severity_level = 4  # what cannot run is an answer here, not news


def run(model: Model, probes: Iterable[Feeds]) -> list[Outputs]:
    """Return a model's outputs for each probe, repeatable bit by bit. Raises: InputError where it does not run."""
    session = open_session(model, threads=1, mem_reuse=False, optimize="basic")
    names = [output.name for output in session.get_outputs()]
    wanted = {tensor.name for tensor in session.get_inputs()}
    results = []
    for feeds in probes:
        try:
            values = session.run(None, {name: array for name, array in feeds.items() if name in wanted}, QUIET)
        except RUNTIME_ERRORS as error:
            raise InputError(f"onnxruntime cannot run {describe(model)}: {first_line(error)}") from error
        results.append(dict(zip(names, values, strict=True)))
    return results


def first_run(model: Model, analysis: Analysis, seed: int = 0) -> tuple[str, list[Feeds], list[Outputs]]:
    """Return a note, the synthesised feeds that a model runs on, and its outputs.

    Raises: InputError where onnxruntime cannot run it at all.
    """
    session = open_session(model, threads=1, mem_reuse=False)
    names = [output.name for output in session.get_outputs()]
    problem: Exception | None = None
    for note, probes in candidates(model, analysis.typing, seed):
        try:
            return note, probes, [dict(zip(names, session.run(None, feeds, QUIET), strict=True)) for feeds in probes]
        except RUNTIME_ERRORS as error:
            problem = problem or error
    raise InputError(f"onnxruntime cannot run {describe(model)}: {first_line(problem)}; give inputs it runs on as data")


def difference(got: Outputs, wanted: Outputs) -> float:
    """Return the largest of max |a - b| / max |b| over the outputs; `inf` where shapes, integers or NaN differ."""
    return max((_relative(got.get(name), array) for name, array in wanted.items()), default=0.0)


def _relative(got: np.ndarray | None, wanted: np.ndarray) -> float:
    if got is None or not isinstance(wanted, np.ndarray) or got.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    if wanted.dtype.kind not in "fc":
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    same = got == wanted  # infinities of one sign agree
    if not (np.isfinite(got) | same).all() or not (np.isfinite(wanted) | same).all():
        return float("inf")
    finite = np.where(same, 0, wanted)
    largest = float(np.abs(np.where(np.isfinite(wanted), wanted, 0)).max())
    gap = float(np.abs(np.where(same, 0, got) - finite).max())
    return gap / largest if largest else gap
