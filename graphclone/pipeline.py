"""Passes and pipelines: decisions that extend a plan, in a text form that round-trips."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from graphclone.analysis import Analysis, analyse
from graphclone.calibration.statistics import Statistics
from graphclone.errors import CutError, InputError
from graphclone.importance import Ranking
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.taps import Reading, readings

GROUP = "graphclone.passes"


@dataclass
class Context:
    """What a pass may ask for beside the parent, the plan and the statistics.

    analysis: of the parent. seed: for random choices. notes: lines a pass tells the user. data: samples, where a pass
    measures by itself. progress: whether it shows bars. provider: where models run. mask: the input that marks padding,
    where it is not found in the graph. bases: {key of an axis: [d, d'] matrix} where a pass changed
    the basis of an axis instead of picking indices; readers: {weight: the same for what it reads}, where a norm's
    weight has folded into it. rankings: the scores by which passes chose what stays.
    """

    parent: Model
    analysis: Analysis
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    data: object = None
    progress: bool = False
    provider: str = "auto"
    mask: str | None = None
    bases: dict[tuple, np.ndarray] = field(default_factory=dict)
    readers: dict[str, np.ndarray] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)

    @cached_property
    def readings(self) -> dict[str, tuple[Reading, ...]]:
        """Where each dimension is measured."""
        return readings(self.analysis)

    def materialise(self, plan: Plan) -> Model:
        """Return the child a plan describes so far."""
        return apply(self.parent, plan, self.analysis)

    def measure(self, model: Model, taps: Iterable, moments: Iterable = ()) -> Statistics:
        """Run a model over the calibration data and return the statistics of some taps and second moments."""
        from graphclone.calibration.data import open_data
        from graphclone.calibration.run import measure

        if self.data is None:
            raise InputError("this pass runs models while it works; give it samples with --data")
        options = {"provider": self.provider, "progress": self.progress, "mask": self.mask}
        return measure(model, open_data(self.data, model), tuple(taps), (), tuple(moments), **options)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass with a name and a decision; only `surgery` edits graphs.

    Example:
        @dataclass(frozen=True)
        class KeepFirst:
            name = "keep_first"
            hidden: int
            def run(self, parent, plan, stats, context):
                return plan.with_(keep={**plan.keep, "hidden": tuple(range(self.hidden))})
    """

    name: str

    def run(self, parent: Model, plan: Plan, stats: Statistics | None, context: Context) -> Plan: ...


@lru_cache(maxsize=1)
def passes() -> dict[str, type]:
    """Return the registered passes by name; an entry point of the group names a pass or a tuple of them."""
    found: dict[str, type] = {}
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        for item in loaded if isinstance(loaded, (tuple, list)) else (loaded,):
            found[item.name] = item
    return found


def find_pass(name: str) -> type:
    """Return the pass of a name. Raises InputError with the nearest name where there is none."""
    known = passes()
    if name in known:
        return known[name]
    if not known:
        raise InputError(
            "no passes are registered; install the package (pip install -e .) so that its entry points exist"
        )
    close = difflib.get_close_matches(name, known, 1)
    raise InputError(
        f"no pass is called '{name}'" + (f"; did you mean '{close[0]}'?" if close else f"; {', '.join(known)}")
    )


@dataclass(frozen=True)
class Result:
    """What a pipeline decided: the plan, the child, what the passes told, and the scores they chose by."""

    plan: Plan
    child: Model
    notes: tuple[str, ...]
    rankings: tuple[Ranking, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Example:
        >>> Pipeline.parse("depth{layers=8 by=middle},width{hidden=384}").text()  # defaults are left out
        'depth{layers=8},width{hidden=384}'
    """

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(text: str) -> "Pipeline":
        """Read `name{option=value ...},name{...}`; values are JSON or bare words."""
        steps = []
        for name, options in _steps(text):
            steps.append(make_pass(name, _options(options, name)))
        return Pipeline(tuple(steps))

    @staticmethod
    def load(path_or_text: str | Path) -> "Pipeline":
        """Read a pipeline from TOML (`[[pass]]` tables with a name and options) or from its text form."""
        path = Path(path_or_text)
        if path.suffix != ".toml":
            return Pipeline.parse(path.read_text(encoding="utf-8") if path.is_file() else str(path_or_text))
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the pipeline '{path}': {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"'{path}' is not TOML: {error}") from None
        tables = document.get("pass")
        if not isinstance(tables, list) or not all(isinstance(t, dict) and "name" in t for t in tables):
            raise InputError(f"'{path}' lists no passes; write [[pass]] tables, each with a name")
        return Pipeline(tuple(make_pass(t["name"], {k: v for k, v in t.items() if k != "name"}) for t in tables))

    def text(self) -> str:
        """Return the text form, which `parse` reads back."""
        return ",".join(pass_text(step) for step in self.passes)

    def plan(self, parent: Model, stats: Statistics | None = None, context: Context | None = None) -> Plan:
        """Run the passes and return what they decided."""
        context = context or Context(parent, analyse(parent))
        plan = Plan(parent=parent.fingerprint)
        for step in self.passes:
            plan = step.run(parent, plan, stats, context)
        return plan

    def run(
        self,
        parent: Model,
        stats: Statistics | None = None,
        *,
        data: object = None,
        seed: int = 0,
        analysis: Analysis | None = None,
        native_constants: bool = False,
        progress: bool = False,
        provider: str = "auto",
        mask: str | None = None,
    ) -> Result:
        """Run the passes and apply the plan; the child's metadata say how it was made.

        analysis: of the parent, where it is at hand. native_constants: as in `surgery.apply`. progress: whether passes
        show bars. provider: where they run models: auto, cuda or cpu. mask: the input that marks padding; else it is
        found.
        """
        if stats is not None:
            stats.check(parent)
        context = Context(
            parent, analysis or analyse(parent), seed, data=data, progress=progress, provider=provider, mask=mask
        )
        plan = self.plan(parent, stats, context)
        child = apply(parent, plan, context.analysis, native_constants)
        child.metadata["graphclone.pipeline"] = self.text()
        return Result(plan, child, tuple(context.notes), tuple(context.rankings))


def make_pass(name: str, options: Mapping[str, object]) -> Pass:
    """Make a pass from its options. Raises InputError for an option it does not have."""
    kind = find_pass(name)
    known = [item.name for item in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; it has {', '.join(known) or 'none'}"
            raise InputError(f"pass '{name}' has no option '{option}'{hint}")
    try:
        return kind(**{key: _frozen(value) for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"pass '{name}': {error}") from None


def _frozen(value: object) -> object:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def pass_text(step: Pass) -> str:
    """Return a pass in the text form, options that are not their defaults only."""
    options = []
    for item in dataclasses.fields(step):
        value = getattr(step, item.name)
        if value != item.default:
            options.append(f"{item.name}={_value_text(value)}")
    return f"{step.name}{{{' '.join(options)}}}" if options else step.name


def _value_text(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value not in ("true", "false", "null"):
        return value
    return json.dumps(value, separators=(",", ":"))


def _steps(text: str) -> list[tuple[str, str]]:
    steps, rest = [], text.strip()
    while rest:
        match = re.match(r"\s*([A-Za-z_]\w*)\s*", rest)
        if not match:
            raise InputError(f"cannot read the pipeline at {rest[:20]!r}; write name{{option=value ...}},name{{...}}")
        name, rest, options = match.group(1), rest[match.end() :], ""
        if rest.startswith("{"):
            end = _closing(rest)
            options, rest = rest[1:end], rest[end + 1 :].strip()
        steps.append((name, options))
        if rest and not rest.startswith(","):
            raise InputError(f"cannot read the pipeline at {rest[:20]!r}; passes are separated by commas")
        rest = rest[1:]
    if not steps:
        raise InputError(
            "the pipeline is empty; write for example depth{layers=6},width{hidden=384},rescale{mode=paper}"
        )
    return steps


def _closing(text: str) -> int:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return i
    raise InputError(f"no '}}' for the '{{' in the pipeline at {text[:20]!r}")


def _options(text: str, name: str) -> dict[str, object]:
    options: dict[str, object] = {}
    decoder = json.JSONDecoder()
    rest = text.strip()
    while rest:
        match = re.match(r"([A-Za-z_]\w*)\s*=\s*", rest)
        if not match:
            raise InputError(
                f"cannot read the options of '{name}' at {rest[:20]!r}; write option=value, separated by spaces"
            )
        rest = rest[match.end() :]
        try:
            value, end = decoder.raw_decode(rest)
        except ValueError:
            word = re.match(r"[^\s,]+", rest)
            if not word:
                raise InputError(f"option '{match.group(1)}' of '{name}' has no value") from None
            value, end = word.group(0), word.end()
        options[match.group(1)] = value
        rest = rest[end:].lstrip(" ,\t\n")
    return options


__all__ = ["Context", "CutError", "Pass", "Pipeline", "Result", "find_pass", "make_pass", "passes"]
