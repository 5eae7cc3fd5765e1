"""Cut exports of other frameworks' transformers; each child computes what the framework's own smaller model does."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from breaking import NO_DENOMINATORS

from graphclone.analysis import Analysis, analyse
from graphclone.model import Model, load
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify import verify

FOLDER = Path(__file__).parent / "fixtures"
FIXTURES = sorted(
    str(file.relative_to(FOLDER).with_suffix(""))
    for file in FOLDER.glob("*/*.onnx")
    if file.with_suffix(".npz").exists()
)
LOOK_UPS = [
    "jax/linen_encoder",
    "jax/scan",
    "jax2tf/encoder",
    "keras_jax/encoder",
    "keras_torch/encoder_static",
    "paddle/encoder",
    "tf/encoder",
]


@cache
def expected(fixture: str) -> dict[str, np.ndarray]:
    with np.load((FOLDER / fixture).with_suffix(".npz")) as arrays:
        return dict(arrays)


def cases_of(fixture: str) -> list[dict]:
    return json.loads(str(expected(fixture)["cases"]))


@cache
def parent_of(fixture: str) -> tuple[Model, Analysis]:
    model = load((FOLDER / fixture).with_suffix(".onnx"))
    return model, analyse(model)


def run(model: Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = model.to_proto().SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    given = {tensor.name: feeds[f"input:{tensor.name}"] for tensor in session.get_inputs()}
    return dict(zip((tensor.name for tensor in session.get_outputs()), session.run(None, given), strict=True))


def distance(model: Model, fixture: str, prefix: str) -> float:
    """Return the largest relative difference of a model's outputs and the expected ones."""
    arrays = expected(fixture)
    worst = 0.0
    for name, computed in run(model, arrays).items():
        reference = arrays[f"{prefix}:{name}"]
        assert computed.shape == reference.shape
        worst = max(worst, float(np.abs(computed - reference).max() / np.abs(reference).max()))
    return worst


def parameters() -> list:
    listed = []
    for fixture in FIXTURES:
        for number, case in enumerate(cases_of(fixture)):
            listed.append(pytest.param(fixture, number, id=f"{fixture}-{case['label'].replace(' ', '_')}"))
    return listed


@pytest.mark.parametrize("fixture", FIXTURES)
def test_parent(fixture: str) -> None:
    assert distance(parent_of(fixture)[0], fixture, "output") < 1e-5


@pytest.mark.parametrize(("fixture", "number"), parameters())
def test_child(fixture: str, number: int) -> None:
    model, analysis = parent_of(fixture)
    case = cases_of(fixture)[number]
    child = apply(model, Plan.from_json({key: value for key, value in case.items() if key != "label"}), analysis)
    assert distance(child, fixture, f"case:{number}") < 1e-5


@pytest.mark.parametrize("fixture", ["jax2tf/encoder", "keras_jax/encoder", "keras_jax/decoder"])
def test_without_the_rule_for_sizes_in_floats_norms_are_wrong(monkeypatch: pytest.MonkeyPatch, fixture: str) -> None:
    """JAX writes the mean of a norm as a sum divided by 48.0, which must follow the cut."""
    NO_DENOMINATORS(monkeypatch)
    model = load((FOLDER / fixture).with_suffix(".onnx"))
    number, case = next((i, case) for i, case in enumerate(cases_of(fixture)) if case["label"] == "hidden")
    child = apply(model, Plan.from_json({"keep": case["keep"]}))
    assert distance(child, fixture, f"case:{number}") > 1e-3


@pytest.mark.parametrize("fixture", LOOK_UPS)
def test_vocabulary(fixture: str) -> None:
    """Ids that are looked up as NumPy would, negative ones from the end, range over the vocabulary all the same."""
    model, analysis = parent_of(fixture)
    arrays = expected(fixture)
    ids = arrays["input:tokens"]
    kept = np.random.default_rng(0).permutation(np.unique(ids))
    child = apply(model, Plan.from_json({"keep": {"vocab": kept.tolist()}}), analysis)
    renumbered = np.argsort(kept)[np.searchsorted(np.sort(kept), ids)].astype(ids.dtype)
    before = run(model, arrays)
    for name, computed in run(child, {"input:tokens": renumbered}).items():
        np.testing.assert_array_equal(computed, before[name])


@pytest.mark.long
@pytest.mark.parametrize("fixture", FIXTURES)
def test_oracles(fixture: str) -> None:
    model, analysis = parent_of(fixture)
    assert verify(model, analysis=analysis).ok
