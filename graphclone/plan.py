"""Plan: what a child keeps, per dimension and block, in one file that can be written by hand, reviewed and diffed."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from graphclone.analysis import Analysis
from graphclone.atomic import replacing
from graphclone.axes.axis import Axis, find
from graphclone.axes.typed import AxisTyping
from graphclone.blocks import Block, Half, Stack
from graphclone.dimensions import Dimension
from graphclone.errors import CutError, InputError

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


# what a plan means for a model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A plan resolved against a model: kept indices per atom, kept blocks per stack, dropped half blocks."""

    indices: Mapping[int, np.ndarray]  # id of the atom -> kept indices
    atoms: tuple[Axis, ...]  # keeps the ids above alive
    blocks: Mapping[str, tuple[int, ...]]  # stack prefix -> kept blocks
    dropped: tuple[Half, ...]
    shrunk: frozenset[int] = frozenset()  # ids of atoms of generated fills that become one

    def picks(self, axis: Axis) -> np.ndarray | None:
        """Return the kept positions along an axis, or None where all stay in place."""
        axis = find(axis)
        if axis.kind == "atom":
            return self.indices.get(id(axis))
        parts = [self.picks(part) for part in axis.parts]
        if all(part is None for part in parts):
            return None
        whole = [np.arange(find(p).size[0]) if k is None else k for p, k in zip(axis.parts, parts, strict=True)]
        if axis.kind == "sum":
            offsets = np.cumsum([0] + [find(p).size[0] for p in axis.parts])
            return np.concatenate([k + o for k, o in zip(whole, offsets, strict=False)])
        result = whole[0]
        for part, kept in zip(axis.parts[1:], whole[1:], strict=True):
            result = (result[:, None] * find(part).size[0] + kept[None, :]).reshape(-1)
        return result

    def size(self, axis: Axis) -> tuple[int, ...]:
        """Return the size of an axis after the cut, per probe."""
        axis = find(axis)
        if axis.kind == "atom":
            if id(axis) in self.shrunk:
                return (1,) * len(axis.size)
            kept = self.indices.get(id(axis))
            return axis.size if kept is None else (len(kept),) * len(axis.size)
        sizes = [self.size(part) for part in axis.parts]
        columns = zip(*sizes, strict=True)
        return tuple(sum(c) if axis.kind == "sum" else int(np.prod(c)) for c in columns)


def resolve(plan: Plan, analysis: Analysis) -> Cut:
    """Translate a plan's names to atoms and blocks. Raises CutError for what the model does not admit."""
    blocks = _resolve_blocks(plan, analysis.stacks)
    indices: dict[int, np.ndarray] = {}
    atoms: list[Axis] = []
    chosen = _by_dimension(plan, analysis, blocks)
    for dimension, kept, name in chosen:
        _check_indices(dimension, kept, name)
        for axis in dimension.axes:
            for leaf, picks in project(axis, kept, dimension, name):
                known = indices.get(id(leaf))
                if known is not None and not np.array_equal(known, picks):
                    raise CutError(
                        f"'{name}' and another name in the plan share an axis of size {leaf.size[0]} and keep different "
                        f"indices of it; give both the same, or one of them"
                    )
                indices[id(leaf)] = picks
                atoms.append(leaf)
    moved = {key: picks for key, picks in indices.items() if not _is_identity(picks, atoms, key)}
    return with_fills(Cut(moved, tuple(atoms), blocks, _resolve_drop(plan, analysis.stacks)), analysis.typing)


def with_fills(cut: Cut, typing: AxisTyping) -> Cut:
    """Return a cut that also shrinks the axes of generated fills to one where what they broadcast against is cut."""
    shrunk = frozenset(id(find(fill)) for fill, real in typing.fills if cut.size(real) != find(real).size)
    return replace(cut, shrunk=shrunk) if shrunk else cut


def _is_identity(picks: np.ndarray, atoms: list[Axis], key: int) -> bool:
    size = next(atom.size[0] for atom in atoms if id(atom) == key)
    return len(picks) == size and np.array_equal(picks, np.arange(size))


