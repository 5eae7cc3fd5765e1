"""Taps: what calibration is asked to measure."""

from dataclasses import dataclass

AxisPair = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Tap:
    """Ask for mean x, mean |x| and mean x^2 of each index of one axis, over all other axes of a float tensor.

    layout: its batch and sequence axis, None where it lacks one, both the same where one axis holds all tokens.
        Left out, it is read from the names of sizes, else from the sizes of the first batch.

    Example:
        >>> Tap("h.0.mlp.gelu", axis=-1)
        Tap(tensor='h.0.mlp.gelu', axis=-1, layout=None)
    """

    tensor: str
    axis: int = -1
    layout: AxisPair | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Ask how much a block or half block f changes each token: ||f(x)|| / ||x + f(x)||, and cos(x, x + f(x)).

    entry, exit: the tensors that hold x and x + f(x); axis: the hidden one.

    Example:
        >>> Span("blocks.0", "embedding", "h.0.out").axis
        -1
    """

    name: str
    entry: str
    exit: str
    axis: int = -1
    layout: AxisPair | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """Ask for the second moments E[x x^T] over one axis: a square matrix, at the price of a matrix product per batch.

    Example:
        >>> Moment("h.0.mlp.gelu").axis
        -1
    """

    tensor: str
    axis: int = -1
    layout: AxisPair | None = None
