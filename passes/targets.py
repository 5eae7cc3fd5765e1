"""Read target sizes: a number, a number per stack, or a list with one entry per kept block."""

from collections.abc import Mapping, Sequence

from graphclone.blocks import Stack
from graphclone.errors import CutError

Target = int | Sequence[int] | Mapping[str, object] | None


def target_of(value: Target, stack: Stack, stacks: Sequence[Stack], what: str) -> int | tuple[int, ...] | None:
    """Return a stack's share of a target; None where the target does not speak of it.

    Raises: CutError for a stack that does not exist, and for sizes that are not positive.
    """
    if isinstance(value, Mapping):
        names = [s.prefix.rstrip(".") for s in stacks]
        for name in value:
            if name.rstrip(".") not in names:
                known = ", ".join(n or "(one stack: give a plain number)" for n in names)
                raise CutError(f"{what}: no stack is called '{name}'; the stacks are {known}")
        value = next((v for name, v in value.items() if name.rstrip(".") == stack.prefix.rstrip(".")), None)
    if value is None:
        return None
    entries = value if isinstance(value, (list, tuple)) else (value,)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise CutError(f"{what}: {entry!r} is not a whole number; write for example {what}=384")
        if entry < 1:
            raise CutError(f"{what}: {entry} is not a size; give at least 1")
    return tuple(entries) if isinstance(value, (list, tuple)) else value


def per_block(value: int | tuple[int, ...] | None, kept: Sequence[int], what: str) -> list[int | None]:
    """Return one target per kept block. Raises CutError where a list has another length."""
    if isinstance(value, tuple):
        if len(value) != len(kept):
            raise CutError(f"{what} lists {len(value)} sizes, but {len(kept)} blocks are kept; give one per kept block")
        return list(value)
    return [value] * len(kept)
