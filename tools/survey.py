"""Judge the engine on every architecture by every route, a row at a time, and write docs/coverage.md.

    python tools/survey.py [--cache FILE] [--again] [PATTERN ...]    as in `gpt2:* *:legacy17 tf/*`
    python tools/survey.py --page                                    only write the page from what the cache holds
    python tools/survey.py --cache MINE --no-page '*:fp16' 'bert:*'  some routes or architectures, beside others
    python tools/survey.py --merge MINE                              take another cache's rows over, write the page

Each row is a line of JSON in the cache, so that the survey goes on where it was stopped; of two of a name the last
counts. A row is an architecture of the zoo by one exporter, or a checked-in export of another framework with that
framework's own smaller models beside it.
"""

import fnmatch
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import survey_page
import survey_torch
import torch
import zoo
from survey_rows import arguments, judged, write_page
from zoo.export import BATCH_OF_ONE, FAILURES, MODULES, ROUTES
from zoo.export import cache as exports
from zoo.native import cut_model
from zoo.rounded import places, round_like
from zoo.variants import VARIANTS

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import find, first_lock, free_leaves, leaves
from graphclone.cut import Cut
from graphclone.dimensions import Dimension
from graphclone.errors import CutError, GraphcloneError
from graphclone.model import Model, load
from graphclone.plan import Plan
from graphclone.precision import raised
from graphclone.resolution import match
from graphclone.surgery import apply
from graphclone.verify import verify
from graphclone.verify.rounding import unrounded
from graphclone.verify.running import difference, run
from graphclone.verify.structure import problem_of
from graphclone.weights import weight_of

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
PAGE = ROOT / "docs" / "coverage.md"
TOLERANCE = 1e-5
LARGEST = {"few": 5e-2, "fp16": 2**-10 * 8, "bf16": 2**-7 * 8}
TIMES = 8
"""Where a route rounds numbers, the framework's model takes the weights that the file holds. What the file rounds
besides (scales, rotary tables, indexed bias tables, one use of a weight and not the other) sets even the uncut model
apart from the framework's; a child, in which fewer terms hide it, may be so many times as far, and never more than the
largest. A wrong slice is off by a tenth; verify judges the same slices to 1e-5 without the framework."""
HALF_STEP = {"fp16": 2**-12, "bf16": 2**-9}
"""By how much a file in 16 bits rounds a single number, relatively: an attention scale, a factor of embeddings."""
SHARE = 2 / 3


def rows() -> list[str]:
    """Return the names of all rows: `gpt2:dynamo18`, `tf/bert`."""
    fixtures = sorted(FIXTURES.glob("*/*.onnx")) + sorted(FIXTURES.glob("optimum/*/*.onnx"))
    routes = [route for route in (*ROUTES, *MODULES, *VARIANTS) if route not in ("dynamo20", "legacy17_eager")]
    ours = [f"{name}:{route}" for name in zoo.FAMILIES for route in routes]
    return ours + [str(path.relative_to(FIXTURES).with_suffix("")) for path in fixtures]


