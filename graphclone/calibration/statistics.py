"""Statistics: what calibration counted, as sums that merge and as a file that later commands reuse."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from graphclone.atomic import replacing
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError
from graphclone.model import Model

FORMAT = "graphclone.statistics/1"
METADATA_KEY = "graphclone"

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TapSums:
    """Sums over `count` rows of one tap, fp64: of x, |x| and x^2, each of shape [size]; rank: of the tensor."""

    rank: int
    count: float
    value: np.ndarray
    absolute: np.ndarray
    square: np.ndarray

    def __add__(self, other: "TapSums") -> "TapSums":
        return TapSums(
            self.rank,
            self.count + other.count,
            self.value + other.value,
            self.absolute + other.absolute,
            self.square + other.square,
        )


@dataclass(frozen=True, slots=True)
class SpanSums:
    """Sums over `count` tokens of one span: of ||f(x)|| / ||x + f(x)|| and of 1 - cos(x, x + f(x))."""

    entry: str
    exit: str
    count: float
    ratio: float
    turn: float

    def __add__(self, other: "SpanSums") -> "SpanSums":
        return SpanSums(
            self.entry, self.exit, self.count + other.count, self.ratio + other.ratio, self.turn + other.turn
        )


@dataclass(frozen=True, slots=True)
class MomentSums:
    """The sum of x x^T over `count` rows, fp64, of shape [size, size]."""

    rank: int
    count: float
    matrix: np.ndarray

    def __add__(self, other: "MomentSums") -> "MomentSums":
        return MomentSums(self.rank, self.count + other.count, self.matrix + other.matrix)


@dataclass(frozen=True)
class Statistics:
    """What calibration counted.

    parent: fingerprint of the model; data: a digest of the batches, in order; provider: where it ran, 'cpu' or 'cuda'.
    batches, samples, tokens: how much was counted, padding left out. interrupted: whether Ctrl-C ended it.
    taps, moments: by tensor and axis counted from the front; spans: by name.

    Example:
        >>> stats.tokens, stats.mean_abs("gelu").shape
        (10, (512,))
    """

    parent: str
    provider: str
    batches: int = 0
    samples: int = 0
    tokens: int = 0
    data: str = ""
    interrupted: bool = False
    taps: Mapping[Key, TapSums] = field(default_factory=dict)
    spans: Mapping[str, SpanSums] = field(default_factory=dict)
    moments: Mapping[Key, MomentSums] = field(default_factory=dict)

    def mean(self, tap: Tap | str) -> np.ndarray:
        """Return E[x], of shape [size]."""
        sums = self._tap(tap)
        return sums.value / sums.count

    def mean_abs(self, tap: Tap | str) -> np.ndarray:
        """Return E|x|, of shape [size]."""
        sums = self._tap(tap)
        return sums.absolute / sums.count

    def mean_square(self, tap: Tap | str) -> np.ndarray:
        """Return E[x^2], of shape [size]."""
        sums = self._tap(tap)
        return sums.square / sums.count

    def variance(self, tap: Tap | str) -> np.ndarray:
        """Return E[x^2] - E[x]^2, of shape [size]; no value is below 0."""
        return np.maximum(self.mean_square(tap) - self.mean(tap) ** 2, 0.0)

    def second_moment(self, moment: Moment | str) -> np.ndarray:
        """Return E[x x^T], of shape [size, size]."""
        sums = _found(self.moments, moment, "second moments")
        return sums.matrix / sums.count

    def ratio(self, span: Span | str) -> float:
        """Return the mean of ||f(x)|| / ||x + f(x)|| over tokens (arXiv 2312.09299, section 3)."""
        sums = self._span(span)
        return sums.ratio / sums.count

    def cosine(self, span: Span | str) -> float:
        """Return the mean of cos(x, x + f(x)) over tokens (arXiv 2403.03853)."""
        sums = self._span(span)
        return 1.0 - sums.turn / sums.count

    def check(self, model: Model) -> None:
        """Raise InputError where these statistics were measured on another model."""
        if model.fingerprint != self.parent:
            raise InputError(
                f"the statistics were measured on another model (fingerprint {self.parent[:12]}, "
                f"and this one has {model.fingerprint[:12]}); run graphclone calibrate on this one"
            )

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both sets of samples together.

        Raises: InputError where the models or the measured tensors differ.

        Example:
            >>> Statistics("f", "cpu", batches=1, samples=3).merge(Statistics("f", "cpu", batches=1, samples=4)).samples
            7
        """
        if self.parent != other.parent:
            raise InputError("cannot merge statistics of two models; measure both sets of samples on the same one")
        if not self.batches or not other.batches:
            whole = other if other.batches else self
            return replace(whole, interrupted=self.interrupted or other.interrupted)
        return Statistics(
            parent=self.parent,
            provider=self.provider,
            batches=self.batches + other.batches,
            samples=self.samples + other.samples,
            tokens=self.tokens + other.tokens,
            data=hashlib.sha256(f"{self.data}+{other.data}".encode()).hexdigest(),
            interrupted=self.interrupted or other.interrupted,
            taps=_added(self.taps, other.taps),
            spans=_added(self.spans, other.spans),
            moments=_added(self.moments, other.moments),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises: InputError where the path cannot be written."""
        arrays, taps, moments = {}, [], []
        for index, ((tensor, axis), sums) in enumerate(self.taps.items()):
            taps.append({"tensor": tensor, "axis": axis, "rank": sums.rank, "count": sums.count})
            arrays[f"mean.{index}"] = sums.value / sums.count
            arrays[f"mean_abs.{index}"] = sums.absolute / sums.count
            arrays[f"mean_square.{index}"] = sums.square / sums.count
        for index, ((tensor, axis), sums) in enumerate(self.moments.items()):
            moments.append({"tensor": tensor, "axis": axis, "rank": sums.rank, "count": sums.count})
            arrays[f"second_moment.{index}"] = sums.matrix / sums.count
        spans = [
            {"name": name, "entry": sums.entry, "exit": sums.exit, "count": sums.count}
            for name, sums in self.spans.items()
        ]
        arrays["ratio"] = np.array([self.ratio(name) for name in self.spans])
        arrays["cosine"] = np.array([self.cosine(name) for name in self.spans])
        header = {name: getattr(self, name) for name in _SCALARS}
        header |= {"format": FORMAT, "taps": taps, "spans": spans, "moments": moments}
        data = save(arrays, {METADATA_KEY: json.dumps(header)})
        with replacing(path) as (file,):
            file.write(data)

    @staticmethod
    def load(path: str | Path) -> "Statistics":
        """Read a file that `save` wrote. Raises: InputError where it is missing, damaged or something else."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read statistics from '{path}': {error.strerror}; check the path") from None
        try:
            header = json.loads(_metadata(content)[METADATA_KEY])
            if header["format"] != FORMAT:
                raise InputError(
                    f"'{path}' holds {header['format']}, and this graphclone reads {FORMAT}; "
                    "run graphclone calibrate again"
                )
            return _from_file(header, load(content))
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"'{path}' is no statistics file, or a damaged one ({type(error).__name__}); "
                "run graphclone calibrate again"
            ) from None

    def _tap(self, tap: Tap | str) -> TapSums:
        return _found(self.taps, tap, "statistics")

    def _span(self, span: Span | str) -> SpanSums:
        name = span if isinstance(span, str) else span.name
        if name not in self.spans:
            raise InputError(f"the statistics hold no span '{name}'; run graphclone calibrate on this model")
        return self.spans[name]


