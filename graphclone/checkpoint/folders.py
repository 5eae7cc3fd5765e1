"""Write the folder of a checkpoint, which appears at once: weights, config, and copies of the other files."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from graphclone.checkpoint.files import INDEX, OTHERS, PICKLED_INDEX, Checkpoint, write_tensors
from graphclone.errors import InputError
from graphclone.weights import Weight

SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def write_checkpoint_files(
    folder: Path, source: Checkpoint, tensors: Mapping[str, tuple[str, Weight]], config: Mapping | None
) -> None:
    """Fill a folder: weights in files as the source has them, the config, and copies of everything else.

    tensors: {name: (the name in the source, weight)}.
    """
    weights = {name: weight for name, (_, weight) in tensors.items()}
    file_of = _files(source, {name: old for name, (old, _) in tensors.items()})
    for file, old in {new: old for new, old in file_of.values()}.items():
        part = {name: weight for name, weight in weights.items() if file_of[name] == (file, old)}
        write_tensors(folder / file, part, source.notes.get(old, {}))
    files = {name: file for name, (file, _) in file_of.items()}
    if len(set(files.values())) > 1 or any(SHARD.search(file) for file in files.values()):
        total = sum(weight.nbytes for weight in weights.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    if config is not None:
        write_json(folder / "config.json", config)
    for path in sorted(source.folder.iterdir()) if source.folder is not None else ():
        weighs = path.suffix in (".safetensors", *OTHERS) or path.name in (INDEX, PICKLED_INDEX, "config.json")
        if path.is_file() and not weighs and path.suffix not in (".onnx", ".onnx_data"):
            shutil.copyfile(path, folder / path.name)


def _files(source: Checkpoint, old_of: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return {name: (file, the source's file)}; shards that are left are numbered anew."""
    first = next(iter(source.file_of.values()))
    places = {name: source.file_of.get(old, first) for name, old in old_of.items()}
    shards = sorted({file for file in places.values() if SHARD.search(file)})
    new = {file: SHARD.sub(f"-{n:05}-of-{len(shards):05}", file) for n, file in enumerate(shards, 1)}
    return {name: (new.get(file, file), file) for name, file in places.items()}


def write_json(path: Path, value: Mapping) -> None:
    """Write a file as transformers writes its own: keys sorted, and indented."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_folder(path: Path) -> Path:
    """Return where a new folder may be made. Raises: InputError where there is something, or no folder to hold it."""
    place = path.resolve()
    if place == Path.cwd().resolve():
        raise InputError(f"cannot write '{path}': it is the folder you are in; name a new folder")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"cannot write '{path}': there is something already; name a new or an empty folder")
    if not place.parent.is_dir():
        raise InputError(f"cannot write '{path}': there is no folder '{path.parent}'; create it first")
    return place


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when everything went well, and vanishes otherwise.

    Raises: InputError where `path` has files already or cannot be made.
    """
    place = check_folder(path)
    temporary = place.with_name(f".graphclone-{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        if place.exists():
            place.rmdir()
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
