"""Feeds: check that arrays are what a model's inputs want, before onnxruntime says it less clearly."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graphclone.errors import InputError
from graphclone.model import Model

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What one graph input wants; a size is a number, a name, or None where the file does not say."""

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        """Return how messages describe it: `int64 ['batch', 'sequence']`."""
        shape = "" if self.shape is None else f" [{', '.join(str(size or '?') for size in self.shape)}]"
        return f"{self.dtype or 'any type'}{shape}"

    def accepted(self, value: object, where: str) -> np.ndarray:
        """Return a value as an array of the input's type, rank and static sizes. Raises: InputError."""
        array = to_array(value, f"'{self.name}' in {where}")
        if self.shape is not None and array.ndim != len(self.shape):
            raise InputError(
                f"'{self.name}' in {where} has shape {list(array.shape)}, of rank {array.ndim}; "
                f"the model wants {self}, of rank {len(self.shape)}"
            )
        for axis, (size, wanted) in enumerate(zip(array.shape, self.shape or (), strict=False)):
            if isinstance(wanted, int) and size != wanted:
                raise InputError(
                    f"'{self.name}' in {where} has size {size} at axis {axis}; "
                    f"the model is exported for exactly {wanted} ({self})"
                )
        if array.size == 0 and not (self.shape and 0 in self.shape):
            raise InputError(f"'{self.name}' in {where} is empty: its shape is {list(array.shape)}; give a sample")
        return self._cast(array, where)

    def _cast(self, array: np.ndarray, where: str) -> np.ndarray:
        if self.dtype is None or array.dtype == self.dtype:
            return array
        if kind(array.dtype) == "f" and kind(self.dtype) == "f":
            return array.astype(self.dtype)
        if kind(array.dtype) == "i" and kind(self.dtype) == "i":
            cast = array.astype(self.dtype)
            if np.array_equal(cast, array):
                return cast
            raise InputError(
                f"'{self.name}' in {where} holds values from {array.min()} to {array.max()}, "
                f"which the model's {self.dtype} cannot hold"
            )
        raise InputError(
            f"'{self.name}' in {where} has type {array.dtype}; the model wants {self.dtype}: "
            f"convert it where the data is made, with .astype('{self.dtype}')"
        )


def input_specs(model: Model) -> dict[str, InputSpec]:
    """Return what each input of a model wants, in the graph's order. Raises: InputError for inputs that are no tensors.

    Example:
        >>> print(input_specs(model)["ids"])
        int64 [batch, time]
    """
    specs = {}
    for tensor in model.inputs:
        if hasattr(tensor, "type_proto"):
            raise InputError(f"input '{tensor.name}' is a {tensor.type}; only tensors can be fed: export it without")
        dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else None
        specs[tensor.name] = InputSpec(tensor.name, dtype, tuple(tensor.shape) if tensor.shape is not None else None)
    return specs


def checked(feeds: Mapping[str, object], specs: Mapping[str, InputSpec], where: str) -> Feeds:
    """Return feeds as arrays that the model accepts.

    where: how messages call this batch, `batch 3` or `'data.npz'`.
    Raises: InputError for an input that is missing, unknown, empty, or of another type, rank or static size.

    Example:
        >>> specs = {"ids": InputSpec("ids", np.dtype(np.int64), ("batch", "sequence"))}
        >>> checked({"ids": np.array([[7, 2]], np.int32)}, specs, "batch 0")["ids"].dtype
        dtype('int64')
    """
    check_names(feeds, specs, where)
    return {name: spec.accepted(feeds[name], where) for name, spec in specs.items()}


def check_names(names: Mapping[str, object], specs: Mapping[str, InputSpec], where: str) -> None:
    """Raise InputError where an input is missing from `names`, or a name is no input."""
    for name in names:
        if name not in specs:
            close = difflib.get_close_matches(str(name), specs, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(map(repr, specs))}"
            raise InputError(f"{where} holds '{name}', which is no input of the model; {hint}")
    for name, spec in specs.items():
        if name not in names:
            raise InputError(f"{where} lacks the input '{name}' ({spec}); add an array of that name")


def to_array(value: object, where: str) -> np.ndarray:
    """Return a numpy array of what a user gave: an array, a torch tensor, or nested lists. Raises: InputError."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no array: {error}; pad or cut all samples to one length") from None
    if kind(array.dtype) == "?":
        raise InputError(f"{where} has type {array.dtype}; give numbers, as a numpy array or torch tensor")
    return array


def kind(dtype: np.dtype) -> str:
    """Return 'f' for floating point, also of 16 and 8 bits, 'i' for integers and booleans, '?' for anything else."""
    if dtype.kind in "iub":
        return "i"
    return "f" if dtype.kind == "f" or "float" in dtype.name else "?"