_SCALARS = ("parent", "provider", "batches", "samples", "tokens", "data", "interrupted")


def _found(sums: Mapping, wanted: Tap | Moment | str, what: str):
    name, axis = (wanted, None) if isinstance(wanted, str) else (wanted.tensor, wanted.axis)
    for (tensor, measured), item in sums.items():
        if tensor == name and (axis is None or axis % item.rank == measured):
            return item
    place = "" if axis is None else f" over axis {axis}"
    raise InputError(f"the file holds no {what} of '{name}'{place}; run graphclone calibrate on this model")


def _added(first: Mapping, second: Mapping) -> dict:
    if first.keys() != second.keys():
        odd = sorted(map(str, first.keys() ^ second.keys()))[0]
        raise InputError(f"cannot merge statistics that measured different tensors: only one of them has {odd}")
    return {key: sums + second[key] for key, sums in first.items()}


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of safetensors in memory: a length, then that much JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _from_file(header: Mapping, arrays: Mapping[str, np.ndarray]) -> Statistics:
    taps, spans, moments = {}, {}, {}
    for index, item in enumerate(header["taps"]):
        means = (arrays[f"{name}.{index}"] for name in ("mean", "mean_abs", "mean_square"))
        sums = (mean * item["count"] for mean in means)
        taps[item["tensor"], item["axis"]] = TapSums(item["rank"], item["count"], *sums)
    for index, item in enumerate(header["moments"]):
        matrix = arrays[f"second_moment.{index}"] * item["count"]
        moments[item["tensor"], item["axis"]] = MomentSums(item["rank"], item["count"], matrix)
    for item, ratio, cosine in zip(header["spans"], arrays["ratio"], arrays["cosine"], strict=True):
        count = item["count"]
        turn = (1.0 - float(cosine)) * count
        spans[item["name"]] = SpanSums(item["entry"], item["exit"], count, float(ratio) * count, turn)
    return Statistics(**{name: header[name] for name in _SCALARS}, taps=taps, spans=spans, moments=moments)
