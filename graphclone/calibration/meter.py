"""Meter: one instrumented session, which turns a batch into the statistics of that batch."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnxruntime

from graphclone.calibration.data import Batch
from graphclone.calibration.feeds import Feeds, input_specs
from graphclone.calibration.instrument import (
    SAMPLES,
    SUMS,
    Instrumented,
    SpanReading,
    TapReading,
    instrument,
    main_tensors,
    shape_outputs,
    token_weights,
)
from graphclone.calibration.layout import Layout, Scheme, find_layout
from graphclone.calibration.limits import index_limits
from graphclone.calibration.masks import sense
from graphclone.calibration.session import RUNTIME_ERRORS, first_line, open_session
from graphclone.calibration.statistics import MomentSums, SpanSums, Statistics, TapSums
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError
from graphclone.model import Model

SAMPLED_BYTES = 64 << 10
QUIET = onnxruntime.RunOptions()
QUIET.log_severity_level = 4  # what goes wrong is in the error, once

Wanted = Tap | Moment


@dataclass(frozen=True, slots=True)
class Question:
    """What one calibration measures, and where it runs."""

    taps: tuple[Tap, ...] = ()
    spans: tuple[Span, ...] = ()
    moments: tuple[Moment, ...] = ()
    masks: tuple[str, ...] = ()
    provider: str = "cpu"
    threads: int | None = None


@dataclass
class Meter:
    """Measure batches of one model; the first batch shows what the graph does not say about axes.

    Example:
        >>> from graphclone.calibration.data import open_data
        >>> batch = next(iter(open_data([feeds], model)))
        >>> Meter(model, Question(taps=(Tap("gelu"),)), batch).read(batch).tokens
        10
    """

    model: Model
    question: Question
    first: Batch
    parent: str = ""
    _run: "_Run" = field(init=False, repr=False)
    _guarded: bool = field(init=False, repr=False, default=False)
    _shared: bool = field(init=False, repr=False, default=True)

    def __post_init__(self) -> None:
        self.parent = self.parent or self.model.fingerprint
        self.limits = index_limits(self.model)
        self._check_indices(self.first)
        self.masks = {name: sense(self.model, name) for name in self.question.masks}
        self.reference = _reference(self.model, self.masks)
        self._layouts = _layouts(self.model, self.question, self.first, self.reference)
        self._run = self._open()

    def read(self, batch: Batch) -> Statistics:
        """Return the statistics of one batch.

        A batch with NaN or Inf is run again with padding set to zero, since padding may hold NaN by design.
        Raises: InputError where onnxruntime rejects the batch, or a real token holds NaN or Inf.
        """
        self._check_indices(batch)
        results = self._results(batch)
        if not self._guarded and self._first_bad(results):
            self._guarded = True
            self._run = self._open()
            results = self._run(batch)
        if bad := self._first_bad(results):
            raise InputError(
                f"'{bad}' holds NaN or Inf, or values too large to square, in {batch.where}: the first of the measured "
                "tensors to do so; check this batch, and whether the model overflows in its number type"
            )
        return self._statistics(self._run.graph, results, batch)

    def _results(self, batch: Batch) -> dict[str, np.ndarray]:
        """Run a batch; where sizes that were equal in the first batch differ in this one, stop relying on it."""
        try:
            return self._run(batch)
        except InputError:
            if not self._shared:
                raise
            self._shared = False
            self._run = self._open()
            return self._run(batch)

    def _open(self) -> "_Run":
        graph = instrument(self.model, *self._layouts, guard=self._guarded, share=self._shared)
        return _Run(graph, self.question, self.masks, self.reference)

    def _check_indices(self, batch: Batch) -> None:
        for name, limit in self.limits.items():
            values = batch.feeds[name]
            low, high = int(values.min()), int(values.max())
            if high >= limit.size or low < -limit.size:
                wrong = high if high >= limit.size else low
                raise InputError(
                    f"'{name}' in {batch.where} holds {wrong}, but its table '{limit.table}' has {limit.size} rows; "
                    f"ids run from 0 to {limit.size - 1}"
                )

    def _first_bad(self, results: Mapping[str, np.ndarray]) -> str | None:
        """Return the first tensor, in topological order, whose sums or norms are not finite."""
        bad = {
            tap.tensor
            for tap, reading in self._run.graph.taps.items()
            if not np.isfinite(results[SUMS][0, reading.absolute.start : reading.square.stop]).all()
        }
        for moment, reading in self._run.graph.moments.items():
            if not np.isfinite(results[reading.matrix]).all():
                bad.add(moment.tensor)
        for span, reading in self._run.graph.spans.items():
            norms = _norms(reading, results)[1]
            tensors = (span.entry, span.exit, span.exit)
            bad.update(tensor for tensor, norm in zip(tensors, norms, strict=True) if not np.isfinite(norm).all())
        return next((name for name in main_tensors(self.model) if name in bad), None) if bad else None

    def _statistics(self, graph: Instrumented, results: Mapping[str, np.ndarray], batch: Batch) -> Statistics:
        taps_layouts, span_layouts, moment_layouts = self._layouts
        sums = results[SUMS][0].astype(np.float64) if taps_layouts else np.empty(0)
        taps = {
            (tap.tensor, layout.axis): _tap_sums(layout, graph.taps[tap], sums, results)
            for tap, layout in taps_layouts.items()
        }
        moments = {
            (moment.tensor, layout.axis): MomentSums(
                layout.rank,
                _total(results[graph.moments[moment].rows]),
                results[graph.moments[moment].matrix].astype(np.float64),
            )
            for moment, layout in moment_layouts.items()
        }
        spans = {span.name: _span_sums(span, results, graph) for span in span_layouts}
        return Statistics(
            parent=self.parent,
            provider=self.question.provider,
            batches=1,
            samples=batch.samples,
            tokens=self._tokens(batch, taps, spans),
            data=digest(batch.feeds),
            taps=taps,
            spans=spans,
            moments=moments,
        )

    def _tokens(self, batch: Batch, taps: Mapping, spans: Mapping) -> int:
        """Count tokens by the first mask, else by the rows of the residual stream."""
        if self.masks:
            first = next(iter(self.masks))
            return int(_weights(batch, self.masks, self.reference)[token_weights(first)].sum())
        return int(next((sums.count for sums in (*spans.values(), *taps.values())), batch.samples))


class _Run:
    """An instrumented graph and its session."""

    def __init__(self, graph: Instrumented, question: Question, masks: Mapping[str, bool], reference: str):
        self.graph = graph
        self.session = open_session(graph.model, provider=question.provider, threads=question.threads)
        self.names = [output.name for output in self.session.get_outputs()]
        self.masks = masks
        self.reference = reference

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        weights = _weights(batch, self.masks, self.reference)
        feeds = batch.feeds | {name: weights[name] for name in self.graph.inputs}
        results = dict(zip(self.names, run_session(self.session, feeds, batch.where), strict=True))
        for span, reading in self.graph.spans.items():
            if results[reading.norms].size != results[reading.rows].size * reading.count:
                raise InputError(f"the span '{span.name}' has another number of tokens in {batch.where}")
        return results


def run_session(session, feeds: Feeds, where: str) -> list[np.ndarray]:
    """Run a session. Raises: InputError, naming the batch, where onnxruntime cannot."""
    try:
        return session.run(None, feeds, QUIET)
    except RUNTIME_ERRORS as error:
        message = re.sub(r"^\d+ : \w+ : ", "", first_line(error))
        shapes = ", ".join(f"'{name}' {value.dtype} {list(value.shape)}" for name, value in feeds.items())
        raise InputError(f"onnxruntime cannot run {where}: {message} (fed: {shapes})") from error


def digest(feeds: Feeds) -> str:
    """Return a SHA-256 of names, shapes, types and up to 64 KiB of each array."""
    result = hashlib.sha256()
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        flat = array.reshape(-1)
        step = max(1, flat.nbytes // SAMPLED_BYTES)
        result.update(f"{name} {array.dtype} {array.shape}".encode())
        result.update(flat[::step].tobytes())
    return result.hexdigest()


def _weights(batch: Batch, masks: Mapping[str, bool], reference: str) -> dict[str, np.ndarray]:
    """Return what samples and tokens count: 1, or 0 for padding and for samples that fill a static batch.

    masks: {input: what it holds at real tokens}.
    """
    shape = batch.feeds[reference].shape
    samples = (np.arange(shape[0] if shape else 1) < batch.samples).astype(np.float32)
    weights = {SAMPLES: samples}
    for mask, real in masks.items():
        weights[token_weights(mask)] = ((batch.feeds[mask] != 0) == real).astype(np.float32) * samples[:, None]
    return weights


def _span_sums(span: Span, results: Mapping[str, np.ndarray], graph: Instrumented) -> SpanSums:
    """Turn squared norms per token into sums; a token without norm counts as unchanged.

    1 - cos = (||f||^2 - (||x|| - ||y||)^2) / (2 ||x|| ||y||) with y = x + f: no cancellation where f is small.
    """
    weights, (entry, exit, change) = _norms(graph.spans[span], results)
    product = 2 * entry * exit
    ratio = np.divide(change, exit, out=np.zeros_like(change), where=exit > 0)
    turn = np.divide(change**2 - (entry - exit) ** 2, product, out=np.zeros_like(change), where=product > 0)
    turn = np.clip(turn, 0.0, 2.0)
    return SpanSums(span.entry, span.exit, float(weights.sum()), float(weights @ ratio), float(weights @ turn))


def _norms(reading: SpanReading, results: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights and the norms of entry, exit and change, fp64 [3, rows], of the rows that count."""
    weights = results[reading.rows].reshape(-1).astype(np.float64)
    real = weights > 0
    norms = results[reading.norms].reshape(-1, len(weights))[[reading.entry, reading.exit, reading.change]]
    return weights[real], np.sqrt(norms[:, real].astype(np.float64))


