"""Equal sizes mislead nobody: hidden = FFN = vocabulary = sequence, heads = batch = layers = head dim, five families.

Every oracle holds, and the names and the structure of all widths are those of the same model with sizes all different.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import zoo  # noqa: E402
from zoo.families import FAMILIES  # noqa: E402

from graphclone.analysis import Analysis, analyse  # noqa: E402
from graphclone.axes.axis import describe, leaves  # noqa: E402
from graphclone.model import Model, load  # noqa: E402
from graphclone.verify import verify  # noqa: E402

WIDE, FEW = 16, 4
ROUTE = "legacy17"
BERT = dict(hidden_size=WIDE, intermediate_size=WIDE, num_attention_heads=FEW)
EQUAL = {
    "gpt2": dict(n_embd=WIDE, n_inner=WIDE, vocab_size=WIDE, n_head=FEW, n_positions=WIDE),
    "llama": dict(BERT, vocab_size=WIDE, num_key_value_heads=2, head_dim=FEW, max_position_embeddings=WIDE),
    "bert": dict(BERT, vocab_size=WIDE, max_position_embeddings=WIDE),
    "vit": dict(BERT, image_size=WIDE, patch_size=FEW),
    "t5": dict(d_model=WIDE, d_ff=WIDE, vocab_size=WIDE, num_heads=FEW, d_kv=FEW, relative_attention_num_buckets=WIDE),
}
LAYERS = {"gpt2": ("n_layer",), "t5": ("num_layers", "num_decoder_layers")}

torch.set_num_threads(1)


@cache
def analysed(family: str, kind: str) -> tuple[Model, Analysis]:
    """Return the model of a family with four layers, its other sizes all `equal` or all `different`."""
    given = FAMILIES[family]
    settings = dict.fromkeys(LAYERS.get(family, ("num_hidden_layers",)), FEW)
    inputs = dict(given.inputs)
    if kind == "equal":
        settings |= EQUAL[family]
        inputs = {name: replace(each, shape=_shape(each), below=min(each.below, WIDE)) for name, each in inputs.items()}
    name = f"{family}_{kind}"
    make = partial(given.make.func, *given.make.args, **(given.make.keywords | settings))
    FAMILIES[name] = replace(given, name=name, make=make, inputs=inputs)
    try:
        model = load(zoo.export(name, ROUTE))
    finally:
        del FAMILIES[name]
    return model, analyse(model)


def _shape(given) -> tuple:
    return tuple(WIDE if isinstance(size, int) and size > 3 else size for size in given.shape)


def feeds(model: Model) -> dict[str, np.ndarray]:
    """Return inputs of batch 4 and length 16."""
    random = np.random.default_rng(0)
    result = {}
    for tensor in model.inputs:
        shape = [size if isinstance(size, int) else FEW if "batch" in size else WIDE for size in tensor.shape]
        kind = np.dtype(tensor.dtype)
        ids = np.ones(shape, kind) if "mask" in tensor.name else random.integers(0, WIDE, shape).astype(kind)
        result[tensor.name] = ids if kind.kind == "i" else random.standard_normal(shape).astype(kind)
    return result


@pytest.mark.parametrize("family", EQUAL)
def test_every_oracle_holds(family):
    model, analysis = analysed(family, "equal")
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


@pytest.mark.parametrize("family", EQUAL)
def test_every_oracle_holds_at_equal_batch_and_length(family):
    model, analysis = analysed(family, "equal")
    report = verify(model, analysis=analysis, data=[feeds(model)])
    assert report.ok, str(report)


@pytest.mark.parametrize("family", EQUAL)
def test_names_are_those_of_distinct_sizes(family):
    equal, different = (named(analysed(family, kind)[1]) for kind in ("equal", "different"))
    assert equal == different


@pytest.mark.parametrize("family", EQUAL)
def test_the_partition_is_that_of_distinct_sizes(family):
    equal, different = (partition(*analysed(family, kind)) for kind in ("equal", "different"))
    assert equal == different


def named(analysis: Analysis) -> list[tuple]:
    """Return what is known of every dimension but sizes."""
    return [
        (d.names, d.role, d.stack, d.blocks, d.weights, bool(d.locked), [_sizeless(describe(axis)) for axis in d.axes])
        for d in analysis.dimensions
    ]


def partition(model: Model, analysis: Analysis) -> list[tuple]:
    """Return which axes of all matrices are the same, atom by atom, and how each is grouped."""
    numbers: Mapping[int, int] = {}
    found = []
    for name, weight in model.weights.items():
        if weight.dtype.kind != "f" or sum(size > 1 for size in weight.shape) < 2:
            continue
        for axis in analysis.typing.uses[name][0].axes if analysis.typing.uses.get(name) else ():
            atoms = tuple(numbers.setdefault(id(leaf), len(numbers)) for leaf in leaves(axis))
            found.append((_sizeless(describe(axis)), atoms))
    return found


def _sizeless(text: str) -> str:
    return re.sub(r"\d+", "n", text)
