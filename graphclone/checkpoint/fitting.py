"""Ask the class behind a config what it would hold, and change fields until that is the child.

There is no table of models: numbers of the config are tried where a tensor's size is another one than the child's, and
a value counts if it brings the class closer. What no value brings is what the config cannot express.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphclone.checkpoint.config import Doubt, inexpressible
from graphclone.errors import CheckFailed, CutError

Shapes = Mapping[str, Sequence[int]]
Ask = Callable[[Mapping], Shapes]
Path = tuple[str | int, ...]
IGNORED = re.compile(
    r"token_id|label|version|rope|theta|rotary|dropout|layer_?drop|prob$|eps$|seed|dtype|_std$|initializer|ignore_index"
)
"""Fields that size nothing."""
FEW = 16
"""A whole number up to this may be a ratio that has become another one."""
MOST = 150
"""Configs that are tried."""
ENOUGH = 0.5
"""The share of the checkpoint's names that the class must know for its word to count."""


@dataclass(frozen=True)
class Misfit:
    """A tensor of the child that the class has otherwise: along `axis` it has `has`; axis None: not at all."""

    tensor: str
    axis: int | None
    has: int
    wants: int


def fit_config(
    config: Mapping, full: Mapping, parent: Shapes, child: Shapes, ask: Ask, doubts: Sequence[Doubt] = ()
) -> dict:
    """Return a config whose class holds the child's tensors.

    config: what names and values tell. full: the same with its class's defaults. parent, child: shapes of the two
    checkpoints. ask: from a config to the shapes its class has; it raises CheckFailed where the class refuses.
    doubts: what names alone did not tell; the first is raised where the class does not settle it.
    Raises: CutError that names the fields in the way.

    Example:
        fit_config({"dim": 8}, {"dim": 8}, {"w": (9, 4)}, {"w": (6, 4)}, lambda config: {"w": (config["dim"] + 1, 4)})
    """
    return _Fitter(config, full, parent, child, ask, doubts).run()


