"""Layout: which axes of a tensor are batch and sequence, so that padding can be left out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from graphclone.errors import InputError

Shape = Sequence[int | str | None]
Masks = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Layout:
    """shape: names or sizes in one batch; axis: the measured one, from the front; batch, sequence: None where absent.

    batch and sequence are equal where one axis holds all tokens of the batch. mask: the input that marks its padding.
    """

    shape: tuple[int | str | None, ...]
    axis: int
    batch: int | None = None
    sequence: int | None = None
    mask: str | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int | str | None:
        """The size of the measured axis."""
        return self.shape[self.axis]

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes that are averaged over, in order."""
        return tuple(axis for axis in range(self.rank) if axis != self.axis)


@dataclass(frozen=True, slots=True)
class Scheme:
    """The sizes that tell axes apart, by name or number: of the batch, and the [batch, sequence] shape of each mask."""

    batch: int | str | None
    masks: Masks

    def fit(
        self,
        tensor: str,
        shape: Shape,
        axis: int,
        given: tuple[int | None, int | None] | None,
        fixed: Collection[int] = (),
    ) -> Layout:
        """Return the layout of a tensor of this shape; fixed are axes whose size does not depend on the batch.

        Raises: InputError where the tensor has no such axis.

        Example:
            >>> Scheme("b", {"mask": ("b", "s")}).fit("x", ("b", 12, "s", 64), -1, None)
            Layout(shape=('b', 12, 's', 64), axis=3, batch=0, sequence=2, mask='mask')
        """
        rank = len(shape)
        if not -rank <= axis < rank:
            raise InputError(f"cannot measure axis {axis} of '{tensor}', whose shape is {list(shape)}")
        axis %= rank
        if given is not None:
            return self._given(shape, axis, given)
        rows = [index for index in range(rank) if index != axis]
        moving = [index for index in rows if index not in fixed]
        first = next((index for index in moving if shape[index] == self.batch and self.batch is not None), None)
        for mask, (_, sequence) in self.masks.items():
            for index in rows if first is not None else ():
                if index != first and shape[index] == sequence and sequence is not None:
                    return Layout(tuple(shape), axis, first, index, mask)
        for mask, size in self.masks.items():
            for index in moving:
                if shape[index] in _products(*size):
                    return Layout(tuple(shape), axis, index, index, mask)
        return Layout(tuple(shape), axis, first)

    def _given(self, shape: Shape, axis: int, given: tuple[int | None, int | None]) -> Layout:
        batch, sequence = (None if index is None else index % len(shape) for index in given)
        if batch is None or sequence is None or not self.masks:
            return Layout(tuple(shape), axis, batch)
        sizes = {mask: _products(*size) if batch == sequence else (size[1],) for mask, size in self.masks.items()}
        fitting = [mask for mask, size in sizes.items() if shape[sequence] in size]
        return Layout(tuple(shape), axis, batch, sequence, (fitting or list(self.masks))[0])


def find_layout(
    tensor: str,
    axis: int,
    given: tuple[int | None, int | None] | None,
    declared: Shape | None,
    names: Scheme,
    sizes: Scheme,
    measured: Callable[[str], tuple[tuple[int, ...], Collection[int]]],
) -> Layout:
    """Return a layout by the names of sizes that the file declares, else by the sizes that a batch shows.

    names, sizes: what the batch and the masks are called, and how large they are in the first batch.
    measured: returns the shape of a tensor in the first batch, and its axes whose size does not depend on the batch; it
        is asked only where names do not decide.
    """
    if declared is not None and None not in declared:
        layout = names.fit(tensor, declared, axis, given)
        known = {names.batch, *(size for shape in names.masks.values() for size in shape)} - {None}
        decided = all(isinstance(declared[row], int) or declared[row] in known for row in layout.rows)
        if isinstance(layout.size, int) and (given is not None or layout.mask or decided):
            return layout
    shape, fixed = measured(tensor)
    return sizes.fit(tensor, shape, axis, given, fixed)


def _products(batch: int | str | None, sequence: int | str | None) -> tuple[int | str, ...]:
    """Return what an axis is called, or how large it is, that holds all tokens of a batch.

    Example:
        >>> _products("b", "s"), _products(3, 5)
        (('b*s', 's*b'), (15,))
    """
    if isinstance(batch, str) and isinstance(sequence, str):
        return f"{batch}*{sequence}", f"{sequence}*{batch}"
    if isinstance(batch, int) and isinstance(sequence, int):
        return (batch * sequence,)
    return ()
