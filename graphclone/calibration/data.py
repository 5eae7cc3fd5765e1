"""Data: whatever form samples come in, one batch of checked feeds after another."""

import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from graphclone.calibration.feeds import Feeds, InputSpec, check_names, checked, input_specs, to_array
from graphclone.errors import InputError
from graphclone.model import Model

BATCH_SIZE = 8
SUFFIXES = (".npz", ".npy", ".safetensors")

Data = str | Path | Mapping[str, object] | Iterable[object]


@dataclass(frozen=True, slots=True)
class Batch:
    """feeds: one array per input; samples: how many are real, the others fill a static batch; where: its name."""

    feeds: Feeds
    samples: int
    where: str


@dataclass(frozen=True)
class Batches:
    """Iterate over batches, as often as the source allows; `total` is None where it cannot tell."""

    start: Callable[[], Iterator[Batch]]
    total: int | None

    def __iter__(self) -> Iterator[Batch]:
        return self.start()

    def first(self, count: int | None) -> "Batches":
        """Return at most `count` batches. Raises: InputError for a count below 1."""
        if count is None:
            return self
        if count < 1:
            raise InputError(f"--batches {count}: give at least one batch")
        total = None if self.total is None else min(count, self.total)
        return Batches(lambda: itertools.islice(self.start(), count), total)


def open_data(data: Data, model: Model, *, batch_size: int | None = None, batches: int | None = None) -> Batches:
    """Return the batches of any form of data.

    data: one of
        - a .npz or .safetensors file, or a mapping, of one array per input, axis 0 the sample (a .npy file where there
          is a single input); an input without a batch axis is stored once,
        - a folder, each of whose files is one ready batch, in the order of names,
        - an iterable of ready batches, or of samples (Hugging Face datasets): mappings, or bare arrays where there is a
          single input.
    batch_size: samples per batch; default 8, or the model's static batch. A static batch that data does not fill is
        filled with its last sample, which counts nothing.
    batches: stop after so many.
    Raises: InputError where data is missing, damaged, empty, or does not fit the inputs; checked batch by batch.

    Example:
        >>> open_data({"ids": np.zeros((20, 6), np.int64)}, model).total
        3
    """
    if isinstance(data, Batches):
        return data.first(batches)
    shape = _Shape(input_specs(model), batch_size)
    if isinstance(data, (str, Path)):
        path = Path(data)
        source = _folder(path, shape) if path.is_dir() else _table(_read(path, shape), shape, f"'{path}'")
    elif isinstance(data, Mapping):
        held = {name: _held(to_array(value, f"'{name}' in the data")) for name, value in data.items()}
        source = _table(held, shape, "the data")
    else:
        source = _iterable(data, shape)
    return source.first(batches)


class _Shape:
    """What the inputs say about batches."""

    def __init__(self, specs: dict[str, InputSpec], batch_size: int | None):
        if not specs:
            raise InputError("the model has no inputs, so there is nothing to feed")
        self.specs = specs
        leading = [spec.shape[0] for spec in specs.values() if spec.shape and len(spec.shape) > 1]
        leading = leading or [spec.shape[0] for spec in specs.values() if spec.shape] or [None]
        names = [size for size in leading if not isinstance(size, int)]
        self.batch = max(names or leading, key=(names or leading).count)
        self.static = self.batch if isinstance(self.batch, int) else None
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: give at least one sample per batch")
        if batch_size is not None and self.static is not None and batch_size != self.static:
            raise InputError(f"--batch-size {batch_size}: the model's batch is fixed to {self.static}; leave it out")
        self.size = self.static or batch_size or BATCH_SIZE
        self.reference = self._reference()

    def _reference(self) -> str:
        """Return the input whose axis 0 counts the samples."""
        led = [spec for spec in self.specs.values() if spec.shape and spec.shape[0] == self.batch]
        wide = [spec.name for spec in led if len(spec.shape) > 1]
        return next(iter((*wide, *(spec.name for spec in led), *self.specs)))

    def single(self, where: str) -> str:
        """Return the name of the only input. Raises: InputError where there are several."""
        if len(self.specs) > 1:
            names = ", ".join(f"'{name}'" for name in self.specs)
            raise InputError(
                f"{where} is a bare array, but the model has several inputs; name one array for each: {names}"
            )
        return next(iter(self.specs))

    def is_batched(self, name: str, length: int, samples: int) -> bool:
        """Tell whether axis 0 of a stored array counts samples, and not something of the input's own."""
        shape = self.specs[name].shape
        if name == self.reference or shape is None:
            return True
        if shape == ():
            return False
        if isinstance(shape[0], int):
            return shape[0] == self.static and (length == samples or length != shape[0])
        return shape[0] == self.batch or (length == samples and len(shape) > 1)

    def filled(self, feeds: Feeds, where: str) -> Batch:
        """Check a batch, and fill it up to the model's static batch. Raises: InputError."""
        check_names(feeds, self.specs, where)
        feeds = {name: to_array(value, f"'{name}' in {where}") for name, value in feeds.items()}
        reference = feeds[self.reference]
        samples = len(reference) if reference.ndim else 1
        if self.static is not None and 0 < samples < self.static:
            batched = {
                name for name, value in feeds.items() if value.ndim and self.is_batched(name, len(value), samples)
            }
            feeds = {name: _fill(value, self.static) if name in batched else value for name, value in feeds.items()}
        return Batch(checked(feeds, self.specs, where), samples, where)


@dataclass(frozen=True, slots=True)
class _Stored:
    """An array that is read in parts."""

    shape: tuple[int, ...]
    read: Callable[[slice], np.ndarray]


def _held(array: np.ndarray) -> _Stored:
    return _Stored(array.shape, lambda part: array[part] if array.ndim else array)


