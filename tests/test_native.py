"""The native oracle: the framework's own model, cut to the same slices, gives the same outputs as the child.

Every dimension alone, all together, blocks from the start, the middle and the end, for four families by every route.
"""

import functools
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import zoo  # noqa: E402

from graphclone.analysis import Analysis, analyse  # noqa: E402
from graphclone.model import Model, load  # noqa: E402
from graphclone.plan import Plan  # noqa: E402
from graphclone.surgery import apply  # noqa: E402
from graphclone.verify import verify  # noqa: E402
from graphclone.verify.running import difference, run  # noqa: E402

FAMILIES = ("gpt2", "llama", "bert", "vit")
QUICK = ("dynamo20", "legacy17")
ROUTES = ("dynamo20", "legacy17", "dynamo18", "dynamo23")
TOLERANCE = 1e-5
LONG = bool(os.environ.get("GRAPHCLONE_LONG"))

torch.set_num_threads(1)

pytestmark = pytest.mark.parametrize(
    ("family", "route"),
    [
        pytest.param(family, route, marks=() if route in QUICK else pytest.mark.long)
        for route in ROUTES
        for family in FAMILIES
    ],
)


@functools.cache
def parent(family: str, route: str) -> tuple[Model, Analysis]:
    model = load(zoo.export(family, route))
    return model, analyse(model)


def figure(family: str, route: str, keep: dict[str, list[int]], blocks: list[int] | None = None, drop=()) -> float:
    """Return how far the child is from the framework's model with the same slices, over two shapes."""
    model, analysis = parent(family, route)
    child = apply(model, plan_of(keep, blocks, drop), analysis)
    module = zoo.native(family, keep, blocks, drop)
    batch = 1 if (family, route) == ("llama", "dynamo23") else 2  # onnxruntime's RotaryEmbedding runs no larger one
    probes = [zoo.feeds(family, batch, length, padded=True) for length in (7, 5)]
    names = [output.name for output in child.outputs]
    figures = []
    for feeds, got in zip(probes, run(child, probes), strict=True):
        with torch.no_grad():
            wanted = [tensor.numpy() for tensor in module(*map(torch.from_numpy, feeds.values()))]
        figures.append(difference(got, dict(zip(names, wanted, strict=True))))
    return max(figures)


def plan_of(keep: dict[str, list[int]], blocks: list[int] | None, drop=()) -> Plan:
    kept = {name: tuple(int(index) for index in indices) for name, indices in keep.items()}
    return Plan(keep=kept, blocks={} if blocks is None else {"": tuple(blocks)}, drop=tuple(drop))


def some(family: str, share: float = 2 / 3) -> dict[str, list[int]]:
    """Return arbitrary kept indices of every dimension but the vocabulary."""
    return {
        name: zoo.choose(family, name, max(1, int(size * share)))
        for name, size in zoo.dimensions(family).items()
        if size > 1 and not name.endswith("vocab")
    }


def depth(family: str, route: str) -> int:
    return len(parent(family, route)[1].stacks[0].blocks)


def test_verify_passes(family, route):
    model, analysis = parent(family, route)
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


def test_each_dimension_alone(family, route):
    last = depth(family, route) - 1
    looked_at = (0, last // 2, last) if LONG else (last // 2,)
    found = {}
    for name, kept in some(family).items():
        if any(part.isdigit() and int(part) not in looked_at for part in name.split(".")):
            continue
        found[name] = figure(family, route, {name: kept})
    assert {"hidden"} < set(found)
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


def test_every_dimension_can_be_named(family, route):
    analysis = parent(family, route)[1]
    unknown = [name for name in zoo.dimensions(family) if "*" not in name and analysis.dimension(name) is None]
    assert unknown == []


def test_all_dimensions_together(family, route):
    assert figure(family, route, some(family)) < TOLERANCE


def test_blocks_from_the_start_the_middle_and_the_end(family, route):
    count = depth(family, route)
    found = {
        drop: figure(family, route, {}, [block for block in range(count) if block not in drop])
        for drop in ((0,), (count // 2,), (count - 1,), (0, count - 1))
    }
    assert {drop: value for drop, value in found.items() if value > TOLERANCE} == {}


def test_half_blocks(family, route):
    found = {
        name: figure(family, route, {}, drop=[name])
        for name in ("blocks.0.attention", "blocks.1.ffn", "blocks.2.attention")
    }
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


def test_everything_at_once(family, route):
    kept = [block for block in range(depth(family, route)) if block != 1]
    assert figure(family, route, some(family, 1 / 2), kept) < TOLERANCE


def test_any_order_that_is_legal(family, route):
    keep = {
        name: zoo.choose(family, name, size, seed=5, ordered=False)
        for name, size in zoo.dimensions(family).items()
        if size > 1 and not name.endswith("vocab") and not name.endswith("head_dim")
    }
    assert figure(family, route, keep) < TOLERANCE
