"""Check that every export of the zoo computes what the framework does; onnxruntime is the judge."""

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from zoo.export import BATCH_OF_ONE, FAILURES, ROUTES

QUICK = {("bert", "legacy17"), ("gpt2", "legacy17"), ("llama", "legacy17"), ("vit", "legacy17")}


@pytest.mark.parametrize(
    ("name", "route"),
    [
        (name, route) if (name, route) in QUICK else pytest.param(name, route, marks=pytest.mark.long)
        for route in ROUTES
        for name in zoo.FAMILIES
        if (name, route) not in FAILURES
    ],
)
def test_an_export_equals_the_framework(name, route):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(zoo.export(name, route), options, providers=["CPUExecutionProvider"])
    model = zoo.family(name).build()
    for batch, seq in ((1, 7), (1, 9)) if (name, route) in BATCH_OF_ONE else ((2, 7), (3, 9), (1, 6)):
        inputs = zoo.feeds(name, batch, seq, padded=True, seed=1)
        known = {each.name for each in session.get_inputs()}
        got = session.run(None, {key: value for key, value in inputs.items() if key in known})
        with torch.no_grad():
            want = [tensor.numpy() for tensor in model(*map(torch.from_numpy, inputs.values()))]
        for one, other in zip(got, want, strict=True):
            assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_a_known_failure_says_why():
    for name, route in FAILURES:
        with pytest.raises(ValueError, match="cannot be exported"):
            zoo.export(name, route)
