"""The demo's parent is what it says it is, and the demo runs from load to page."""

import json
import sys

import demo
import numpy as np
import onnx
import onnxruntime
import pytest
from train_parent import DATA, GPT, Config, Text

PARENT = DATA / "parent.onnx"


@pytest.fixture(scope="module")
def metadata() -> dict[str, object]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(PARENT).metadata_props}


def test_parent_is_small_and_in_one_file():
    assert PARENT.stat().st_size <= 8e6
    assert not any(tensor.external_data for tensor in onnx.load(PARENT, load_external_data=False).graph.initializer)


def test_parent_keeps_the_parameters_names_and_shapes(metadata):
    parameters = {name: tuple(p.shape) for name, p in GPT(Config(**metadata["config"])).named_parameters()}
    stored = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(PARENT).graph.initializer}
    assert parameters.items() <= stored.items()


def test_parent_names_no_file_of_the_machine_that_made_it():
    assert b".py" not in PARENT.read_bytes()


def test_parent_predicts_as_well_as_its_metadata_says(metadata):
    text = Text((DATA / "tinyshakespeare.txt").read_text(encoding="utf-8"), metadata["vocabulary"])
    inputs, targets = (part.numpy() for part in text.validation_windows(64, metadata["config"]["context"]))
    session = onnxruntime.InferenceSession(PARENT, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"ids": inputs})  # 64 T V
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    assert -chosen.mean() == pytest.approx(metadata["validation_loss"], abs=0.05)


def test_demo_writes_its_curves_its_page_and_the_child(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "20", "--seeds", "1", "--out", str(tmp_path)])
    demo.main()
    result = json.loads((tmp_path / "result.json").read_text())
    subcloned, random = result["arms"]
    assert subcloned["mean"][-1] < random["mean"][-1], "twenty steps from subcloned weights beat twenty from random"
    page = (tmp_path / "demo.html").read_text()
    assert "<svg" in page and result["verdict"] in page
    namespaces = ("http://www.w3.org", "http://purl.org", "http://creativecommons.org")
    assert page.count("http") == sum(map(page.count, namespaces)), "the page needs no network"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    onnx.checker.check_model(onnx.load(tmp_path / "child.onnx"), full_check=True)