def _tap_sums(layout: Layout, reading: TapReading, sums: np.ndarray, results: Mapping[str, np.ndarray]) -> TapSums:
    parts = (sums[part] for part in (reading.value, reading.absolute, reading.square))
    return TapSums(layout.rank, _total(results[reading.rows]), *parts)


def _total(weights: np.ndarray) -> float:
    return float(weights.sum(dtype=np.float64))


def _reference(model: Model, masks: Iterable[str]) -> str:
    """Return an input whose axis 0 is the batch."""
    specs = input_specs(model)
    ranked = [name for name, spec in specs.items() if spec.shape is None or len(spec.shape) > 1]
    return next(iter((*masks, *ranked, *specs)))


def _two_batches(session, first: Batch, names: Scheme, sizes: Scheme) -> list[list[np.ndarray]]:
    """Return what a session gives for the first batch, and for its first sample where the model takes other batches."""
    found = [run_session(session, first.feeds, first.where)]
    if isinstance(names.batch, int) or sizes.batch == 1:
        return found
    one = {name: value[:1] if value.shape[:1] == (sizes.batch,) else value for name, value in first.feeds.items()}
    with contextlib.suppress(InputError):  # some graphs take no batch of one
        found.append(run_session(session, one, first.where))
    return found


def _layouts(
    model: Model, question: Question, first: Batch, reference: str
) -> tuple[dict[Tap, Layout], dict[Span, tuple[Layout, Layout]], dict[Moment, Layout]]:
    specs = input_specs(model)
    declared = {name: spec.shape or (None, None) for name, spec in specs.items()}
    names = Scheme(declared[reference][0], {mask: declared[mask] for mask in question.masks})
    shapes = {name: value.shape for name, value in first.feeds.items()}
    sizes = Scheme((shapes[reference] or (1,))[0], {mask: shapes[mask] for mask in question.masks})
    tensors = main_tensors(model)
    places = [*question.taps, *question.moments]
    places += [Tap(name, span.axis, span.layout) for span in question.spans for name in (span.entry, span.exit)]
    for place in places:
        if place.tensor not in tensors:
            raise InputError(f"cannot measure '{place.tensor}': the graph has no such tensor outside its subgraphs")
    measured: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def measure(tensor: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not measured:
            probe, outputs = shape_outputs(model, {place.tensor for place in places})
            session = open_session(probe, provider=question.provider, threads=question.threads)
            order = [item.name for item in session.get_outputs()]
            runs = [dict(zip(order, shapes, strict=True)) for shapes in _two_batches(session, first, names, sizes)]
            for name, output in outputs.items():
                shape, other = (tuple(map(int, run[output])) for run in (runs[0], runs[-1]))
                alike = tuple(axis for axis in range(len(shape)) if shape[axis] == other[axis])
                measured[name] = shape, alike if len(runs) > 1 else ()
        return measured[tensor]

    def fit(place: Wanted) -> Layout:
        shape = tensors[place.tensor].shape
        return find_layout(place.tensor, place.axis, place.layout, shape, names, sizes, measure)

    return (
        {tap: fit(tap) for tap in question.taps},
        {
            span: (fit(Tap(span.entry, span.axis, span.layout)), fit(Tap(span.exit, span.axis, span.layout)))
            for span in question.spans
        },
        {moment: fit(moment) for moment in question.moments},
    )
