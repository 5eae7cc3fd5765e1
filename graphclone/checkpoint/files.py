"""Read and write the weights of a checkpoint, where they lie: safetensors, sharded too, and files of `torch.save`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import StringStringEntryProto, TensorProto

from graphclone.errors import InputError
from graphclone.external import ExternalData
from graphclone.weights import Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX, PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
LARGEST_HEADER = 100 << 20
TYPES = {
    "F64": "DOUBLE", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64", "I32": "INT32",
    "I16": "INT16", "I8": "INT8", "U8": "UINT8", "U16": "UINT16", "U32": "UINT32", "U64": "UINT64", "BOOL": "BOOL",
    "F8_E4M3": "FLOAT8E4M3FN", "F8_E5M2": "FLOAT8E5M2",
}  # fmt: skip
CODES = {TensorProto.DataType.Value(name): code for code, name in TYPES.items()}
PICKLED = (".bin", ".pt", ".pth")
"""Endings of what `torch.save` writes."""
OTHERS = (*PICKLED, ".ckpt", ".h5", ".msgpack", ".ot", ".gguf")
"""Endings of other weights."""


@dataclass
class Checkpoint:
    """Tensors by name, the file each lies in, and the config; `folder` is where other files lie, or None."""

    tensors: dict[str, Weight]
    file_of: dict[str, str]
    config: dict | None = None
    folder: Path | None = None
    notes: dict[str, dict[str, str]] = field(default_factory=dict)  # of each file


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a folder with safetensors and maybe a config.json, or one .safetensors file; weights stay on disk.

    Files of `torch.save` are read as tensors alone where there are no others; they become safetensors.
    Raises: InputError for what is missing, damaged, or would run code when it is read.
    """
    path = Path(path)
    if path.is_file():
        found = Checkpoint({}, {})
        (_read_pickled if path.suffix in PICKLED else _read_file)(path, found)
        return found
    if not path.is_dir():
        raise InputError(f"cannot read the checkpoint '{path}': there is no such folder or file")
    files = _listed(path / INDEX) or [SINGLE] * (path / SINGLE).is_file()
    files = files or sorted(p.name for p in path.glob("*.safetensors"))
    files = files or _listed(path / PICKLED_INDEX) or [PICKLED_SINGLE] * (path / PICKLED_SINGLE).is_file()
    if not files:
        other = next((p.name for p in sorted(path.iterdir()) if p.suffix in OTHERS), None)
        seen = f"it has '{other}', which is not read from a folder" if other else "it has no weights"
        raise InputError(f"'{path}' has no .safetensors file ({seen}); save the model with save_pretrained() first")
    config = path / "config.json"
    found = Checkpoint({}, {}, _json(config) if config.is_file() else None, path)
    for name in files:
        if Path(name).name != name:
            raise InputError(f"the index in '{path}' names '{name}', which is not a file of its folder")
        (_read_pickled if Path(name).suffix in PICKLED else _read_file)(path / name, found)
    return found


def _listed(index: Path) -> list[str]:
    """Return the files of a sharded checkpoint, none where there is no index."""
    places = _json(index).get("weight_map", {}) if index.is_file() else {}
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"'{index}' does not say in which file each tensor lies; copy it again")
    return sorted(set(places.values()))


def _read_pickled(path: Path, found: Checkpoint) -> None:
    """Read what `torch.save` wrote; it is written as safetensors."""
    from graphclone.pytorch.pretrained import arrays_of

    file = path.with_suffix(".safetensors").name.replace("pytorch_model", "model")
    found.notes[file] = {"format": "pt"}
    for name, array in arrays_of(path).items():
        found.tensors[name] = Weight.of(array)
        found.file_of[name] = file


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"cannot read '{path}': it holds no JSON object")
    return value


def _read_file(path: Path, found: Checkpoint) -> None:
    header, start = _header(path)
    external = ExternalData(path.parent, path)
    found.notes[path.name] = header.pop("__metadata__", None) or {}
    for name, entry in header.items():
        try:
            begin, end = (int(n) for n in entry["data_offsets"])
            proto = TensorProto(
                name=name, dims=entry["shape"], data_type=TensorProto.DataType.Value(TYPES[entry["dtype"]])
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(f"'{path}' describes tensor '{name}' in a way that is not understood: {entry}") from None
        proto.data_location = TensorProto.EXTERNAL
        places = {"location": path.name, "offset": str(start + begin), "length": str(end - begin)}
        proto.external_data.extend(StringStringEntryProto(key=key, value=value) for key, value in places.items())
        found.tensors[name] = Weight(external.source(proto))
        found.file_of[name] = path.name


def _header(path: Path) -> tuple[dict, int]:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(LARGEST_HEADER, os.fstat(file.fileno()).st_size):
                raise ValueError("its header is longer than the file")
            return dict(json.loads(file.read(size))), 8 + size
    except (OSError, ValueError, TypeError) as error:
        advice = "copy it again" if path.suffix == ".safetensors" else "name the folder of a checkpoint, or its weights"
        raise InputError(f"'{path}' is no safetensors file: {error}; {advice}") from None


def write_tensors(path: Path, tensors: Mapping[str, Weight], notes: Mapping[str, str]) -> None:
    """Write a safetensors file, a few MB at a time; each tensor lies at a multiple of its type's size."""
    tensors = dict(sorted(tensors.items(), key=lambda each: -each[1].dtype.itemsize))
    header: dict = {"__metadata__": dict(notes)} if notes else {}
    offset = 0
    for name, weight in tensors.items():
        header[name] = {
            "dtype": CODES[weight.onnx_dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.nbytes],
        }
        offset += weight.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for weight in tensors.values():
            for chunk in weight.chunks():
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
