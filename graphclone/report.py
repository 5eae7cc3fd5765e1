"""Report: one HTML page that shows what a child kept of its parent, why, and that it is right."""

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from graphclone.analysis import Analysis
from graphclone.atomic import replacing
from graphclone.blocks import Stack
from graphclone.calibration.statistics import Statistics
from graphclone.cut import Cut
from graphclone.dimensions import Dimension
from graphclone.dtypes import is_float
from graphclone.importance import Ranking
from graphclone.model import Model
from graphclone.native import has_native_constants
from graphclone.plan import Plan
from graphclone.resolution import half_names, resolve
from graphclone.verify.report import Check, Report

WIDTH, HEIGHT = 240, 72  # of a curve, in units of its drawing
COLUMNS = 240  # of a strip of kept indices; more indices share a column
LONGEST = 120  # characters of a name that are shown

MEANINGS = {
    "checker": "onnx checker and strict shape inference",
    "run": "onnxruntime runs the child; every output is finite",
    "permutation": "each width in random order: outputs must not change",
    "zero": "what no norm follows: cut must equal zeroed",
    "half cut": "half of every width: runs, with the shapes foretold",
    "slices": "every weight is the parent's slice, times its factor",
    "outputs": "the file's outputs are those of the plan, carried out again",
    "plan": "this cut must equal the parent with the rest zeroed",
}


@dataclass(frozen=True)
class Origin:
    """How a plan came about, as far as it is known.

    rankings: the scores that chose. notes: what passes told. seed: of random choices. statistics: what was measured.
    pipeline: its text. samples: the flag that gave them, as ("--data", "batches.npz").
    """

    rankings: Sequence[Ranking] = ()
    notes: Sequence[str] = ()
    seed: int = 0
    statistics: Statistics | None = None
    pipeline: str = ""
    samples: tuple[str, ...] = ()


def write_report(
    path: str | Path,
    parent: Model,
    child: Model,
    plan: Plan,
    analysis: Analysis,
    origin: Origin = Origin(),
    checks: Report | None = None,
) -> None:
    """Write the page; it needs no network, runs no script, and treats every name of the graph as text.

    analysis: of the parent. checks: what the verification found, or None where there was none.
    Raises: InputError where the file cannot be written; what was there before then stays.

    Example:
        write_report("small.html", parent, result.child, result.plan, analyse(parent), checks=verify(result.child))
    """
    page = render(parent, child, plan, analysis, origin, checks)
    with replacing(path) as (file,):
        file.write(page.encode("utf-8", "replace"))


def render(parent: Model, child: Model, plan: Plan, analysis: Analysis, origin: Origin, checks: Report | None) -> str:
    """Return the page's text."""
    cut = resolve(plan, analysis)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": _short, "figure": _figure, "bytes": _bytes}
    template = environment.from_string(files("graphclone").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(parent),
        totals=[
            _Size("parameters", (_parameters(parent),), (_parameters(child),)),
            _Size("weights", (_weight_bytes(parent),), (_weight_bytes(child),)),
        ],
        sizes=_sizes(analysis, cut),
        stacks=[_strip(stack, cut, plan, origin.rankings) for stack in analysis.stacks],
        curves=_curves(origin.rankings),
        scales=_scales(plan),
        replaced=_replaced(plan),
        notes=origin.notes,
        checks=checks,
        meanings=MEANINGS,
        worst=_worst(checks.checks if checks else ()),
        seconds=sum(check.seconds for check in checks.checks) if checks else 0.0,
        fingerprints=_fingerprints(parent, child, origin),
        statistics=origin.statistics,
        pipeline=origin.pipeline,
        command=_command(parent, child, origin),
    )


# sizes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """A width, or those of all blocks together: sizes before and after, and a strip of what is kept, an SVG path."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    strip: str = ""
    reordered: bool = False

    @property
    def share(self) -> float:
        return sum(self.after) / max(sum(self.before), 1)

    @property
    def changed(self) -> bool:
        return self.before != self.after or self.reordered

    @property
    def varies(self) -> bool:
        """Whether blocks differ, few enough to be listed."""
        return len(set(self.after)) > 1 and len(self.after) <= 48