def _check_indices(dimension: Dimension, kept: np.ndarray, name: str) -> None:
    if not len(kept):
        raise CutError(f"'{name}' keeps nothing; keep at least {dimension.minimum} of {dimension.size}")
    if kept.min() < 0 or kept.max() >= dimension.size:
        bad = kept[(kept < 0) | (kept >= dimension.size)][0]
        raise CutError(f"'{name}' keeps index {bad}, but its indices run from 0 to {dimension.size - 1}")
    if len(np.unique(kept)) != len(kept):
        raise CutError(f"'{name}' keeps an index twice; list each index once")
    if len(kept) < dimension.minimum:
        raise CutError(f"'{name}' keeps {len(kept)}, but the graph picks the top {dimension.minimum} of them")
    if dimension.locked and not (len(kept) == dimension.size and np.array_equal(kept, np.arange(dimension.size))):
        raise CutError(f"cannot cut '{name}' ({dimension.size}): {dimension.locked}")


def _by_dimension(plan: Plan, analysis: Analysis, blocks) -> list[tuple[Dimension, np.ndarray, str]]:
    """Return (dimension, indices, name given) triples; an explicit name beats `*`, q's head_dim extends to v."""
    given: dict[str, tuple[Dimension, np.ndarray, str, bool]] = {}
    for name, indices in plan.keep.items():
        star = "*" in name
        kept = np.asarray(indices, np.int64)
        for dimension in match(name, analysis, blocks):
            before = given.get(dimension.name)
            if before is not None and before[3] == star and not np.array_equal(before[1], kept):
                raise CutError(
                    f"'{before[2]}' and '{name}' are one dimension of this graph ({dimension.name}) and keep different "
                    f"indices; give both the same list, or one of them"
                )
            if before is None or (before[3] and not star):
                given[dimension.name] = (dimension, kept, name, star)
    for dimension, kept, name, _ in list(given.values()):
        for other in _values_of(dimension, analysis):
            if other.name not in given and other.size == dimension.size:
                given[other.name] = (other, kept, name, True)
    return [(dimension, kept, name) for dimension, kept, name, _ in given.values()]


def _values_of(dimension: Dimension, analysis: Analysis) -> list[Dimension]:
    """Return the dimensions that go with one unless the plan names them: values with head_dim, encoder states with hidden."""
    if dimension.role == "hidden":
        return [d for d in analysis.dimensions if d.role == "hidden" and d.name == "encoder.hidden" and not d.stack]
    if dimension.role != "head_dim":
        return []
    names = {name.replace("head_dim", "v_head_dim") for name in dimension.names}
    return [d for d in analysis.dimensions if d.role == "v_head_dim" and names & set(d.names)]


def match(name: str, analysis: Analysis, blocks: Mapping[str, tuple[int, ...]]) -> list[Dimension]:
    """Return the dimensions a name or pattern means; names of dropped blocks mean none."""
    dimension = analysis.dimension(name)
    if dimension is not None:
        return [dimension]
    if "*" in name:
        head, _, tail = name.partition("*")
        found = [
            d for d in analysis.dimensions if any(n.startswith(head) and n.endswith(tail) and
            n[len(head) : len(n) - len(tail)].isdigit() for n in d.names)
        ]  # fmt: skip
        if found:
            return found
    if _names_dropped_block(name, analysis.stacks, blocks):
        return []
    known = [n for d in analysis.dimensions for n in d.names]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean '{close[0]}'?" if close else "; `graphclone show` lists them"
    raise CutError(f"no dimension is called '{name}'{hint}")


def _names_dropped_block(name: str, stacks: Sequence[Stack], blocks: Mapping[str, tuple[int, ...]]) -> bool:
    for stack in stacks:
        start = f"{stack.prefix}blocks."
        if name.startswith(start):
            number = name[len(start) :].split(".")[0]
            return number.isdigit() and int(number) < len(stack.blocks) and int(number) not in blocks[stack.prefix]
    return False


def _resolve_blocks(plan: Plan, stacks: Sequence[Stack]) -> dict[str, tuple[int, ...]]:
    names = {stack.prefix.rstrip("."): stack for stack in stacks}
    kept = {stack.prefix: tuple(block.index for block in stack.blocks) for stack in stacks}
    for name, listed in plan.blocks.items():
        if name == "" and len(stacks) == 1:
            stack = stacks[0]
        elif name in names:
            stack = names[name]
        else:
            known = ", ".join(sorted(names)) or "none, so no block can be dropped"
            raise CutError(f"no stack is called '{name}' in 'blocks'; the stacks are {known}")
        if list(listed) != sorted(set(listed)):
            raise CutError(f"blocks {list(listed)} must ascend and name each block once")
        count = len(stack.blocks)
        if listed and (listed[0] < 0 or listed[-1] >= count):
            raise CutError(f"blocks {list(listed)}: the blocks of this stack run from 0 to {count - 1}")
        if not listed:
            raise CutError("a stack must keep at least one block; 'blocks' lists none")
        kept[stack.prefix] = tuple(listed)
    return kept


