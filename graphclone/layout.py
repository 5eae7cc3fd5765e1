"""Layout: which weights go to an external data file, and at which offsets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

from onnx import TensorProto

from graphclone.weights import Weight
from graphclone.wire import SMALL_BYTES

ALIGNMENT = 64
PAGE_ALIGNMENT = 4096


@dataclass(frozen=True)
class Layout:
    """Place weights one after another; offsets are multiples of 64, of big weights multiples of a page.

    placed: (offset, weight) in order; embedded: those that stay inside the proto (small values and strings).
    """

    placed: tuple[tuple[int, Weight], ...]
    embedded: tuple[tuple[TensorProto, Weight], ...]

    @staticmethod
    def of(stored: Iterable[tuple[TensorProto, Weight]], location: str) -> "Layout":
        """Give each weight its place, and write that place into its TensorProto."""
        placed, embedded = [], []
        end = 0
        for header, weight in stored:
            if weight.onnx_dtype == TensorProto.STRING or weight.nbytes < SMALL_BYTES:
                embedded.append((header, weight))
                continue
            alignment = PAGE_ALIGNMENT if weight.nbytes >= PAGE_ALIGNMENT else ALIGNMENT
            offset = -(-end // alignment) * alignment
            end = offset + weight.nbytes
            placed.append((offset, weight))
            header.data_location = TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
                header.external_data.add(key=key, value=str(value))
        return Layout(tuple(placed), tuple(embedded))

    def write(self, file: BinaryIO) -> None:
        """Stream the placed weights, with zeros between them."""
        end = 0
        for offset, weight in self.placed:
            file.write(bytes(offset - end))
            for chunk in weight.chunks():
                file.write(chunk)
            end = offset + weight.nbytes
