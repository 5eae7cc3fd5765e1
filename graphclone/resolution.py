"""Resolve a plan: its names become axes, blocks and half blocks of one model, or an error that says what it has."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from graphclone.analysis import Analysis
from graphclone.axes.axis import Axis
from graphclone.axes.steps import asking, atom_steps
from graphclone.blocks import Block, Half, Stack
from graphclone.cut import Cut, project, with_fills
from graphclone.dimensions import Dimension
from graphclone.errors import CutError
from graphclone.plan import Plan


def resolve(plan: Plan, analysis: Analysis) -> Cut:
    """Translate a plan's names to atoms and blocks. Raises CutError for what the model does not admit.

    Example:
        >>> from graphclone.analysis import analyse
        >>> cut = resolve(Plan(keep={"blocks.*.ffn": (0, 2, 5)}), analyse(model))
        >>> sorted({len(kept) for kept in cut.indices.values()}), cut.blocks
        ([3], {'': (0, 1, 2, 3, 4, 5, 6, 7)})
    """
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
                        f"'{name}' and another name in the plan share an axis of size {leaf.size[0]} and keep "
                        f"different indices of it; give both the same, or one of them"
                    )
                _check_step(leaf, len(picks), dimension, name, analysis.typing.steps)
                indices[id(leaf)] = picks
                atoms.append(leaf)
    moved = {key: picks for key, picks in indices.items() if not _is_identity(picks, atoms, key)}
    return with_fills(Cut(moved, tuple(atoms), blocks, _resolve_drop(plan, analysis.stacks)), analysis.typing)


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


def _check_step(leaf: Axis, count: int, dimension: Dimension, name: str, asked: Sequence[tuple]) -> None:
    step = atom_steps(asked).get(id(leaf), 1) if asked else 1
    if count % step:
        where = asking(dimension.axes[0], asked)
        raise CutError(
            f"'{name}' keeps {count} of {leaf.size[0]}, but {where} takes multiples of {step} alone; keep "
            f"{step * math.ceil(count / step)}"
        )


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
    """Return what goes with a dimension unless the plan names it: values with head_dim, encoder states with hidden."""
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
        pattern = re.compile(r"\d+".join(map(re.escape, name.split("*", 1))))
        found = [d for d in analysis.dimensions if any(map(pattern.fullmatch, d.names))]
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
