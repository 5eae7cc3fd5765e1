"""Mistakes that no shape betrays, in what exporters write: the framework's own smaller model sees each.

As in `test_silent_errors`, each rule is taken away once, and the child must then be another model than the framework's.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
import zoo  # noqa: E402
from breaking import (  # noqa: E402
    BY_VALUE,
    Breaking,
    changed,
    second_ignored,
    storeless,
    unfilled,
)

from graphclone.analysis import analyse  # noqa: E402
from graphclone.errors import GraphcloneError  # noqa: E402
from graphclone.model import Model, load  # noqa: E402
from graphclone.plan import Plan  # noqa: E402
from graphclone.surgery import apply  # noqa: E402
from graphclone.verify.running import difference, run  # noqa: E402

torch.set_num_threads(1)

LENGTHS = (7, 5)


@dataclass(frozen=True)
class Case:
    """A family, the dimensions of it that are cut to two thirds, how to take the rule away, and the route."""

    family: str
    names: Sequence[str]
    broken: Breaking
    route: str = "legacy17"

    def keep(self) -> dict[str, list[int]]:
        sizes, kept = zoo.dimensions(self.family), {}
        for name in self.names:
            known = name if name in sizes else re.sub(r"\d+", "*", name)
            kept[name] = [int(i) for i in zoo.choose(self.family, known, sizes[known] * 2 // 3)]
        return kept


ROTATIONS = {
    f"{kind} RoPE, {route}": Case(f"llama_{kind}", ["blocks.*.head_dim"], changed("Slice", storeless), route)
    for kind, route in [
        ("linear", "legacy17"),
        ("dynamic", "legacy17"),
        ("yarn", "legacy17"),
        ("llama3", "legacy17"),
        ("longrope", "dynamo18"),
    ]
}
CASES = {
    **ROTATIONS,
    "attention scale": Case("gpt2", ["blocks.1.head_dim"], BY_VALUE),
    "softcaps that equal sizes": Case("gemma2_capped", ["hidden", "blocks.*.head_dim"], BY_VALUE),
    "ALiBi slopes": Case("bloom", ["blocks.*.heads"], changed("Mul", second_ignored)),
    "relative position table": Case("t5", ["encoder.blocks.*.heads"], changed("Add", second_ignored)),
    "zero bias of cross-attention": Case(
        "t5_apart", ["decoder.blocks.1.cross_heads"], changed("ConstantOfShape", unfilled)
    ),
    "learned positions": Case("opt", ["hidden"], changed("Add", second_ignored)),
    "group norm": Case("wav2vec2", ["stem_0"], changed("Reshape", storeless)),
}


@functools.cache
def parent(family: str, route: str) -> Model:
    return load(zoo.export(family, route))


def error(case: Case) -> float:
    """Return how far the child is from the framework's smaller model, over two lengths; infinity where it fails."""
    model = parent(case.family, case.route)
    probes = [zoo.feeds(case.family, 2, length, padded=True) for length in LENGTHS]
    try:
        child = apply(model, Plan.from_json({"keep": case.keep()}), analyse(model))
        results = run(child, probes)
    except (GraphcloneError, ValueError):
        return float("inf")
    pairs = zip(results, wanted(case), strict=True)
    return max(difference(got, dict(zip(got, want, strict=True))) for got, want in pairs)


def wanted(case: Case) -> list[list[np.ndarray]]:
    return _wanted(case.family, tuple((name, tuple(kept)) for name, kept in case.keep().items()))


@functools.cache
def _wanted(family: str, keep: tuple) -> list[list[np.ndarray]]:
    """Run the framework's smaller model; a fresh one for each length, as dynamic RoPE remembers the longest."""
    found = []
    for length in LENGTHS:
        module = zoo.native(family, {name: list(kept) for name, kept in keep})
        feeds = zoo.feeds(family, 2, length, padded=True).values()
        with torch.no_grad():
            found.append([tensor.numpy() for tensor in module(*map(torch.from_numpy, feeds))])
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_child_is_the_smaller_model(name):
    assert error(CASES[name]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_without_its_rule_it_is_not(monkeypatch, name):
    case = CASES[name]
    wanted(case)
    case.broken(monkeypatch)
    assert error(case) > 1e-3
