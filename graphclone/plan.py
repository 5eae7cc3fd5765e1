"""Plan: what a child keeps, per dimension and block, in one file that can be written by hand, reviewed and diffed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from graphclone.atomic import replacing
from graphclone.errors import InputError

FORMAT = "graphclone.plan/1"
LARGEST = 1 << 62  # what an index may be, so that it fits 64 bits
BIAS = "bias of "  # before a weight's name, the key of its bias in the sidecar file
KEYS = {"format", "parent", "keep", "blocks", "drop", "scale", "replace", "bias", "untie"}


@dataclass(frozen=True)
class Plan:
    """Every decision about a child.

    parent: the parent's fingerprint, or "". keep: {dimension name: kept indices, in the child's order}; `*` in a name
    is every block. blocks: {stack: kept blocks, ascending}; the stack's name has no dot, '' where there is one stack.
    drop: half blocks to switch off, as `blocks.3.attention`. scale: {initializer: factor}. replace: {initializer:
    its values in the child's shape}. bias: {weight: the bias added behind the operator that has none}.
    untie: {initializer: the name of a copy for the operators that multiply with it, which then can differ from what is
    looked up}.

    Example:
        >>> Plan(keep={"hidden": (0, 2, 5)}, blocks={"": (0, 3)}).to_json()["blocks"]
        [0, 3]
    """

    parent: str = ""
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    replace: Mapping[str, np.ndarray] = field(default_factory=dict)
    bias: Mapping[str, np.ndarray] = field(default_factory=dict)
    untie: Mapping[str, str] = field(default_factory=dict)

    def with_(self, **changes) -> "Plan":
        """Return a plan with some fields exchanged."""
        return replace(self, **changes)

    def to_json(self, sidecar: str = "") -> dict:
        """Return the plan as JSON values; `sidecar` is the name of the file that holds replaced tensors."""
        more = {"bias": {name: f"{sidecar}#{BIAS}{name}" for name in self.bias}, "untie": dict(self.untie)}
        return {
            "format": FORMAT,
            "parent": self.parent,
            "keep": {name: list(map(int, indices)) for name, indices in self.keep.items()},
            "blocks": list(self.blocks[""])
            if set(self.blocks) == {""}
            else {k: list(v) for k, v in self.blocks.items()},
            "drop": list(self.drop),
            "scale": {name: float(factor) for name, factor in self.scale.items()},
            "replace": {name: f"{sidecar}#{name}" for name in self.replace},
            **{key: value for key, value in more.items() if value},
        }

    def save(self, path: str | Path) -> None:
        """Write the plan, and beside it `<stem>.safetensors` where it replaces tensors."""
        path = Path(path)
        sidecar = path.with_suffix(".safetensors")
        document = self.to_json(sidecar.name)
        text = "{\n" + ",\n".join(f" {json.dumps(key)}: {_compact(value)}" for key, value in document.items()) + "\n}\n"
        held = {**self.replace, **{f"{BIAS}{name}": value for name, value in self.bias.items()}}
        if not held:
            with replacing(path) as (file,):
                file.write(text.encode())
            return
        with replacing(sidecar, path) as (tensors, file):
            tensors.write(save({name: np.ascontiguousarray(value) for name, value in held.items()}))
            file.write(text.encode())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan. Raises InputError where the file is none."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the plan '{path}': {error.strerror}; check the path") from None
        except ValueError as error:
            raise InputError(f"'{path}' is not a plan: {error}; a plan is JSON, see `subclone --plan-out`") from None
        return Plan.from_json(document, str(path))

    @staticmethod
    def from_json(document: object, where: str = "the plan") -> "Plan":
        """Read a plan from JSON values; tensors it replaces lie in a file beside `where`."""
        if not isinstance(document, dict):
            raise InputError(f"'{where}' is not a plan: expected an object with 'keep', 'blocks' or 'drop'")
        if document.get("format", FORMAT) != FORMAT:
            raise InputError(f"'{where}' has format {document['format']!r}; this version reads '{FORMAT}'")
        if unknown := sorted(set(document) - KEYS):
            raise InputError(f"'{where}' has an unknown key {unknown[0]!r}; a plan has {', '.join(sorted(KEYS))}")
        if not set(document) & (KEYS - {"format", "parent"}):
            raise InputError(f"'{where}' decides nothing; give 'keep', 'blocks' or 'drop'")
        keep = document.get("keep") or {}
        blocks = document.get("blocks", {})
        if not isinstance(keep, dict) or not isinstance(blocks, (dict, list)):
            raise InputError(f"'{where}': 'keep' is {{name: [indices]}} and 'blocks' is a list or {{stack: list}}")
        if isinstance(blocks, list):
            blocks = {"": blocks}
        return Plan(
            str(document.get("parent") or ""),
            {str(name): _integers(indices, f"keep['{name}']", where) for name, indices in keep.items()},
            {str(name).rstrip("."): _integers(v, f"blocks['{name}']", where) for name, v in blocks.items()},
            _strings(document.get("drop") or [], where),
            _factors(document.get("scale") or {}, where),
            _tensors(document.get("replace") or {}, "replace", where),
            _tensors(document.get("bias") or {}, "bias", where),
            _names(document.get("untie") or {}, where),
        )


def _compact(value) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
    return json.dumps(value)


def _integers(values: object, what: str, where: str) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise InputError(f"'{where}': {what} must be a list of whole numbers")
    if any(abs(v) >= LARGEST for v in values):
        raise InputError(
            f"'{where}': {what} lists a number that no index can be; write numbers below the size of the axis"
        )
    return tuple(values)


def _strings(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InputError(f"'{where}': drop must be a list of names such as 'blocks.3.attention'")
    return tuple(values)


def _factors(values: object, where: str) -> dict[str, float]:
    if not isinstance(values, dict) or not all(isinstance(v, (int, float)) for v in values.values()):
        raise InputError(f"'{where}': scale must be {{initializer: factor}}")
    return {name: float(value) for name, value in values.items()}


def _names(values: object, where: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) and v for v in values.values()):
        raise InputError(f"'{where}': untie must be {{initializer: name of the copy}}")
    return dict(values)


def _tensors(references: object, key: str, where: str) -> dict[str, np.ndarray]:
    if not isinstance(references, dict):
        raise InputError(f"'{where}': {key} must be {{initializer: \"PLAN.safetensors#name\"}}")
    folder, found, files = Path(where).parent, {}, {}
    for name, reference in references.items():
        file, _, part = str(reference).partition("#")
        path = folder / file
        if Path(file).name != file:
            raise InputError(f"{key}['{name}'] names '{file}', which is not a file beside the plan")
        try:
            files[path] = files.get(path) or load_file(path)
            found[name] = files[path][part or name]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"cannot read {key}['{name}'] from '{path}': {error}") from None
    return found
