"""Op: one node of the graph through total, typed accessors."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphclone.whole_numbers import plain_of

Values = tuple[np.ndarray, ...]

STANDARD_DOMAINS = ("", "ai.onnx", None)


@functools.cache
def is_standard(operator: str, opset: int) -> bool:
    """Tell whether an opset of the ONNX standard has an operator, and has not given it up.

    Example:
        >>> is_standard("Erf", 18), is_standard("Erfc", 18), is_standard("Upsample", 18)
        (True, False, False)
    """
    try:
        return not onnx.defs.get_schema(operator, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


@dataclass(slots=True)
class Op:
    """A node as the rules see it: what may be missing in ONNX is settled here, so nothing deeper asks again.

    Attributes: `axes` of each input (None where the input is absent or unknown), `values` of each input per
    probe (None where it depends on data), `output_values` likewise, `opset` of the node's domain.
    """

    node: gs.Node
    opset: int
    axes: list = field(default_factory=list)
    values: list = field(default_factory=list)
    output_values: Values | None = None

    @property
    def type(self) -> str:
        return self.node.op

    @property
    def domain(self) -> str:
        return "" if self.node.domain in STANDARD_DOMAINS else self.node.domain

    @property
    def real_type(self) -> str:
        """Return the type, or for an operator on whole numbers that of the float operator it stands for."""
        plain = plain_of(self.type, self.domain, self.node.attrs)
        return plain.type if plain else self.type

    @property
    def where(self) -> str:
        """Return how messages call this node: `Softmax node '/h.0/Softmax'`."""
        prefix = f"{self.domain}." if self.domain else ""
        return f"{prefix}{self.type} node '{self.node.name}'"

    @property
    def inputs(self) -> Sequence[gs.Tensor]:
        return self.node.inputs

    @property
    def output_count(self) -> int:
        return len(self.node.outputs)

    def has(self, slot: int) -> bool:
        """Tell whether the optional input is there."""
        return slot < len(self.node.inputs) and not self.node.inputs[slot].is_empty()

    def is_constant(self, slot: int) -> bool:
        """Tell whether the input is an initializer."""
        return self.has(slot) and isinstance(self.node.inputs[slot], gs.Constant)

    def wants(self, output: int) -> bool:
        """Tell whether the optional output is there."""
        return output < len(self.node.outputs) and not self.node.outputs[output].is_empty()

    def rank(self, slot: int) -> int:
        return len(self.axes[slot])

    def sizes(self, slot: int) -> list:
        """Return the sizes of an input, one entry per probe each."""
        return [axis.size for axis in self.axes[slot]]

    def attribute(self, name: str, default=None):
        """Return an attribute's value, or the default; tensors come as arrays."""
        value = self.node.attrs.get(name, default)
        return value.values if isinstance(value, gs.Constant) else value

    def axis(self, rank: int, default: int = 0, name: str = "axis") -> int:
        """Return an axis attribute counted from the front."""
        value = int(self.attribute(name, default))
        return value + rank if value < 0 else value

    def value(self, slot: int) -> Values | None:
        """Return what an integer or scalar input holds in each probe, or None."""
        return self.values[slot] if self.has(slot) and slot < len(self.values) else None

    def integers(self, name: str, slot: int) -> list[int] | None:
        """Return integers that older opsets keep in an attribute and newer ones in an input; None if unknown."""
        if name in self.node.attrs:
            return [int(entry) for entry in np.atleast_1d(self.attribute(name))]
        value = self.value(slot)
        if value is None or not all(np.array_equal(value[0], entry) for entry in value):
            return None
        return [int(entry) for entry in np.atleast_1d(value[0])]
