"""Element types: what ONNX calls them, what numpy calls them, and the bytes they take in a file."""

import functools

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from graphclone.errors import InputError


@functools.cache
def numpy_dtype(onnx_dtype: int) -> np.dtype:
    """Return the numpy type (of ml_dtypes for bf16, fp8 and the 4-bit ones) of an ONNX element type.

    Raises: InputError for a number that this onnx release does not know.
    """
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype))
    except KeyError:
        raise InputError(
            f"element type {onnx_dtype} is unknown to onnx {onnx.__version__}; install a newer onnx"
        ) from None


@functools.cache
def onnx_dtype_of(dtype: np.dtype) -> int:
    """Return the ONNX element type of a numpy type; text of any length is STRING."""
    if dtype.kind in "USO":
        return TensorProto.STRING
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(dtype.newbyteorder("=")))
    except (KeyError, ValueError):
        raise InputError(f"ONNX has no element type for numpy's {dtype}; convert the array first") from None


@functools.cache
def bits(onnx_dtype: int) -> int:
    """Return the bits one element takes in `raw_data`: 4 for INT4, 16 for BFLOAT16."""
    if onnx_dtype == TensorProto.STRING:
        return 8 * np.dtype(object).itemsize
    return len(numpy_helper.from_array(np.zeros(8, numpy_dtype(onnx_dtype))).raw_data)


def packed_bytes(count: int, onnx_dtype: int) -> int:
    """Return the bytes `count` elements take in `raw_data`."""
    return -(-count * bits(onnx_dtype) // 8)


def is_float(onnx_dtype: int) -> bool:
    """Tell whether a type is real or complex floating point."""
    return numpy_dtype(onnx_dtype).kind in "fc" or "FLOAT" in TensorProto.DataType.Name(onnx_dtype)


def holds_weights(onnx_dtype: int) -> bool:
    """Tell whether weights are stored in a type: real numbers, or whole ones of at most eight bits.

    Example:
        >>> [holds_weights(kind) for kind in (TensorProto.BFLOAT16, TensorProto.UINT4, TensorProto.INT64)]
        [True, True, False]
    """
    if is_float(onnx_dtype):
        return True
    return onnx_dtype not in (TensorProto.STRING, TensorProto.BOOL) and bits(onnx_dtype) <= 8


def integer_range(onnx_dtype: int) -> tuple[int, int]:
    """Return the least and the largest number of an integer type.

    Example:
        >>> integer_range(TensorProto.UINT8), integer_range(TensorProto.INT4)
        ((0, 255), (-8, 7))
    """
    count = 2 ** bits(onnx_dtype)
    unsigned = TensorProto.DataType.Name(onnx_dtype).startswith("U")
    return (0, count - 1) if unsigned else (-count // 2, count // 2 - 1)


def pack(array: np.ndarray) -> bytes:
    """Return an array's bytes as `raw_data` holds them."""
    return numpy_helper.from_array(np.ascontiguousarray(array)).raw_data


def encoded(array: np.ndarray) -> list[bytes]:
    """Return the strings of an array as UTF-8 bytes."""
    return [item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()]