def _fill(array: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


def _table(stored: Mapping[str, _Stored], shape: _Shape, where: str) -> Batches:
    """Cut arrays whose axis 0 is the sample into batches."""
    check_names(stored, shape.specs, where)
    for name, array in stored.items():
        wanted = shape.specs[name].shape
        if wanted is not None and len(array.shape) != len(wanted):
            raise InputError(
                f"'{name}' in {where} has shape {list(array.shape)}, of rank {len(array.shape)}; "
                f"the model wants {shape.specs[name]}, of rank {len(wanted)}"
            )
    reference = stored[shape.reference].shape
    samples = reference[0] if reference else 1
    if samples == 0:
        raise InputError(f"'{shape.reference}' in {where} holds no samples: its shape is {list(reference)}")
    batched = {
        name for name, array in stored.items() if array.shape and shape.is_batched(name, array.shape[0], samples)
    }
    for name in batched:
        if stored[name].shape[0] != samples:
            raise InputError(
                f"'{name}' in {where} holds {stored[name].shape[0]} samples, but '{shape.reference}' holds {samples}; "
                "axis 0 of both is the sample"
            )

    def start() -> Iterator[Batch]:
        once = {name: array.read(slice(None)) for name, array in stored.items() if name not in batched}
        for index, begin in enumerate(range(0, samples, shape.size)):
            part = slice(begin, min(begin + shape.size, samples))
            feeds = {name: stored[name].read(part) if name in batched else once[name] for name in stored}
            yield shape.filled(feeds, f"batch {index} of {where}")

    return Batches(start, -(-samples // shape.size))


def _folder(path: Path, shape: _Shape) -> Batches:
    """Take each file of a folder as one batch."""
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise InputError(f"the folder '{path}' holds no batches; put .npz, .npy or .safetensors files in it")

    def start() -> Iterator[Batch]:
        for file in files:
            feeds = {name: array.read(slice(None)) for name, array in _read(file, shape).items()}
            yield shape.filled(feeds, f"'{file}'")

    return Batches(start, len(files))


def _read(path: Path, shape: _Shape) -> dict[str, _Stored]:
    """Open one file. Raises: InputError where it is missing, damaged or of an unknown kind."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot read '{path}' as data; give a .npz, .npy or .safetensors file, or a folder of them")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else path.open("rb") as file:
            if path.suffix == ".npz":
                return {name: _held(file[name]) for name in file.files}
            return {shape.single(f"'{path}'"): _held(np.load(file, allow_pickle=False))}
    except FileNotFoundError:
        raise InputError(f"no data at '{path}'; check the path") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, SafetensorError, AttributeError) as error:
        raise InputError(f"cannot read '{path}' as data: {error}; write it with numpy.savez or safetensors") from None


def _safetensors(path: Path) -> dict[str, _Stored]:
    file = safe_open(path, framework="numpy")
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {
        name: _Stored(tuple(part.get_shape()), lambda wanted, part=part: part[wanted if part.get_shape() else ...])
        for name, part in slices.items()
    }


def _iterable(data: Iterable[object], shape: _Shape) -> Batches:
    """Take ready batches as they come, and collect samples into batches; the first item shows which it is."""
    try:
        items = iter(data)
    except TypeError:
        kind = type(data).__name__
        raise InputError(f"cannot read {kind} as data; give a file, a folder or an iterable of batches") from None
    count = len(data) if hasattr(data, "__len__") else None
    first = next(items, None)
    if first is None:
        raise InputError("the data is empty; give at least one batch")
    extra = bool(getattr(data, "column_names", None))
    once = itertools.chain([first], items) if items is data else None
    samples = _is_sample(_named(first, shape, extra, 0), shape)

    def start() -> Iterator[Batch]:
        rows = (_named(item, shape, extra, index) for index, item in enumerate(once or data))
        for index, feeds in enumerate(_collated(rows, shape) if samples else rows):
            yield shape.filled(feeds, f"batch {index}")

    return Batches(start, -(-count // shape.size) if samples and count else count)


def _named(item: object, shape: _Shape, extra: bool, index: int) -> dict[str, object]:
    """Return an item by input names; columns of a dataset that are no inputs are left out."""
    if not isinstance(item, Mapping):
        return {shape.single(f"item {index} of the data"): item}
    return {name: value for name, value in item.items() if not extra or name in shape.specs}


def _is_sample(feeds: Mapping[str, object], shape: _Shape) -> bool:
    """Tell whether arrays lack the batch axis: every one has one axis less than its input."""
    check_names(feeds, shape.specs, "batch 0")
    ranks = {name: to_array(value, f"'{name}' in batch 0").ndim for name, value in feeds.items()}
    wanted = {name: len(spec.shape) for name, spec in shape.specs.items() if spec.shape}
    return bool(wanted) and all(ranks[name] == rank - 1 for name, rank in wanted.items())


def _collated(rows: Iterator[Mapping[str, object]], shape: _Shape) -> Iterator[Feeds]:
    """Stack samples into batches. Raises: InputError where their shapes differ."""
    index = 0
    while group := list(itertools.islice(rows, shape.size)):
        for at, row in enumerate(group):
            check_names(row, shape.specs, f"sample {index + at}")
        feeds = {}
        for name in shape.specs:
            arrays = [to_array(row[name], f"'{name}' in sample {index + at}") for at, row in enumerate(group)]
            sizes = {array.shape for array in arrays}
            if len(sizes) > 1:
                raise InputError(
                    f"samples {index} to {index + len(group) - 1} have '{name}' of shapes {_sizes(sizes)}; "
                    "pad them to one length, and mark the padding in the mask"
                )
            feeds[name] = np.stack(arrays)
        index += len(group)
        yield feeds


def _sizes(shapes: Iterable[Sequence[int]]) -> str:
    return " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
