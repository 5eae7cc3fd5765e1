"""Reader: a model file becomes a proto without its big tensors, or an error that says what the file is instead."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto, OperatorSetIdProto, TensorProto, inliner
from onnx.helper import tensor_dtype_to_field

from graphclone import wire
from graphclone.errors import InputError
from graphclone.external import ExternalData, map_file
from graphclone.sources import MappedSource, ProtoSource, Source, check_length
from graphclone.weights import Weight

OLDEST_OPSET = 9

FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "a web page; download the file itself (on Hugging Face: the 'resolve' address)"),
    (b"<html", "a web page; download the file itself (on Hugging Face: the 'resolve' address)"),
    (b"pk\x03\x04", "a zip archive or a PyTorch checkpoint; export the model to ONNX first (torch.onnx.export)"),
    (b"\x80", "a Python pickle; export the model to ONNX first (torch.onnx.export)"),
    (b"\x89hdf", "an HDF5 file; export the Keras model to ONNX first (model.export)"),
    (b"gguf", "a GGUF file; export the original model to ONNX first"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)


class WeightReader:
    """Turn each TensorProto of one model into a Weight: from a mapped file, or from the proto itself."""

    def __init__(self, external: ExternalData, cut_out: Mapping[str, Source]):
        """cut_out: the main graph's initializers whose data was left in the file, by name."""
        self.external = external
        self.cut_out = cut_out

    def __call__(self, tensor: TensorProto) -> Weight:
        """Return the weight. Raises: InputError where its data is missing, of the wrong length, or out of bounds."""
        if tensor.data_location == TensorProto.EXTERNAL:
            return Weight(self.external.source(tensor))
        if tensor.name in self.cut_out and not _has_data(tensor):
            return Weight(self.cut_out[tensor.name])
        return Weight(ProtoSource(tensor))


def read_file(path: Path) -> tuple[ModelProto, WeightReader]:
    """Map a model file; return its proto without big tensors, and what reads its weights.

    Raises: InputError where there is no such file, it is no ONNX model, or it is truncated.
    """
    _check_is_file(path)
    mapping = map_file(path)
    if mapping is None:
        raise InputError(f"'{path}' is empty; download or export the model again")
    try:
        data, ranges = wire.split(mapping)
        proto = ModelProto.FromString(data)
    except (wire.WireError, DecodeError) as error:
        raise InputError(_diagnose(path, mapping[:4096], str(error))) from None
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise InputError(_diagnose(path, mapping[:4096], "it has no graph"))
    cut_out = {}
    for index, (offset, length) in ranges.items():
        tensor = proto.graph.initializer[index]
        check_length(tensor, length)
        cut_out[tensor.name] = MappedSource(mapping, offset, tensor.dims, tensor.data_type)
    return proto, WeightReader(ExternalData(path.parent, path), cut_out)


def check_model(proto: ModelProto, name: str) -> None:
    """Check what every later step relies on. Raises: InputError for opsets before 9 or none at all."""
    opset = opset_of(proto)
    if opset is None:
        raise InputError(f"{name} does not say which ONNX opset it uses; export it again with opset 17 or later")
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{name} uses ONNX opset {opset}, and graphclone reads {OLDEST_OPSET} and later; export it again, or "
            "convert it with onnx.version_converter.convert_version(model, 17)"
        )


def opset_of(proto: ModelProto) -> int | None:
    """Return the version of the standard opset that a model imports."""
    return next((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), None)


def inlined(proto: ModelProto, name: str) -> ModelProto:
    """Return the model with calls of its local functions replaced by their bodies."""
    if not proto.functions:
        return proto
    proto = _with_one_version(proto)
    try:
        result = inliner.inline_local_functions(proto, convert_version=False)
        if result.functions:
            result = inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:  # the C++ inliner raises what it likes
        raise InputError(f"cannot inline the functions of {name}: {error}; export the model without them") from error
    if result.functions:
        raise InputError(
            f"cannot inline function '{result.functions[0].name}' of {name}: it uses another opset than the model; "
            "export the model without functions"
        )
    return result


def _with_one_version(proto: ModelProto) -> ModelProto:
    """Return the model with its functions' own domains imported at one version.

    The version of a domain that only the model's functions define says nothing, yet the inliner leaves calls alone
    where the model and a function's body state different ones.
    """
    stated = {item.domain: item.version for item in proto.opset_import}
    own = {function.domain for function in proto.functions} - {"", "ai.onnx"}

    def differs(item: OperatorSetIdProto) -> bool:
        return item.domain in own and item.version != stated.get(item.domain, item.version)

    if not any(differs(item) for function in proto.functions for item in function.opset_import):
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    for function in copy.functions:
        for item in function.opset_import:
            if differs(item):
                item.version = stated[item.domain]
    return copy


def _check_is_file(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"no file at '{path}'; check the path") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        found = sorted(item.name for item in path.glob("*.onnx"))
        hint = f"name a file in it: {', '.join(found[:5])}" if found else "it holds no .onnx file; name the model file"
        raise InputError(f"'{path}' is a folder; {hint}")
    if not stat.S_ISREG(mode):
        raise InputError(f"'{path}' is a device or pipe; name a model file")


def _diagnose(path: Path, start: bytes, reason: str) -> str:
    head = start.lstrip().lower()
    for magic, what in FOREIGN:
        if head.startswith(magic) or start.startswith(magic):
            return f"'{path}' is {what}"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30:
        return f"'{path}' is a safetensors file, which holds weights without a graph; export the model to ONNX first"
    if start[4:8] == b"ORTM":
        return f"'{path}' is an .ort file; use the .onnx file it was made from"
    if start[4:8] == b"TFL3":
        return f"'{path}' is a TensorFlow Lite file; convert the original model with tf2onnx"
    if start[:1] == b"\x08":
        return f"'{path}' is a damaged or truncated ONNX file ({reason}); download or export it again"
    return f"'{path}' is not an ONNX model ({reason}); export one with torch.onnx.export or optimum"


def _has_data(tensor: TensorProto) -> bool:
    """Tell whether a proto has values of its own, in whichever field, or needs none."""
    if tensor.HasField("raw_data") or 0 in tensor.dims:
        return True
    return bool(getattr(tensor, tensor_dtype_to_field(tensor.data_type)))