def _resolve_drop(plan: Plan, stacks: Sequence[Stack]) -> tuple[Half, ...]:
    halves: dict[str, tuple[Half, ...]] = {}
    for stack in stacks:
        for block in stack.blocks:
            named = [half_names(stack, same) for same in (block, *block.twins)]
            halves.update((column[0][0], tuple(half for _, half in column)) for column in zip(*named, strict=False))
    for name in plan.drop:
        if name not in halves:
            close = difflib.get_close_matches(name, halves, 1)
            raise CutError(f"no half block is called '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    dropped = [half for name in plan.drop for half in halves[name]]
    for block in (same for stack in stacks for b in stack.blocks for same in (b, *b.twins)):
        if block.parallel and all(half in dropped for half in block.parallel):
            dropped = [half for half in dropped if half not in block.parallel] + list(block.halves)
    return tuple(dropped)


def half_names(stack: Stack, block: Block) -> list[tuple[str, Half]]:
    """Return the names of a block's halves: `blocks.3.attention`, `blocks.3.ffn`, numbered where a kind repeats."""
    names: list[tuple[str, Half]] = []
    halves = block.parallel or block.halves
    if len(halves) == 1 and halves[0].kind == "attention":
        return []  # it may hold a feed-forward that cannot be told apart; the whole block can be dropped
    for half in halves:
        repeats = sum(h.kind == half.kind for h in halves) > 1
        number = sum(h.kind == half.kind for _, h in names)
        last = number == sum(h.kind == half.kind for h in halves) - 1
        suffix = f"_{number}" if repeats and not last else ""
        names.append((f"{stack.prefix}blocks.{block.index}.{half.kind}{suffix}", half))
    return names


def project(axis: Axis, kept: np.ndarray, dimension: Dimension, name: str) -> list[tuple[Axis, np.ndarray]]:
    """Translate positions along an axis to indices of its atoms. Raises CutError where they do not fit its structure."""
    axis = find(axis)
    if axis.kind == "atom":
        return [(axis, kept)]
    found: list[tuple[Axis, np.ndarray]] = []
    if axis.kind == "sum":
        offset, taken = 0, 0
        for part in axis.parts:
            size = find(part).size[0]
            inside = kept[(kept >= offset) & (kept < offset + size)]
            if not np.array_equal(kept[taken : taken + len(inside)], inside):
                raise CutError(_pairs(dimension, name))
            if not len(inside):
                raise CutError(f"'{name}' drops a whole part of {dimension.size}; keep some of each part")
            found += project(part, inside - offset, dimension, name) if size > 1 else []
            offset, taken = offset + size, taken + len(inside)
    else:
        sizes = [find(part).size[0] for part in axis.parts]
        coordinates = np.unravel_index(kept, sizes)
        parts = [column[np.sort(np.unique(column, return_index=True)[1])] for column in coordinates]
        outer = np.ravel_multi_index(np.meshgrid(*parts, indexing="ij"), sizes).reshape(-1)
        if not np.array_equal(outer, kept):
            raise CutError(f"'{name}' must keep the same entries of every group of {sizes}, in the groups' order")
        for part, picks in zip(axis.parts, parts, strict=True):
            found += project(part, picks, dimension, name)
    merged: dict[int, tuple[Axis, np.ndarray]] = {}
    for leaf, picks in found:
        if id(leaf) in merged and not np.array_equal(merged[id(leaf)][1], picks):
            raise CutError(_pairs(dimension, name))
        merged[id(leaf)] = (leaf, picks)
    return list(merged.values())


def _pairs(dimension: Dimension, name: str) -> str:
    half = dimension.size // 2
    return (
        f"'{name}' must keep both members of each pair, in pair order: the graph rotates entry i with entry i + {half} "
        f"(write the kept i below {half} first, then each i + {half})"
    )