class _Fitter:
    def __init__(
        self, config: Mapping, full: Mapping, parent: Shapes, child: Shapes, ask: Ask, doubts: Sequence[Doubt]
    ):
        self.config = copy.deepcopy(dict(config))
        self.full = full
        self.child = child
        self.ask = ask
        self.doubts = doubts
        self.left = MOST
        self.extra = {_pattern(name) for name in parent}

    def run(self) -> dict:
        try:
            bad = self._misfits(self.config)
        except CheckFailed as error:
            raise self._doubted(str(error)) from None
        while bad:
            best = self._better(bad)
            if best is None:
                raise self._error(bad)
            self.config, bad = best
        return self.config

    def _misfits(self, config: Mapping) -> list[Misfit]:
        if self.left == 0:
            raise CheckFailed("no more is tried")
        self.left -= 1
        shapes = self.ask(config)
        known = [name for name in self.child if name in shapes]
        if len(known) < ENOUGH * len(self.child):
            if self.doubts:
                raise self.doubts[0].error
            return []
        found = [
            Misfit(name, axis, has, wants)
            for name in known
            if len(shapes[name]) == len(self.child[name])
            for axis, (has, wants) in enumerate(zip(shapes[name], self.child[name], strict=True))
            if has != wants
        ]
        patterns = {_pattern(name) for name in shapes}
        found += [Misfit(n, None, 0, 1) for n in self.child if n not in shapes and _pattern(n) in patterns]
        found += [Misfit(n, None, 1, 0) for n in shapes if n not in self.child and _pattern(n) in self.extra]
        return found

    def _better(self, bad: Sequence[Misfit]) -> tuple[dict, list[Misfit]] | None:
        """Return the config with one number changed that leaves fewer misfits, the likeliest numbers first."""
        numbers = list(_numbers(_merged(self.full, self.config)))
        tried = [(rank, n, path, new) for n, (path, old) in enumerate(numbers) for rank, new in _candidates(old, bad)]
        for _, _, path, value in sorted(tried, key=lambda each: each[:2]):
            changed = self._with(path, value)
            try:
                left = self._misfits(changed)
            except CheckFailed:
                continue
            if len(left) < len(bad):
                return changed, left
        return None

    def _with(self, path: Path, value: float) -> dict:
        changed = copy.deepcopy(self.config)
        place: object = changed
        source: object = self.full
        for step in path[:-1]:
            known = isinstance(source, list) or (isinstance(source, Mapping) and step in source)
            source = source[step] if known else None
            if isinstance(place, dict) and step not in place:
                place[step] = copy.deepcopy(source)
            place = place[step]
        place[path[-1]] = value
        return changed

    def _doubted(self, said: str) -> CutError:
        """Return the error of a config that its class refuses: `said` tells what was in doubt, or a field is known."""
        doubt = next((doubt for doubt in self.doubts if not doubt.what), self.doubts[0] if self.doubts else None)
        if doubt is None:
            return inexpressible(said)
        return inexpressible(f"its {doubt.what}: {said}") if doubt.what else doubt.error

    def _error(self, bad: Sequence[Misfit]) -> CutError:
        """Name the field in the way: by what was in doubt already, or by what sizes a tensor in the class."""
        wanted = {each.wants for each in bad}
        known = [doubt for doubt in self.doubts if doubt.sizes & wanted]
        doubt = next((doubt for doubt in known if not doubt.what), known[0] if known else None)
        if doubt is not None and not doubt.what:
            return doubt.error
        about = [each for each in bad if doubt is not None and each.wants in doubt.sizes] or bad
        first = min(about, key=lambda each: each.axis is None)
        if first.axis is None:
            what, wants = ("holds no", "lacks it") if first.wants else ("needs", "has it")
            return inexpressible(f"its class {what} '{first.tensor}'; keep a block that {wants} at this place")
        names = self._fields_of(first)
        if doubt is not None and not names:
            return doubt.error
        return inexpressible(
            (f"its {doubt.what}: " if doubt is not None else "")
            + f"'{first.tensor}' has {first.wants} along axis {first.axis}, its class makes {first.has} of "
            + (" and ".join(f"'{name}'" for name in names[:3]) or "no field")
            + (f", and no value of {'it' if len(names) < 2 else 'them'} fits all tensors" if names else "")
        )

    def _fields_of(self, misfit: Misfit) -> list[str]:
        """Return the fields that size a tensor: twice their value changes its axis."""
        found = []
        for path, value in _numbers(_merged(self.full, self.config)):
            try:
                shape = self.ask(self._with(path, value * 2)).get(misfit.tensor)
            except CheckFailed:
                continue
            if shape is None or len(shape) <= misfit.axis or shape[misfit.axis] != misfit.has:
                found.append(".".join(map(str, path)))
        return found


def _merged(full: object, config: object) -> object:
    """Return a config with what only the full one says."""
    if not isinstance(full, Mapping) or not isinstance(config, Mapping):
        return config
    return {**full, **{key: _merged(full.get(key), value) for key, value in config.items()}}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _numbers(config: object, path: Path = ()) -> Iterator[tuple[Path, float]]:
    """Yield the numbers of a config that may size something, with the keys that lead to them."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        if isinstance(key, str) and IGNORED.search(key):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield (*path, key), value
        else:
            yield from _numbers(value, (*path, key))


def _candidates(value: float, bad: Sequence[Misfit]) -> Iterator[tuple[int, float]]:
    """Yield (rank, value) of what a number may be in the child: the size, the same multiple of it, or as much less."""
    found: dict[float, int] = {}
    for has, wants in sorted({(each.has, each.wants) for each in bad if each.axis is not None and each.has}):
        scaled = value * wants / has
        if value == has:
            found.setdefault(wants, 0)
        elif isinstance(value, float):
            found |= dict.fromkeys((scaled, scaled * (1 + 1e-9)), 1)
        elif scaled == int(scaled):
            found.setdefault(int(scaled), 1 if has % value == 0 else 2)
        elif value <= FEW:
            found |= dict.fromkeys((scaled, scaled * (1 + 1e-9)), 3)
        if isinstance(value, int) and value < has and value + wants - has > 0:
            found.setdefault(value + wants - has, 4)
    yield from ((rank, each) for each, rank in found.items() if each != value)
