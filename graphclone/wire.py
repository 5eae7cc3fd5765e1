"""Wire: the big tensors of a serialized ONNX model are found and written in place, without parsing or copying them.

A ModelProto on disk is nested length-delimited fields (https://protobuf.dev/programming-guides/encoding/). `split`
walks just the path model > graph > initializer > raw_data, so that a 2 GB file is mapped rather than held three times;
`write` streams the same layout.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from onnx import ModelProto, TensorProto

from graphclone.weights import Weight

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
SMALL_BYTES = 1024

Ranges = dict[int, tuple[int, int]]


class WireError(ValueError):
    """Bytes that are no protobuf, or end too early; the message says at which byte."""


def split(data: Sequence[int], smallest: int = SMALL_BYTES) -> tuple[bytes, Ranges]:
    """Return a serialized model without the raw data of its big initializers, and where that data lies.

    data: the whole file, mapped or in memory.
    smallest: raw data below this many bytes stays where it is.
    The ranges are {index of the initializer: (offset, length)}. Raises: WireError.
    """
    ranges: Ranges = {}
    count = 0
    model = _Copier(data)
    for number, start, value, stop in _fields(data, 0, len(data)):
        if number != MODEL_GRAPH:
            continue
        graph = _Copier(data, value)
        for inner, inner_start, inner_value, inner_stop in _fields(data, value, stop):
            if inner != GRAPH_INITIALIZER:
                continue
            tensor = _Copier(data, inner_value)
            for field, field_start, field_value, field_stop in _fields(data, inner_value, inner_stop):
                if field == TENSOR_RAW_DATA and field_stop - field_value >= smallest:
                    ranges[count] = (field_value, field_stop - field_value)
                    tensor.replace(field_start, field_stop, b"")
            graph.replace(inner_start, inner_stop, _delimited(GRAPH_INITIALIZER, tensor.finish(inner_stop)))
            count += 1
        model.replace(start, stop, _delimited(MODEL_GRAPH, graph.finish(stop)))
    return model.finish(len(data)), ranges


def write(file: BinaryIO, proto: ModelProto, initializers: Sequence[tuple[TensorProto, Weight | None]]) -> None:
    """Write a model whose graph has no initializers yet, streaming each weight into its place.

    initializers: headers in order, each with the Weight that is its raw data, or None where the header is complete.
    """
    headers = [header.SerializeToString(deterministic=True) for header, _ in initializers]
    weights = [weight for _, weight in initializers]
    prefixes = [
        header if weight is None else header + _varint(TENSOR_RAW_DATA << 3 | 2) + _varint(weight.nbytes)
        for header, weight in zip(headers, weights, strict=True)
    ]
    sizes = [len(prefix) + (weight.nbytes if weight else 0) for prefix, weight in zip(prefixes, weights, strict=True)]
    openings = [_varint(GRAPH_INITIALIZER << 3 | 2) + _varint(size) for size in sizes]
    graph = proto.graph.SerializeToString(deterministic=True)
    rest = ModelProto()
    rest.CopyFrom(proto)
    rest.ClearField("graph")
    file.write(rest.SerializeToString(deterministic=True))
    total = len(graph) + sum(map(len, openings)) + sum(sizes)
    file.write(_varint(MODEL_GRAPH << 3 | 2) + _varint(total) + graph)
    for opening, prefix, weight in zip(openings, prefixes, weights, strict=True):
        file.write(opening + prefix)
        for chunk in weight.chunks() if weight else ():
            file.write(chunk)


class _Copier:
    """Copies a range of bytes, with some inner ranges replaced."""

    def __init__(self, data: Sequence[int], start: int = 0):
        self.data = data
        self.start = start
        self.parts: list[bytes] = []

    def replace(self, start: int, stop: int, replacement: bytes) -> None:
        self.parts += (bytes(self.data[self.start : start]), replacement)
        self.start = stop

    def finish(self, stop: int) -> bytes:
        return b"".join((*self.parts, bytes(self.data[self.start : stop])))


def _fields(data: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, start, value start, stop) of each field; numbers of other than length-delimited ones are 0."""
    position = start
    while position < stop:
        field = position
        key, position = _read_varint(data, position, stop)
        kind, number = key & 7, key >> 3
        if number == 0:
            raise WireError(f"byte {field} starts no protobuf field")
        value = position
        if kind == 2:
            length, value = _read_varint(data, position, stop)
            position = value + length
        elif kind == 0:
            _, position = _read_varint(data, position, stop)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise WireError(f"byte {field} starts no protobuf field")
        if position > stop:
            raise WireError(f"the field at byte {field} needs {position - stop} bytes more than there are")
        yield number if kind == 2 else 0, field, value, position


def _read_varint(data: Sequence[int], position: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while position < stop and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise WireError(f"byte {position} ends in the middle of a number")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes((*parts, value))


def _delimited(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content
