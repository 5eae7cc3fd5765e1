"""Sources: where the bytes of a weight lie - in an array, in a proto, or in a range of a mapped file."""

import math
import mmap
from collections.abc import Iterable

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from graphclone.dtypes import bits, numpy_dtype, onnx_dtype_of, pack, packed_bytes
from graphclone.errors import InputError


class Source:
    """Stored bytes with a shape and a type; subclasses say where they lie."""

    def __init__(self, shape: Iterable[int], onnx_dtype: int):
        self.shape = tuple(int(size) for size in shape)
        if any(size < 0 for size in self.shape):
            raise InputError(f"a tensor has the shape {list(self.shape)}, with a negative size; export the model again")
        self.onnx_dtype = onnx_dtype
        self.dtype = numpy_dtype(onnx_dtype)

    def packed(self) -> memoryview | bytes:
        """Return the stored bytes as `raw_data` holds them."""
        raise NotImplementedError

    def array(self) -> np.ndarray:
        """Return the stored array, without copying where its type is a whole number of bytes."""
        if bits(self.onnx_dtype) % 8:
            header = TensorProto(data_type=self.onnx_dtype, dims=self.shape, raw_data=bytes(self.packed()))
            return numpy_helper.to_array(header)
        return np.frombuffer(self.packed(), self.dtype).reshape(self.shape)

    def release(self) -> None:
        """Give back the memory that reading took, where it can be read again."""


class HeldSource(Source):
    """An array in memory."""

    def __init__(self, array: np.ndarray):
        super().__init__(array.shape, onnx_dtype_of(array.dtype))
        self.held = array if array.dtype == self.dtype else array.astype(self.dtype)

    def packed(self) -> memoryview | bytes:
        return pack(self.held)

    def array(self) -> np.ndarray:
        return self.held


class ProtoSource(Source):
    """A TensorProto that holds its own data, in `raw_data` or in a typed field."""

    def __init__(self, proto: TensorProto):
        super().__init__(proto.dims, proto.data_type)
        self.proto = proto
        count = math.prod(self.shape)
        if proto.HasField("raw_data"):
            check_length(proto, len(proto.raw_data))
        elif _typed_count(proto) != _typed_needed(count, self.onnx_dtype):
            raise InputError(
                f"tensor '{proto.name}' holds {_typed_count(proto)} values, but its shape {list(self.shape)} needs "
                f"{_typed_needed(count, self.onnx_dtype)}; the file is damaged: export or download it again"
            )

    def packed(self) -> memoryview | bytes:
        return self.proto.raw_data if self.proto.HasField("raw_data") else pack(self.array())

    def array(self) -> np.ndarray:
        if self.proto.HasField("raw_data"):
            return super().array()
        if self.onnx_dtype == TensorProto.STRING:
            return np.array([bytes(item) for item in self.proto.string_data], dtype=object).reshape(self.shape)
        return numpy_helper.to_array(self.proto)


class MappedSource(Source):
    """A range of a mapped file."""

    def __init__(self, mapping: mmap.mmap, offset: int, shape: Iterable[int], onnx_dtype: int):
        super().__init__(shape, onnx_dtype)
        self.mapping = mapping
        self.offset = offset
        self.length = packed_bytes(math.prod(self.shape), onnx_dtype)

    def packed(self) -> memoryview | bytes:
        return memoryview(self.mapping)[self.offset : self.offset + self.length]

    def release(self) -> None:
        if self.length and hasattr(mmap, "MADV_DONTNEED"):
            start = self.offset - self.offset % mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_DONTNEED, start, self.offset + self.length - start)


class RowSource(Source):
    """One entry along the first axis of another source: a layer of stacked weights."""

    def __init__(self, stack: Source, row: int):
        super().__init__(stack.shape[1:], stack.onnx_dtype)
        self.stack = stack
        self.row = row

    def packed(self) -> memoryview | bytes:
        return pack(self.array())

    def array(self) -> np.ndarray:
        return self.stack.array()[self.row]

    def release(self) -> None:
        self.stack.release()


def check_length(proto: TensorProto, length: int) -> None:
    """Check that `length` bytes are what a tensor's shape and type need. Raises: InputError."""
    needed = packed_bytes(math.prod(proto.dims), proto.data_type)
    if length != needed:
        raise InputError(
            f"tensor '{proto.name}' holds {length} bytes, but its shape {list(proto.dims)} of "
            f"{TensorProto.DataType.Name(proto.data_type)} needs {needed}; the file is damaged: export it again"
        )


def _typed_count(proto: TensorProto) -> int:
    return len(getattr(proto, helper.tensor_dtype_to_field(proto.data_type)))


def _typed_needed(count: int, onnx_dtype: int) -> int:
    """Return the entries a typed field needs: two for a complex number, one byte for each pack of small numbers."""
    if onnx_dtype in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    return packed_bytes(count, onnx_dtype) if bits(onnx_dtype) < 8 else count