def _sizes(analysis: Analysis, cut: Cut) -> list[_Size]:
    """Return what can be cut, in kept blocks; blocks of one pattern together."""
    groups: dict[tuple, list[Dimension]] = defaultdict(list)
    for dimension in analysis.dimensions:
        stays = not dimension.blocks or dimension.stack not in cut.blocks
        if dimension.locked or not (stays or set(dimension.blocks) & set(cut.blocks[dimension.stack])):
            continue
        groups[(re.sub(r"\bblocks\.\d+\.", "blocks.*.", dimension.name), dimension.role == "free")].append(dimension)
    rows = []
    for (name, free), members in groups.items():
        picks = cut.picks(members[0].axes[0])
        before = tuple(member.size for member in members)
        after = tuple(cut.size(member.axes[0])[0] for member in members)
        strip = _strip_path(picks, before[0]) if picks is not None and len(members) == 1 else ""
        row = _Size(name, before, after, strip, before == after and picks is not None)
        if row.changed or not free:  # a width outside the blocks that stays is no news
            rows.append(row)
    return rows


def _strip_path(picks: np.ndarray, size: int) -> str:
    """Return what is kept as bars of an SVG path, COLUMNS wide; their heights, up to 1, are the share kept there."""
    columns = min(size, COLUMNS)
    of = np.arange(size) * columns // size
    share = np.bincount(of[picks], minlength=columns) / np.bincount(of, minlength=columns)
    step = COLUMNS / columns
    bars = (f"M{i * step:.4g} 1v{-s:.3g}h{step:.4g}v{s:.3g}z" for i, s in enumerate(share) if s)
    return "".join(bars)


# blocks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """A block of the parent: its number, its number in the child or None, dropped halves, its score from 0 to 1."""

    index: int
    new: int | None
    dropped: tuple[str, ...]
    score: float | None


@dataclass(frozen=True)
class _Strip:
    name: str
    cells: tuple[_Cell, ...]
    metric: str

    @property
    def kept(self) -> int:
        return sum(cell.new is not None for cell in self.cells)


def _strip(stack: Stack, cut: Cut, plan: Plan, rankings: Iterable[Ranking]) -> _Strip:
    name = f"{stack.prefix}blocks"
    ranking = next((ranking for ranking in rankings if ranking.name == name), None)
    scores = None if ranking is None else ranking.scores / max(float(np.max(ranking.scores)), 1e-30)
    kept = {old: new for new, old in enumerate(cut.blocks[stack.prefix])}
    cells = []
    for block in stack.blocks:
        halves = [half for half, _ in half_names(stack, block) if half in plan.drop]
        dropped = tuple(half.rsplit(".", 1)[1] for half in halves)
        score = None if scores is None else float(np.clip(scores[block.index], 0, 1))
        cells.append(_Cell(block.index, kept.get(block.index), dropped, score))
    return _Strip(name, tuple(cells), ranking.metric if ranking else "")


# importance ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """Sorted scores as SVG paths: the line, the area of what is kept, and where the cut lies."""

    name: str
    size: int
    kept: int
    share: float
    line: str
    area: str
    cut: float


def _curves(rankings: Iterable[Ranking]) -> dict[tuple[str, str], list[_Curve]]:
    """Return {(what, metric): curves}: hidden alone, feed-forwards and heads a curve for each block."""
    groups: dict[tuple[str, str], list[_Curve]] = defaultdict(list)
    for ranking in rankings:
        if not ranking.name.endswith("blocks"):
            what = re.sub(r"\bblocks\.\d+\.", "blocks.*.", ranking.name)
            groups[(what, ranking.metric)].append(_curve(ranking))
    return dict(groups)


