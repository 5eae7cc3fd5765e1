"""Synthesise what a model is fed: ids, masks, positions and floats of two shapes, consistent across its inputs."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.axes.axis import Size
from graphclone.axes.typed import AxisTyping
from graphclone.calibration.feeds import Feeds
from graphclone.calibration.synthesis import synthesise as made_up
from graphclone.model import Model

SMALL = 1000  # the typing gives symbols of images and waves larger sizes
IMAGES = ((96, 128), (160, 64))
LENGTHS = ((6, 9), (8, 4), (10, 3), (12, 14))


def candidates(model: Model, typing: AxisTyping, seed: int = 0) -> Iterator[tuple[str, list[Feeds]]]:
    """Yield pairs of feeds to try, likeliest first, each with a note of what it had to give up.

    The sizes are the typing's, except that images and lengths are small first. The last try of each has batch one: some
    operators of onnxruntime run nothing larger. A model without symbolic sizes has one shape, and one probe a mask.
    """
    typed = _typed_sizes(model, typing)
    tried: list[dict[str, Size]] = []
    for sizes in (_shrunk(model, typed, images=True), _shrunk(model, typed, images=False), typed):
        for batch_one in (False, True):
            settled = {name: (1, 1) if batch_one and name in _batches(model) else size for name, size in sizes.items()}
            if settled in tried:
                continue
            tried.append(settled)
            note = "batch 1, because onnxruntime runs no larger one" if batch_one else ""
            yield note, [synthesise(model, typing, settled, probe, seed) for probe in (0, 1)]


def synthesise(model: Model, typing: AxisTyping, sizes: Mapping[str, Size], probe: int, seed: int = 0) -> Feeds:
    """Return feeds of one probe: the first has masks of ones, the second ends a row in padding.

    Ids are below what the typing says they index. A single truth value is true, then false. Integers that index
    nothing count as masks: they only compare.
    """
    upper = {name: min(axis.size) for name, axis in typing.index_axes.items()}
    masks = [
        tensor.name
        for tensor in model.inputs
        if tensor.name not in upper and not is_float(tensor) and "position" not in tensor.name and tensor.shape
    ]
    settled = {name: size[probe] for name, size in sizes.items()}
    feeds = made_up(model, settled, upper=upper, masks=masks, padded=probe == 1, seed=2 * seed + probe)
    switches = {name: np.full_like(array, probe == 0) for name, array in feeds.items() if _is_switch(array)}
    return feeds | switches


def _is_switch(array: np.ndarray) -> bool:
    """Tell whether an input chooses a branch, as `use_cache_branch` does."""
    return array.dtype == bool and array.ndim <= 1 and array.size == 1


def is_float(tensor: gs.Tensor) -> bool:
    """Tell whether a graph input holds real numbers; the types numpy lacks are all floats of few bits."""
    return tensor.dtype is None or np.dtype(tensor.dtype).kind not in "iubUSO"


def _symbol(tensor: gs.Tensor, axis: int) -> str:
    size = tensor.shape[axis]
    return size if isinstance(size, str) and size else f"{tensor.name}:{axis}"


def _typed_sizes(model: Model, typing: AxisTyping) -> dict[str, Size]:
    return {
        _symbol(tensor, i): axis.size
        for tensor in model.inputs
        for i, axis in enumerate(typing.types.get(tensor.name) or ())
    }


def _shrunk(model: Model, typed: Mapping[str, Size], images: bool) -> dict[str, Size]:
    """Exchange large sizes: of images (two dynamic axes) by multiples of 32, of others but waves by a few entries.

    Sizes written as arithmetic (`past + sequence`) are left out, to be computed from the others.
    """
    sizes = {name: size for name, size in typed.items() if name.isidentifier() or ":" in name}
    pictures, lengths = iter(IMAGES * 4), iter(LENGTHS * 4)
    for tensor in model.inputs:
        names = [_symbol(tensor, axis) for axis in range(len(tensor.shape or ()))]
        large = [name for name in names if name in sizes and min(sizes[name]) > SMALL and len(set(sizes[name])) > 1]
        is_image = images and is_float(tensor) and len(names) == 4 and names[2:] == large
        is_wave = is_float(tensor) and len(names) == 2
        for name in () if is_wave else large:
            sizes[name] = next(pictures if is_image else lengths)
    return sizes


def _batches(model: Model) -> set[str]:
    """Return the symbols of first axes."""
    return {_symbol(tensor, 0) for tensor in model.inputs if tensor.shape and isinstance(tensor.shape[0], str)}
