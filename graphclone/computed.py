"""Computed: a weight's values that are made when they are read, and forgotten after."""

import weakref
from collections.abc import Callable, Sequence

import numpy as np

from graphclone.dtypes import onnx_dtype_of
from graphclone.sources import Source
from graphclone.weights import Weight


class Computed(Source):
    """An array behind a function; it is in memory as long as somebody reads it.

    Example:
        >>> base = Weight.of(np.ones((2, 3), np.float32))
        >>> computed((3, 2), base.dtype, lambda: base.load().T).take(0, [1]).load()
        array([[1., 1.]], dtype=float32)
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, make: Callable[[], np.ndarray]):
        super().__init__(shape, onnx_dtype_of(np.dtype(dtype)))
        self.make = make
        self.held: weakref.ref[np.ndarray] | None = None

    def array(self) -> np.ndarray:
        array = self.held() if self.held is not None else None
        if array is None:
            array = np.array(self.make(), order="C").reshape(self.shape)
            self.held = weakref.ref(array)
        return array

    def packed(self) -> memoryview | bytes:
        return memoryview(self.array().reshape(-1).view(np.uint8))


def computed(shape: Sequence[int], dtype: np.dtype, make: Callable[[], np.ndarray]) -> Weight:
    """Return a weight whose values a function makes when they are read."""
    return Weight(Computed(shape, dtype, make))