def judge(row: str) -> dict:
    """Return what is known of a row; what stops it is under `stopped`."""
    started = time.time()
    found = {"row": row, "date": time.strftime("%Y-%m-%d"), "versions": survey_page.versions()}
    try:
        found |= _judged(row)
    except (GraphcloneError, ValueError, RuntimeError, KeyError, IndexError, AssertionError) as error:
        found["stopped"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found | {"seconds": round(time.time() - started, 1)}


def _judged(row: str) -> dict:
    family, _, route = row.partition(":")
    if (family, route) in FAILURES:
        return {"unmade": FAILURES[family, route]}
    path, problem = _exported(family, route) if route else (FIXTURES / f"{row}.onnx", "")
    if problem:
        return {"unmade": problem}
    model = load(path)
    started = time.time()
    analysis = analyse(model)
    found = {
        "nodes": len(model.graph.nodes),
        "analysis": round(time.time() - started, 2),
        "unknown": analysis.typing.unknown,
    }
    found |= _described(analysis)
    report = verify(model, analysis=analysis)
    figures = [check.figure for check in report.checks if check.figure is not None]
    found["verify"] = {"ok": report.ok, "worst": max(figures, default=0.0), "failed": [str(c) for c in report.failed]}
    found["torch"] = survey_torch.judge(model, analysis)
    if route:
        known = _called(model, analysis, family)
        found["missing"] = [n for n in zoo.dimensions(family) if n not in known and not _meant(n, family, analysis)]
        found["folded"] = _folded(model, family)
        found["blockless"] = _blockless(analysis, family)
        found |= _of_zoo(model, analysis, family, route)
    elif (FIXTURES / f"{row}.npz").exists():
        found |= _of_fixture(model, analysis, row)
    return found


def _exported(family: str, route: str) -> tuple[Path | None, str]:
    """Return the export, or what keeps others' tools from making one that is valid."""
    derived, path = route not in ROUTES, None
    try:
        path = zoo.export(family, route)
        if derived:
            _must_run(path, family, route)
    except Exception as error:  # whatever an exporter, a quantizer or an optimizer raises
        if not derived or isinstance(error, GraphcloneError):
            raise
        said = " ".join(str(error).split())
        return None, f"{_infinite_scale(path) if path else ''}{type(error).__name__}: {said[:200]}"
    return path, ""


def _must_run(path: Path, family: str, route: str) -> None:
    """Raise where what another tool wrote is no valid model, or onnxruntime runs it in no precision."""
    if problem := problem_of(load(path)):
        raise ValueError(problem)
    if loss_of(route) in ("", "few"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # as it is written
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        known = {tensor.name for tensor in session.get_inputs()}
        for each in _feeds(family, route):
            session.run(None, {name: array for name, array in each.items() if name in known})


def _infinite_scale(path: Path) -> str:
    """Name the first QuantizeLinear to which a quantizer gave an infinite scale: it saw the infinity of a mask."""
    for node in load(path).graph.nodes:
        scale = node.inputs[1] if node.op == "QuantizeLinear" else None
        if isinstance(scale, gs.Constant) and not np.isfinite(weight_of(scale).load()).all():
            return f"QuantizeLinear node '{node.name}' has an infinite scale; "
    return ""


def _feeds(family: str, route: str) -> list[dict[str, np.ndarray]]:
    """Return what a row is judged on: two lengths, padded."""
    return [zoo.feeds(family, _batch(family, route), length, padded=True) for length in (7, 5)]


def _batch(family: str, route: str) -> int:
    """Return the batch that onnxruntime runs an export at, or what is made of it."""
    base = VARIANTS[route].base if route in VARIANTS else route
    return 1 if (family, base) in BATCH_OF_ONE else 2


def _described(analysis: Analysis) -> dict:
    """Return how many dimensions there are by role, the locked ones' reasons, and the blocks of each stack."""
    roles: dict[str, int] = {}
    for dimension in analysis.dimensions:
        if not dimension.locked:
            roles[dimension.role] = roles.get(dimension.role, 0) + 1
    locked = {d.name: d.locked for d in analysis.dimensions if d.locked}
    return {"roles": roles, "locked": locked, "stacks": {s.prefix: len(s.blocks) for s in analysis.stacks}}


# against the framework's own smaller model -----------------------------------------------------------------------


Case = tuple[str, dict, Callable[[], list[list[np.ndarray]]]]


def _of_zoo(model: Model, analysis: Analysis, family: str, route: str) -> dict:
    batch = _batch(family, route)
    feeds = _feeds(family, route)
    called = _called(model, analysis, family)
    cases = list(_cases(family, analysis, called))
    rounded = model if loss_of(route) else None
    folded, apart = tuple(_folded(model, family)), _apart(model, analysis, family)

    def judged(cases: list[tuple[str, str, dict]]) -> dict[str, float]:
        outputs = functools.partial(wanted, family, batch, rounded, folded)
        pairs = [(*case, functools.partial(outputs, *case)) for case in cases]
        return _figures(model, analysis, feeds, pairs, apart, called)

    worst, tolerance = judged(cases), TOLERANCE
    if rounded:
        nothing = ("nothing", "width", {"keep": {}})
        own = judged([nothing])["nothing"]
        written = _apart_as_written(model, feeds, wanted(family, batch, rounded, folded, *nothing))
        if problem := broken(own, written):
            return {"unmade": problem}
        tolerance = tolerance_of(loss_of(route), own)
    if max(figure for label, figure in worst.items() if "width" in label) > tolerance:
        widths = _widths(family, analysis, called)
        worst |= judged([(name, "width", {"keep": {name: kept}}) for name, kept in widths.items()])
    summary = _summary(worst, {label: kind for label, kind, _ in cases}, tolerance)
    return summary | ({"own": own, "as_written": written} if rounded else {})


def _apart_as_written(model: Model, feeds: list[dict], outputs: list[list[np.ndarray]]) -> float:
    """Return how far a file that rounds is from the framework's model, with all its rounding."""
    names = [tensor.name for tensor in model.outputs]
    try:
        pairs = zip(run(raised(model), feeds), outputs, strict=True)
        return max(difference(got, dict(zip(names, want, strict=True))) for got, want in pairs)
    except GraphcloneError:
        return float("inf")


def _cases(family: str, analysis: Analysis, called: Mapping[str, str]) -> Iterator[tuple[str, str, dict]]:
    """Yield (label, kind, cut): all widths; each stack without its first, middle and last block; half blocks; all."""
    widths = _widths(family, analysis, called)
    yield "all widths", "width", {"keep": widths}
    counts = {stack.prefix.rstrip("."): len(stack.blocks) for stack in analysis.stacks}
    for stack, count in counts.items():
        for label, gone in (("first", {0}), ("middle", {count // 2}), ("last", {count - 1}), ("two", {0, count - 1})):
            kept = [block for block in range(count) if block not in gone]
            if kept:
                yield f"{stack} without {label}".strip(), "block", {"blocks": {stack: kept}}
    for half in _halves(family):
        yield f"without {half}", "half", {"drop": [half]}
    blocks = {stack: [block for block in range(count) if block != count // 2] for stack, count in counts.items()}
    yield "all widths, fewer blocks", "width", {"keep": widths, "blocks": {s: b for s, b in blocks.items() if b}}


def _meant(name: str, family: str, analysis: Analysis) -> list[Dimension]:
    """Return the dimensions that a name of the framework means here; reordered nodes number heads otherwise."""
    kind, _, number = name.rpartition("_")
    sizes = {other: size for other, size in zoo.dimensions(family).items() if other.rpartition("_")[0] == kind}
    if kind in ("head", "stem") and number.isdigit():
        found = {other: analysis.dimension(other) for other in sizes}
        if any(found[other] is None or found[other].size != size for other, size in sizes.items()):
            return []
    blocks = {stack.prefix: tuple(block.index for block in stack.blocks) for stack in analysis.stacks}
    try:
        return match(name, analysis, blocks)
    except CutError:
        return []


def _widths(family: str, analysis: Analysis, called: Mapping[str, str]) -> dict[str, list[int]]:
    """Return two thirds of the indices of every width but the vocabulary; the page lists what is left out."""
    found = {}
    for name, size in zoo.dimensions(family).items():
        meant = [analysis.dimension(called[name])] if name in called else _meant(name, family, analysis)
        values = _meant(name.replace("head_dim", "v_head_dim"), family, analysis) if name.endswith("head_dim") else []
        fixed = any(dimension.locked for dimension in (*meant, *values))
        if size > 1 and not name.endswith("vocab") and meant and not fixed:
            least = 2 if name.endswith("experts") else 1
            found[name] = _in_groups(meant[0], least) or [
                int(i) for i in zoo.choose(family, name, max(least, int(size * SHARE)))
            ]
    return found


def _in_groups(dimension: Dimension, least: int) -> list[int]:
    """Return whole groups of a dimension that is only cut in groups, else nothing."""
    axis = find(dimension.axes[0])
    if first_lock(axis) is None:
        return []
    random = np.random.default_rng(len(dimension.name))
    counts = {leaf: max(least, int(leaf.size[0] * SHARE)) for leaf in free_leaves(axis)}
    picks = {id(leaf): np.sort(random.permutation(leaf.size[0])[:count]) for leaf, count in counts.items()}
    return [int(i) for i in Cut(picks, tuple(counts), {}, ()).picks(axis)]


def _halves(family: str) -> list[str]:
    """Name the second block's half blocks of each stack."""
    stacks = [stack for stack in zoo.family(family).layout.stacks if not stack.shared]
    return [f"{stack.prefix}blocks.{stack.start + 1}.{half}" for stack in stacks for half in stack.halves]


MEMORY: dict[tuple, list[list[np.ndarray]]] = {}


def loss_of(route: str) -> str:
    """Return what a route does to numbers: "" nothing, else the 16 bits or the few bits it rounds to."""
    for loss in ("fp16", "bf16"):
        if loss in route:
            return loss
    return VARIANTS[route].loss if route in VARIANTS else ""


def tolerance_of(loss: str, own: float) -> float:
    """Return how far a child may be from the framework's where the uncut file is `own` from it.

    The scales that a file rounds may show less in the parent than in a child, whose scores are other ones.

    Example:
        >>> tolerance_of("fp16", 1e-7), tolerance_of("fp16", 2e-5), tolerance_of("few", 1e-3)
        (1e-05, 0.000244140625, 0.008)
    """
    if own <= TOLERANCE:
        return TOLERANCE
    return min(LARGEST[loss], max(TIMES * own, HALF_STEP.get(loss, 0.0)))


def broken(own: float, written: float) -> str:
    """Say that a file is no export of its model, if it is as far off without its rounding as with it, uncut.

    Example:
        >>> broken(0.85, 0.74), broken(1e-6, 0.74)
        ("the tool's file, uncut, is 0.7 off the framework's model", '')
    """
    nearest = min(own, written)
    return f"the tool's file, uncut, is {nearest:.1g} off the framework's model" if nearest > survey_page.FAR else ""


def wanted(
    family: str, batch: int, rounded: Model | None, folded: tuple[str, ...], label: str, kind: str, cut: dict
) -> list[list[np.ndarray]]:
    """Return the outputs of the framework's own model with a cut; the routes of a family share them.

    rounded: the export whose weights it takes, where they are rounded. folded: parameters from which it keeps what a
    tool computed ahead.
    """
    key = (family, batch, rounded and rounded.path, folded, json.dumps(cut))
    if key not in MEMORY:
        blocks = cut.get("blocks")
        blocks = blocks[""] if blocks and set(blocks) == {""} else blocks
        module = zoo.family(family).build()
        layout = zoo.family(family).layout
        for name in folded:
            layout.folded[name](module)
        layout = round_like(module, rounded, layout) if rounded else layout
        module = cut_model(module, layout, cut.get("keep") or {}, blocks, cut.get("drop", ()))
        feeds = [zoo.feeds(family, batch, length, padded=True) for length in (7, 5)]
        with torch.no_grad():
            tensors = [module(*map(torch.from_numpy, each.values())) for each in feeds]
        MEMORY[key] = [[tensor.numpy() for tensor in outputs] for outputs in tensors]
    return MEMORY[key]


def _of_fixture(model: Model, analysis: Analysis, row: str) -> dict:
    with np.load(FIXTURES / f"{row}.npz") as stored:
        arrays = dict(stored)
    feeds = [{name.removeprefix("input:"): array for name, array in arrays.items() if name.startswith("input:")}]
    names = [tensor.name for tensor in model.outputs]
    cases = []
    for number, case in enumerate(json.loads(str(arrays["cases"]))):
        outputs = [[arrays[f"case:{number}:{name}"] for name in names]]
        kind = "block" if "block" in case["label"] else "width"
        cut = {key: value for key, value in case.items() if key != "label"}
        cases.append((case["label"], kind, cut, lambda outputs=outputs: outputs))
    worst = _figures(model, analysis, feeds, cases)
    return _summary(worst, {label: kind for label, kind, *_ in cases})


def _figures(
    model: Model,
    analysis: Analysis,
    feeds: list[dict],
    cases: list[tuple],
    apart: Mapping[str, str] = {},
    called: Mapping[str, str] = {},
) -> dict[str, float | str]:
    """Return, by case, how far the child is from the framework's own model; infinity where either cannot be made."""
    names = [tensor.name for tensor in model.outputs]
    worst = {}
    for label, _, cut, outputs in cases:
        try:
            keep = dict(cut.get("keep") or {})
            keep |= {name: keep[other] for name, other in apart.items() if other in keep}
            keep = {called.get(name, name): kept for name, kept in keep.items()}
            child = apply(model, Plan.from_json({**cut, "keep": keep}), analysis)
            results = run(unrounded(raised(child)), feeds)
            pairs = zip(results, outputs(), strict=True)
            worst[label] = max(difference(got, dict(zip(names, want, strict=True))) for got, want in pairs)
        except (GraphcloneError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            worst[label] = float("inf")
            print(f"    {label}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    return worst


def _blockless(analysis: Analysis, family: str) -> str:
    """Say what keeps the stacks of a family from being found, if nothing was found: sums of whole numbers."""
    if analysis.stacks or not zoo.family(family).layout.stacks:
        return ""
    sums = [node.op for node in analysis.typing.nodes if node.op.type == "QLinearAdd"]
    if not sums:
        return "no stack of blocks was found"
    first = f"{sums[0].type} node '{sums[0].node.name}'"
    return f"no blocks: {first} gives the stream on in whole numbers, with a scale that differs from block to block"


def _folded(model: Model, family: str) -> list[str]:
    """Name the parameters that an export lacks because a tool computed ahead what is made of them."""
    folded = zoo.family(family).layout.folded
    return [name for name in folded if not any(known.startswith(name) for known in model.weights)]


def _apart(model: Model, analysis: Analysis, family: str) -> dict[str, str]:
    """Return the widths that are one with another width in the framework, and not in this export: {theirs: its}.

    An export that rounds a matrix once for the look-up and once for the logits has two where the framework shares one,
    and so has one that splits a packed projection.
    """
    sizes, found = zoo.dimensions(family), {}
    for symbol, dimension in _carried(model, analysis, family):
        meant = analysis.dimension(symbol)
        if meant and meant.name != dimension.name and dimension.name not in sizes:
            found[dimension.name] = symbol
    return found


def _called(model: Model, analysis: Analysis, family: str) -> dict[str, str]:
    """Return what widths of the framework's own parts, a pooling head's, are called here: {its: theirs}."""
    pairs = _carried(model, analysis, family)
    return {symbol: dimension.name for symbol, dimension in pairs if not _meant(symbol, family, analysis)}


def _carried(model: Model, analysis: Analysis, family: str) -> Iterator[tuple[str, Dimension]]:
    """Yield (symbol of the framework, width here) for what carries a parameter, which is found by its values."""
    layout, module = zoo.family(family).layout, zoo.family(family).build()
    if layout.before:
        layout.before(module)
    free = [dimension for dimension in analysis.dimensions if not dimension.locked]
    of_leaf = {id(leaf): dimension for dimension in free for axis in dimension.axes for leaf in free_leaves(axis)}
    sizes = zoo.dimensions(family)
    for parameter, initializer, turned in places(module, model):
        pattern = next((row for glob, row in layout.rows.items() if fnmatch.fnmatchcase(parameter, glob)), "")
        for use in analysis.typing.uses.get(initializer, ()):
            words = re.findall(r"\([^()]*\)|\S+", pattern)[-len(use.axes) :]
            for word, axis in zip(reversed(words), use.axes if turned else reversed(use.axes), strict=False):
                symbols, parts = word.strip("()").split(), list(leaves(axis))
                for symbol, leaf in zip(symbols, parts, strict=True) if len(symbols) == len(parts) else ():
                    dimension = of_leaf.get(id(leaf))
                    if dimension and sizes.get(symbol) == leaf.size[0]:
                        yield symbol, dimension


def _summary(worst: dict[str, float], kinds: dict[str, str], tolerance: float = TOLERANCE) -> dict:
    """Return the worst figures of widths and of blocks, how many cases hold, and those that do not."""

    def of(*wanted: str) -> dict:
        figures = {label: figure for label, figure in worst.items() if kinds.get(label, "width") in wanted}
        good = [figure for figure in figures.values() if figure <= tolerance]
        bad = {label: f"{figure:.1e}" for label, figure in figures.items() if figure > tolerance}
        return {"held": len(good), "cases": len(figures), "worst": max(good, default=0.0), "bad": bad}

    return {"native": of("width"), "blocks": of("block", "half")}


# the survey ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__, exports() / "coverage.jsonl")
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="judge nothing, add a cache's rows, write the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.merge:
        given.page = True
        with given.cache.open("a") as file:
            file.write(given.merge.read_text())
    found = judged(rows(), given, judge, lambda row: f"{row['row']:28} {survey_page.verdict(row)}")
    if not given.no_page:
        write_page(PAGE, survey_page.page(found, len(rows())))


if __name__ == "__main__":
    main()
