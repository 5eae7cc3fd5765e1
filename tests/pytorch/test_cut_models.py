"""Cut models: names as the framework's own smaller model has them, one class for blocks of several sizes."""

import numpy as np
import onnxruntime
import pytest
import torch
import zoo

import graphclone
from graphclone.pytorch import to_torch


@pytest.mark.parametrize(
    ("family", "route"), [("gpt2", "dynamo18"), ("llama", "dynamo18"), ("llama", "legacy17"), ("bert", "legacy17")]
)
def test_kept_blocks_are_renumbered_and_share_a_class(family, route):
    parent = graphclone.load(zoo.export(family, route))
    dimensions = {each.name: each.size for each in graphclone.analyse(parent).dimensions}
    keep = {"hidden": tuple(range(3, dimensions["hidden"]))}
    keep |= {f"blocks.{index}.ffn": tuple(range(dimensions[f"blocks.{index}.ffn"] - 3 * index)) for index in range(5)}
    plan = graphclone.Plan(parent=parent.fingerprint, keep=keep, blocks={"": (0, 2, 4)}, drop=(), scale={}, replace={})
    child = graphclone.apply(parent, plan)
    module = to_torch(child)

    expected = {name for name in zoo.family(family).build().state_dict() if ".3." not in name and ".4." not in name}
    assert set(module.state_dict()) == expected
    assert module.report["absent"] == [] and module.report["unnamed"] == []
    assert module.source.count("class ") - module.source.count("class Group") - module.source.count("class Conv1D") == 2

    feeds = {value.name: zoo.feeds(family, 3, 9, padded=True)[value.name] for value in child.inputs}
    data = child.to_proto().SerializeToString()
    wanted = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
    with torch.no_grad():
        given = module(*map(torch.from_numpy, feeds.values()))
    for have, want in zip(given if isinstance(given, tuple) else (given,), wanted, strict=True):
        assert np.abs(have.numpy() - want).max() <= 1e-5 * np.abs(want).max()