def _curve(ranking: Ranking) -> _Curve:
    """Draw a ranking, kept indices first; equal to plain sorting where the highest scores stay."""
    kept = np.zeros(len(ranking.scores), bool)
    kept[ranking.kept] = True
    order = np.lexsort((-ranking.scores, ~kept))
    scores = ranking.scores[order]
    size, count = len(scores), int(kept.sum())
    low, high = min(float(scores.min()), 0.0), float(scores.max())
    x = (np.arange(size) + 0.5) * WIDTH / size
    y = HEIGHT - 2 - (scores - low) / max(high - low, 1e-30) * (HEIGHT - 6)
    shown = np.unique(np.round(np.linspace(0, size - 1, min(size, 120))).astype(int))
    points = [f"{x[i]:.4g} {y[i]:.4g}" for i in shown]
    inside = [point for point, i in zip(points, shown, strict=True) if i < count]
    cut = count * WIDTH / size
    first, last = points[0].split()[1], inside[-1].split()[1]
    area = f"M0 {HEIGHT}L0 {first}L{'L'.join(inside)}L{cut:.4g} {last}L{cut:.4g} {HEIGHT}Z"
    share = float(ranking.scores[kept].sum() / max(ranking.scores.sum(), 1e-30))
    line = f"M0 {first}L{'L'.join(points)}L{WIDTH} {points[-1].split()[1]}"
    return _Curve(ranking.name, size, count, share, line, area, cut)


# the rest -----------------------------------------------------------------------------------------------------------


def _scales(plan: Plan) -> list[tuple[str, int, float, float]]:
    """Return (name with numbers left out, how many weights, least factor, largest factor)."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, factor in plan.scale.items():
        groups[_unnumbered(name)].append(factor)
    return [(name, len(factors), min(factors), max(factors)) for name, factors in groups.items()]


def _replaced(plan: Plan) -> list[tuple[str, int, list[str]]]:
    """Return (name with numbers left out, how many weights, their shapes)."""
    groups: dict[str, list[str]] = defaultdict(list)
    added = {f"bias behind {name}": value for name, value in plan.bias.items()}
    for name, value in (*plan.replace.items(), *added.items()):
        groups[_unnumbered(name)].append(" x ".join(map(str, np.shape(value))) or "a scalar")
    return [(name, len(shapes), list(dict.fromkeys(shapes))) for name, shapes in groups.items()]


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=[._/])\d+(?=[._/])", "*", name)


def _fingerprints(parent: Model, child: Model, origin: Origin) -> list[tuple[str, str]]:
    rows = [("parent", parent.fingerprint), ("child", child.fingerprint)]
    if origin.statistics is not None and origin.statistics.data:
        rows.append(("samples", origin.statistics.data))
    return rows


def _command(parent: Model, child: Model, origin: Origin) -> str:
    """Return the command that makes the child again: by its pipeline, else by its plan."""
    model = parent.path.name if parent.path else "parent.onnx"
    native = ["--native-constants"] if has_native_constants(child) else []
    if native or not origin.pipeline:
        return shlex.join(["graphclone", "apply", "plan.json", model, *native, "-o", "child.onnx"])
    seed = ["--seed", str(origin.seed)] if origin.seed else []
    return shlex.join(["graphclone", "run", origin.pipeline, model, *origin.samples, *seed, "-o", "child.onnx"])


def _worst(checks: Sequence[Check]) -> float | None:
    return max((check.figure for check in checks if check.figure is not None), default=None)


def _title(parent: Model) -> str:
    return parent.path.name if parent.path else (parent.graph.name or "model")


def _parameters(model: Model) -> int:
    repeated = {tie.second for tie in model.ties}
    return sum(w.size for name, w in model.weights.items() if name not in repeated and is_float(w.onnx_dtype))


def _weight_bytes(model: Model) -> int:
    return sum(weight.nbytes for weight in model.weights.values())


def _visible(value: object) -> object:
    """Return text with escapes for what cannot be printed: line breaks, and marks that turn its direction."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def _short(name: object) -> str:
    """Return a name that fits a line, the middle of a long one left out."""
    text = str(name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]} … {text[-16:]}"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) else str(value)


def _bytes(number: int) -> str:
    value, unit = float(number), 0
    while value >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"
