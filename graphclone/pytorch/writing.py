"""Writing: a folder with a model's source, its weights, and how to load them."""

import json
import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from graphclone.atomic import replacing
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch.conversion import convert
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.source import Source, write_source

SAFETENSORS_TYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
}  # fmt: skip

README = """# {title}

A PyTorch model with the parameter names of the framework it was exported from. `model.py` needs `torch` and
`safetensors` alone.

```python
from model import load

model = load()  # reads model.safetensors beside model.py
outputs = model({inputs})
```

Inputs: {described}. Outputs: {outputs}.{tail}
"""


def write_torch(model: Model, folder: str | Path) -> Path:
    """Write `model.py`, `model.safetensors` and `README.md` into `folder`, which is made if need be, and return it.

    The source is readable, stands alone, and holds a class per repeated block. Weights are streamed. The three files
    appear together or not at all.

    Raises: InputError where the folder cannot be written, or listing every operator without a PyTorch rule.
    """
    folder = Path(folder)
    converted = convert(model)
    title = f"{model.graph.name or 'model'}, from ONNX"
    source = write_source(converted, title)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder '{folder}': {error.strerror or error}; choose another path"
        ) from error
    places = (folder / "model.safetensors", folder / "README.md", folder / "model.py")
    with replacing(*places) as (weights, readme, text):
        write_safetensors(weights, source)
        readme.write(_readme(model, converted.report, title).encode())
        text.write(source.text.encode())
    return folder


def write_safetensors(file: BinaryIO, source: Source) -> None:
    """Stream the tensors in the safetensors format: an 8-byte length, a JSON header, the bytes."""
    header, offset = {}, 0
    for name, slot in source.tensors.items():
        stored = slot.stored
        size = math.prod(stored.shape) * stored.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_TYPES[str(stored.dtype)],
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for slot in source.tensors.values():
        _write(file, slot.stored)


def _write(file: BinaryIO, stored: Stored) -> None:
    if stored.transposed:
        file.write(np.ascontiguousarray(np.asarray(stored.weight.load()).T).tobytes())
        return
    for chunk in stored.weight.chunks():
        file.write(chunk)


def _readme(model: Model, report: dict[str, list[str]], title: str) -> str:
    inputs = ", ".join(_plain(tensor.name) for tensor in model.inputs)
    described = ", ".join(f"`{_plain(tensor.name)}` {_shape(tensor.shape)}" for tensor in model.inputs)
    outputs = ", ".join(f"`{_plain(tensor.name)}` {_shape(tensor.shape)}" for tensor in model.outputs)
    notes = {
        "absent": "Parameters of the original model that the graph does not hold",
        "carried": "Of these, those that the state dict has from the checkpoint; nothing reads them",
        "assumed": "Names that are a guess",
        "unsure": "Tensors whose role is a guess",
        "unnamed": "Parameters whose original name is lost",
        "moved": "Tensors in the module of the block that reads them, and what the graph calls them",
    }
    tail = "".join(
        f"\n\n## {notes[key]}\n\n" + "\n".join(f"- `{_plain(each)}`" for each in values)
        for key, values in report.items()
        if values
    )
    return README.format(title=_plain(title), inputs=inputs, described=described, outputs=outputs, tail=tail)


def _plain(text: str) -> str:
    return re.sub(r"[^\w .,:/()\[\]+-]", "_", str(text))[:200]


def _shape(shape) -> str:
    return "[" + ", ".join(_plain(size) for size in shape or ()) + "]"
