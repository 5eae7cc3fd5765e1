"""Weight: an immutable tensor that stays on disk, sliced and scaled lazily, until it is streamed out."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphclone.dtypes import bits, encoded, is_float, pack, packed_bytes
from graphclone.errors import InputError
from graphclone.external import ExternalData
from graphclone.sources import HeldSource, ProtoSource, Source

CHUNK_BYTES = 4 << 20
SAMPLE_BYTES = 64 << 10
SAMPLE_STRIPS = 16
MOST_REPEATED = 1 << 20
SENTINEL = 1e4  # no parameter is as large: such a number forbids, or marks, what it stands at


class Weight(LazyValues):
    """Describe a tensor as a stored array, the indices kept of each axis, and one factor.

    `take` and `scaled` compose without reading anything: ten of each still read every kept byte once, when the
    weight is loaded or streamed. graphsurgeon exports it through `tensor`, and copies it by reference.

    Example:
        >>> weight = Weight.of(np.arange(12, dtype=np.float32).reshape(3, 4))
        >>> weight.take(1, [0, 3]).take(0, [2]).scaled(0.5).load()
        array([[4. , 5.5]], dtype=float32)
    """

    def __init__(self, source: Source, picks: tuple[np.ndarray | None, ...] | None = None, factor: float = 1.0):
        """Use `Weight.of` or `Weight.from_proto`; `picks` holds the kept indices per stored axis, None for all."""
        self.source = source
        self.picks = picks or (None,) * len(source.shape)
        self.factor = factor
        self.onnx_dtype = source.onnx_dtype
        self.dtype = source.dtype
        self.shape = tuple(
            size if pick is None else len(pick) for size, pick in zip(source.shape, self.picks, strict=True)
        )
        self.nbytes = packed_bytes(math.prod(self.shape), self.onnx_dtype)

    @staticmethod
    def of(array: np.ndarray) -> "Weight":
        """Wrap an array in memory, without copying it; do not change it afterwards."""
        return Weight(HeldSource(np.asarray(array)))

    @staticmethod
    def from_proto(tensor: TensorProto, folder: Path | None = None) -> "Weight":
        """Wrap a proto's own data, or map the external file it names inside `folder`.

        Raises: InputError where the data is missing, is shorter or longer than shape and type need, or lies outside.
        """
        if tensor.data_location == TensorProto.EXTERNAL:
            return Weight(ExternalData(folder).source(tensor))
        return Weight(ProtoSource(tensor))

    @property
    def untouched(self) -> bool:
        """Whether nothing was taken or scaled, so that the stored bytes are the weight's bytes."""
        return self.factor == 1.0 and all(pick is None for pick in self.picks)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def take(self, axis: int, indices: Sequence[int] | np.ndarray) -> "Weight":
        """Keep `indices` of `axis`, in the order given, as `np.take` does; nothing is read.

        Raises: IndexError for an index or axis that the shape does not have.
        """
        if not -len(self.shape) <= axis < len(self.shape):
            raise IndexError(f"cannot take from axis {axis} of a weight of shape {list(self.shape)}")
        axis %= len(self.shape)
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(
                f"cannot take {indices.dtype} of shape {list(indices.shape)}; give a flat list of integers"
            )
        indices = indices.astype(np.int64, copy=False)
        size = self.shape[axis]
        outside = indices[(indices < 0) | (indices >= size)]
        if len(outside):
            raise IndexError(f"cannot take index {outside[0]} of axis {axis} of a weight of shape {list(self.shape)}")
        if len(indices) == size and np.array_equal(indices, np.arange(size)):
            return self
        picks = list(self.picks)
        picks[axis] = indices if picks[axis] is None else picks[axis][indices]
        return Weight(self.source, tuple(picks), self.factor)

    def scaled(self, factor: float) -> "Weight":
        """Multiply by `factor`: fp16, bf16 and fp8 in fp32, rounded once; factors of several calls multiply.

        Raises: InputError for integers, strings and booleans, and for a factor that is not finite.
        """
        if not is_float(self.onnx_dtype):
            name = TensorProto.DataType.Name(self.onnx_dtype)
            raise InputError(f"cannot scale a weight of type {name}: only floating point weights have a scale")
        if not math.isfinite(factor):
            raise InputError(f"cannot scale a weight by {factor}; give a finite number")
        return Weight(self.source, self.picks, self.factor * float(factor))

    def load(self) -> np.ndarray:
        """Return the array, of `shape` and `dtype`: a read-only view of an untouched weight, else a fresh array."""
        if self.untouched:
            view = self.source.array().view()
            view.flags.writeable = False
            return view
        loaded = np.empty(self.shape, self.dtype)
        flat = loaded.reshape(-1)
        start = 0
        for block in self._blocks():
            flat[start : start + block.size] = block.reshape(-1)
            start += block.size
        return loaded

    def chunks(self) -> Iterator[memoryview | bytes]:
        """Yield the bytes, row-major and little endian as `raw_data` holds them, a few MB at a time.

        What was read is handed back to the system after each chunk, so that a pass over a mapped file stays small.
        """
        if self.onnx_dtype == TensorProto.STRING:
            raise InputError("strings have no raw bytes: an ONNX file keeps them inside the proto")
        if bits(self.onnx_dtype) % 8:
            yield self.source.packed() if self.untouched else pack(self.load())
            return
        for block in self._blocks():
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data

    def sample(self, nbytes: int = SAMPLE_BYTES) -> bytes:
        """Return all bytes of a small weight, and of a large one about `nbytes` in even strips from start to end."""
        if self.onnx_dtype == TensorProto.STRING:
            return b"\0".join(bytes(item) for item in encoded(self.load()))[:nbytes]
        if self.nbytes <= nbytes:
            return b"".join(self.chunks())
        if bits(self.onnx_dtype) % 8:
            return b"".join(_strips(next(self.chunks()), nbytes))
        strip = max(1, nbytes // SAMPLE_STRIPS // self.dtype.itemsize)
        starts = [(self.size - strip) * index // (SAMPLE_STRIPS - 1) for index in range(SAMPLE_STRIPS)]
        flat = np.concatenate([np.arange(start, start + strip) for start in starts])
        return self.at(np.unravel_index(flat, self.shape)).tobytes()

    def at(self, coordinates: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the elements at `coordinates`, one integer array per axis, reading little else."""
        stored = tuple(
            index if pick is None else pick[index] for index, pick in zip(coordinates, self.picks, strict=True)
        )
        found = self._finish(self.source.array()[stored])
        self.source.release()
        return found

    @property
    def tensor(self) -> TensorProto:
        """Build the whole TensorProto, data included; graphsurgeon's exporter asks for it."""
        proto = self.header("")
        if self.onnx_dtype == TensorProto.STRING:
            proto.string_data.extend(encoded(self.load()))
        else:
            proto.raw_data = b"".join(self.chunks())
        return proto

    def header(self, name: str) -> TensorProto:
        """Build a TensorProto with name, type and dims, and no data."""
        return TensorProto(name=name, data_type=self.onnx_dtype, dims=self.shape)

    def __str__(self) -> str:
        return f"Weight(shape={list(self.shape)}, dtype={self.dtype})"

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield the kept elements in row-major order, in blocks of about `CHUNK_BYTES`."""
        limit = max(1, CHUNK_BYTES // self.dtype.itemsize)
        for block in _walk(self.source.array(), self.picks, limit):
            yield self._finish(block)
            self.source.release()

    def _finish(self, block: np.ndarray) -> np.ndarray:
        if self.factor == 1.0:
            return block
        wide = block.dtype if block.dtype.itemsize >= 8 else np.dtype(np.float32)
        return (block.astype(wide) * wide.type(self.factor)).astype(self.dtype)


def weight_of(constant: gs.Constant) -> Weight:
    """Return the Weight a graphsurgeon constant holds, wrapping the array that a user's own code put there.

    Example:
        >>> weight_of(gs.Constant("scale", np.ones((2, 3), np.float32))).shape
        (2, 3)
    """
    values = constant._values
    if isinstance(values, Weight):
        return values
    if isinstance(values, LazyValues):
        return Weight.from_proto(values.tensor)
    return Weight.of(values)


def repeated_axes(weight: Weight) -> tuple[int, ...]:
    """Return the axes along which a tensor repeats itself, as a mask does along batch and heads; it is read.

    Numbers that are the same throughout are no repetition but parameters at their start: zeros of position embeddings,
    ones of a scale; but for what no parameter is, what scores are where a mask forbids them. Tensors of more than a
    million entries are not looked at.

    Example:
        >>> repeated_axes(Weight.of(np.broadcast_to(np.tri(3, dtype=np.float32), (2, 3, 3))))
        (0,)
    """
    if not 1 < weight.size <= MOST_REPEATED or weight.onnx_dtype == TensorProto.STRING:
        return ()
    values = weight.load()
    wide = [axis for axis, size in enumerate(values.shape) if size > 1]
    found = tuple(axis for axis in wide if (values == values.take([0], axis)).all())
    uniform = is_float(weight.onnx_dtype) and len(found) == len(wide)
    return () if uniform and np.abs(values.flat[0]) < SENTINEL else found


def _strips(data: memoryview | bytes, nbytes: int) -> Iterator[bytes]:
    strip = nbytes // SAMPLE_STRIPS
    for index in range(SAMPLE_STRIPS):
        start = (len(data) - strip) * index // (SAMPLE_STRIPS - 1)
        yield bytes(data[start : start + strip])


def _walk(view: np.ndarray, picks: tuple[np.ndarray | None, ...], limit: int) -> Iterator[np.ndarray]:
    """Yield the picked elements of `view` in row-major blocks of at most `limit` elements."""
    kept = [size if pick is None else len(pick) for size, pick in zip(view.shape, picks, strict=True)]
    if math.prod(kept) == 0:
        return
    if math.prod(kept) <= limit:
        yield _gather(view, picks)
        return
    row = math.prod(kept[1:])
    step = max(1, limit // row)
    for start in range(0, kept[0], step):
        stop = min(start + step, kept[0])
        if row > limit:
            index = start if picks[0] is None else picks[0][start]
            yield from _walk(view[index], picks[1:], limit)
        elif picks[0] is None:
            yield _gather(view[start:stop], (None, *picks[1:]))
        else:
            yield _gather(view, (picks[0][start:stop], *picks[1:]))


def _gather(view: np.ndarray, picks: tuple[np.ndarray | None, ...]) -> np.ndarray:
    """Copy the picked elements: contiguous runs by slicing, single axes by take, several jointly."""
    slices = [_run(pick) for pick in picks]
    view = view[tuple(part or slice(None) for part in slices)]
    rest = [axis for axis, part in enumerate(slices) if part is None and picks[axis] is not None]
    for axis in rest if len(rest) == 1 else ():
        return np.take(view, picks[axis], axis=axis)
    if not rest:
        return view
    index = [picks[axis] if axis in rest else np.arange(size) for axis, size in enumerate(view.shape)]
    return view[np.ix_(*index)]


def _run(pick: np.ndarray | None) -> slice | None:
    """Return the slice that a contiguous ascending pick is, else None."""
    if pick is None or len(pick) == 0 or pick[-1] - pick[0] != len(pick) - 1:
        return None
    return slice(int(pick[0]), int(pick[-1]) + 1) if (np.diff(pick) == 1).all() else None
