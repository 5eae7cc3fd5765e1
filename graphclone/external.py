"""External data: the files beside a model that hold its weights, confined to the model's folder and mapped once."""

import math
import mmap
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import TensorProto

from graphclone.dtypes import packed_bytes
from graphclone.errors import InputError
from graphclone.sources import MappedSource, ProtoSource, Source


class ExternalData:
    """Find what TensorProtos store in external files, mapping each file once.

    A location must be relative, without `..`; a link in it may end only inside `folder` or in the folder of the
    model file's own resolved path, as in a Hugging Face cache, where `model.onnx` and `model.onnx_data` are links
    into `../../blobs/`.
    """

    def __init__(self, folder: Path | None, model_path: Path | None = None):
        self.folder = folder
        self.model_name = model_path.name if model_path else "the model"
        self.allowed = [] if folder is None else [folder.resolve()]
        if model_path is not None:
            self.allowed.append(model_path.resolve().parent)
        self.mappings: dict[str, mmap.mmap | None] = {}

    def source(self, tensor: TensorProto) -> Source:
        """Map a tensor's range. Raises: InputError for a missing, short or forbidden file, or a wrong range."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        mapping = self._map(location, tensor.name)
        available = len(mapping) if mapping else 0
        needed = packed_bytes(math.prod(tensor.dims), tensor.data_type)
        offset = self._number(entries.get("offset", "0"), "offset", tensor.name)
        length = self._number(entries.get("length") or str(needed), "length", tensor.name)
        if length != needed:
            raise InputError(
                f"initializer '{tensor.name}' of {self.model_name} needs {needed} bytes for shape {list(tensor.dims)}, "
                f"but names {length} bytes of '{location}'; export the model again"
            )
        if offset + length > available:
            raise InputError(
                f"'{location}' has {available} bytes, but initializer '{tensor.name}' of {self.model_name} lies at "
                f"bytes {offset} to {offset + length}; the file is truncated or of another model: copy it again"
            )
        if mapping is None:
            return ProtoSource(TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=b""))
        return MappedSource(mapping, offset, tensor.dims, tensor.data_type)

    def _map(self, location: str, name: str) -> mmap.mmap | None:
        if location not in self.mappings:
            self.mappings[location] = map_file(self._resolve(location, name))
        return self.mappings[location]

    def _resolve(self, location: str, name: str) -> Path:
        where = f"external data '{location}' of initializer '{name}'"
        if self.folder is None:
            raise InputError(f"cannot find {where}: a model in memory has no folder; give one")
        windows = PureWindowsPath(location)
        outside = PurePosixPath(location).is_absolute() or windows.is_absolute() or windows.drive or windows.root
        if not location or outside or ".." in windows.parts or "\0" in location:
            raise InputError(
                f"refusing {where}: it must be a relative path inside the model's folder, without '..'; "
                "put the data file beside the model"
            )
        path = self.folder / location
        resolved = Path(os.path.realpath(path))
        if not any(resolved.is_relative_to(folder) for folder in self.allowed):
            raise InputError(f"refusing {where}: the link leads out of the model's folder, to '{resolved}'")
        try:
            mode = os.stat(resolved).st_mode
        except OSError:
            raise InputError(f"cannot find {where}: no file '{path}'; copy it beside {self.model_name}") from None
        if not stat.S_ISREG(mode):
            raise InputError(f"cannot read {where}: '{path}' is not a file")
        return resolved

    @staticmethod
    def _number(text: str, what: str, name: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"external data of initializer '{name}' has the {what} '{text}'; it must be a number >= 0")
        return int(text)


def map_file(path: Path) -> mmap.mmap | None:
    """Map a file for reading; an empty file, which cannot be mapped, gives None."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
